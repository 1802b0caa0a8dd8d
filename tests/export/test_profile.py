"""Profiles: found by name or path, and refused in words."""

from __future__ import annotations

from importlib.util import find_spec
from pathlib import Path

import pytest

from tldist.errors import RecipeError
from tldist.export.profile import find_profile
from tldist.share import find_shared

SHIPPED = sorted(file.stem for file in find_shared("export/profiles").glob("*.yaml"))


@pytest.mark.parametrize("name", SHIPPED)
def test_profile__every_shipped_one_loads(name: str) -> None:
    assert find_profile(name).name == name


@pytest.mark.parametrize("name", SHIPPED)
def test_profile__every_line_of_a_shipped_one_has_its_reason(name: str) -> None:
    """A comment on the line, or above it; each tolerance has one of its own, of a sentence at least."""
    lines = (find_shared("export/profiles") / f"{name}.yaml").read_text().splitlines()
    assert lines[0].startswith("# For ")
    start = lines.index("tolerances:")
    for number, line in enumerate(lines):
        if not line.strip() or line.lstrip().startswith("#") or line in ("tolerances:", "quantization:"):
            continue
        key = line.partition(":")[0].strip()
        assert "#" in line or lines[number - 1].lstrip().startswith("#"), f"{name}: {key} has no comment"
        if number > start:
            above = [one for one in lines[start:number] if one.strip()]
            comment = []
            while above and above[-1].lstrip().startswith("#"):
                comment.insert(0, above.pop().strip("# "))
            assert len(" ".join(comment)) > 60, f"{name}: tolerance {key} has no reason"


def test_profile__the_shipped_ones_are_what_they_are_called() -> None:
    found = {name: find_profile(name) for name in SHIPPED}
    assert set(found) == {"cpu-fp32", "cpu-int8", "cuda-fp16", "cuda-bf16", "tensorrt-fp16"}
    for name, profile in found.items():
        provider, precision = name.split("-")
        assert profile.provider.lower().startswith(provider)
        assert profile.precision == precision
    assert found["cpu-int8"].tolerances.extremes == "reported"
    widths = [
        found[name].tolerances.max_relative for name in ("cpu-fp32", "cuda-fp16", "cuda-bf16", "cpu-int8")
    ]
    assert widths == sorted(widths)


@pytest.mark.parametrize("name", [name for name in SHIPPED if not name.startswith("cpu")])
def test_profile__its_provider_options_are_known_to_onnxruntime(name: str) -> None:
    """Looked for in the provider's library, which is there where onnxruntime-gpu is installed."""
    profile = find_profile(name)
    folder = Path(str(find_spec("onnxruntime").submodule_search_locations[0])) / "capi"  # type: ignore[union-attr, index]
    library = folder / f"libonnxruntime_providers_{name.split('-')[0]}.so"
    if not library.is_file():
        pytest.skip("this ONNX Runtime has no such provider")
    content = library.read_bytes()
    for option in profile.provider_options:
        assert option.encode() + b"\0" in content, option


def test_profile__bf16_needs_an_operator_set_that_has_it(tmp_path: Path) -> None:
    text = (find_shared("export/profiles") / "cuda-bf16.yaml").read_text()
    for opset in ("none", "21"):
        (tmp_path / "p.yaml").write_text(text.replace("opset: 22", f"opset: {opset}"))
        with pytest.raises(RecipeError, match="bf16 needs opset: 22"):
            find_profile(str(tmp_path / "p.yaml"))


def test_profile__by_path(tmp_path: Path) -> None:
    text = (find_shared("export/profiles") / "cpu-fp32.yaml").read_text()
    (tmp_path / "mine.yaml").write_text(text.replace("opset: none", "opset: 21"))
    profile = find_profile(str(tmp_path / "mine.yaml"))
    assert (profile.name, profile.opset) == ("mine", 21)
    assert profile.tolerances == find_profile("cpu-fp32").tolerances


def test_profile__unknown_name_gets_the_close_ones() -> None:
    with pytest.raises(RecipeError, match=r"unknown profile 'cpu-fp23'.*cpu-fp32"):
        find_profile("cpu-fp23")


def test_profile__missing_file(tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match="no such profile file"):
        find_profile(str(tmp_path / "none.yaml"))


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("precison: fp32", "precison.*precision"),
        ("precision: fp64", "precision.*fp32"),
        ("tolerances: {max_relative: 0, min_cosine: 1, max_flipped: 0}", "tolerances.max_relative"),
        ("precision: [", "not valid YAML"),
    ],
)
def test_profile__malformed_names_the_file_and_the_key(tmp_path: Path, text: str, words: str) -> None:
    (tmp_path / "p.yaml").write_text(text)
    with pytest.raises(RecipeError, match=r"p\.yaml") as error:
        find_profile(str(tmp_path / "p.yaml"))
    assert error.match(words)
