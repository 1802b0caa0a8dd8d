"""Merging from file to file: as in memory at once, in any number of pieces, shards and processes."""

from __future__ import annotations

import json
import threading
import tracemalloc
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from tldist.errors import BundleError, ModelError
from tldist.fuse.weights import stream
from tldist.fuse.weights.files import Reader, open_weights, read_header
from tldist.fuse.weights.method import Piece, Settings
from tldist.fuse.weights.methods import METHODS
from tldist.fuse.weights.rows import plan_rows
from tldist.fuse.weights.stream import write_merged
from tldist.fuse.weights.targets import Fusion, plan_targets, share_out

SHAPES = {"a.weight": (37, 53), "d.weight": (29, 71), "b.weight": (8, 3, 3, 3), "b.bias": (8,), "scale": ()}
PLAIN = [name for name, method in METHODS.items() if method.aid is None]
Tensors = dict[str, np.ndarray]


def make(
    file: Path, seed: int, dtype: type = np.float32, shapes: dict[str, tuple[int, ...]] = SHAPES
) -> Path:
    rng = np.random.default_rng(seed)
    save_file({n: np.asarray(rng.standard_normal(s)).astype(dtype) for n, s in shapes.items()}, file)
    return file


def merge(out: Path, fusion: Fusion, **options: object) -> Tensors:
    out.mkdir()
    write_merged(fusion, out, **options)  # type: ignore[arg-type]
    return {name: t for file in out.glob("*.safetensors") for name, t in load_file(file).items()}


def in_memory(name: str, files: list[Path], base: Path, settings: Settings) -> Tensors:
    tensors, ancestor = [load_file(file) for file in files], load_file(base)
    return {
        key: METHODS[name].apply(Piece(key, [t[key] for t in tensors], ancestor[key]), settings)
        for key in ancestor
    }


@pytest.mark.parametrize("threads", [1, 3])
@pytest.mark.parametrize("name", PLAIN)
def test_stream__piece_by_piece_as_at_once(
    tmp_path: Path, name: str, threads: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(stream, "_PIECE", 256)
    count = METHODS[name].models[1] or 3
    files = [make(tmp_path / f"m{n}.safetensors", n) for n in range(count)]
    base = make(tmp_path / "base.safetensors", 9)
    settings = Settings((1.0, 2.0, 3.0)[:count], alpha=0.3, scale=0.7, density=0.4, gamma=0.05, seed=5)
    fusion = Fusion([open_weights(f) for f in files], open_weights(base), METHODS[name], settings)
    found = merge(tmp_path / "out", fusion, threads=threads)
    expected = in_memory(name, files, base, settings)
    assert found.keys() == expected.keys()
    for key, tensor in expected.items():
        np.testing.assert_array_equal(found[key], tensor, err_msg=key)


@pytest.mark.parametrize("shard_bytes", [None, 1, 9000, 10**9])
def test_stream__sharded_output_is_read_back_as_input(tmp_path: Path, shard_bytes: int | None) -> None:
    files = [make(tmp_path / f"m{n}.safetensors", n) for n in range(2)]
    fusion = Fusion([open_weights(f) for f in files], None, METHODS["average"], Settings((1.0, 1.0)))
    found = merge(tmp_path / "out", fusion, shard_bytes=shard_bytes, metadata={"format": "pt"})
    shards = sorted(file.name for file in (tmp_path / "out").glob("*.safetensors"))
    assert len(shards) == {None: 1, 1: len(SHAPES), 9000: 2, 10**9: 1}[shard_bytes]
    if len(shards) > 1:
        index = json.loads((tmp_path / "out" / "model.safetensors.index.json").read_text())
        assert sorted(set(index["weight_map"].values())) == shards
        assert index["metadata"]["total_size"] == sum(t.nbytes for t in found.values())
    again = Fusion([open_weights(tmp_path / "out")] * 2, None, METHODS["average"], Settings((1.0, 1.0)))
    for key, tensor in merge(tmp_path / "again", again).items():
        np.testing.assert_array_equal(tensor, found[key])


@pytest.mark.parametrize("dtype", [np.float16, ml_dtypes.bfloat16, np.float64, ml_dtypes.float8_e4m3fn])
def test_stream__numbers_of_other_types_are_merged_wide_and_rounded_once(tmp_path: Path, dtype: type) -> None:
    files = [make(tmp_path / f"m{n}.safetensors", n, dtype) for n in range(3)]
    fusion = Fusion([open_weights(f) for f in files], None, METHODS["average"], Settings((1.0, 1.0, 2.0)))
    out = tmp_path / "out"
    out.mkdir()
    write_merged(fusion, out)
    with Reader() as reader:
        merged, sources = open_weights(out), [open_weights(file) for file in files]
        for weights in (merged, *sources):
            reader.open(weights)
        for key, entry in merged.entries.items():
            wide = [reader.read(s.entries[key]).astype(np.float64) for s in sources]
            found = reader.read(entry)
            assert found.dtype == dtype
            expected = (wide[0] + wide[1] + 2 * wide[2]) / 4
            bits = (
                np.finfo(dtype).nmant if dtype in (np.float16, np.float64) else ml_dtypes.finfo(dtype).nmant
            )
            np.testing.assert_allclose(
                found.astype(float), expected, rtol=2.0 ** -min(bits, 22), atol=2.0**-9 if bits < 5 else 1e-6
            )


def test_stream__mixed_types_become_the_widest(tmp_path: Path) -> None:
    files = [make(tmp_path / "a.safetensors", 0, np.float32), make(tmp_path / "b.safetensors", 1, np.float16)]
    fusion = Fusion([open_weights(f) for f in files], None, METHODS["average"], Settings((1.0, 1.0)))
    found, tensors = merge(tmp_path / "out", fusion), [load_file(f) for f in files]
    for key, tensor in found.items():
        assert tensor.dtype == np.float32
        mean = (tensors[0][key] + tensors[1][key].astype(float)) / 2
        np.testing.assert_allclose(tensor, mean, rtol=1e-6, atol=2e-7)


def test_stream__statistics_counters_and_constants(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    models = [
        {
            "bn.running_mean": np.float32(rng.standard_normal(7) * 10),
            "bn.running_var": np.float32(rng.random(7) * 1e-3),
            "bn.num_batches_tracked": np.int64(7 * n),
            "index": np.arange(5),
            "odd": np.ones(3, np.float32),
        }
        for n in range(1, 3)
    ]
    for number, tensors in enumerate(models):
        save_file({k: np.asarray(v) for k, v in tensors.items()}, tmp_path / f"{number}.safetensors")
    weights = [open_weights(tmp_path / f"{n}.safetensors") for n in range(2)]
    found = merge(tmp_path / "o", Fusion(weights, None, METHODS["average"], Settings((1.0, 3.0))))
    means = np.stack([m["bn.running_mean"] for m in models]).astype(float)
    variances = np.stack([m["bn.running_var"] for m in models]).astype(float)
    shares = np.array([[0.25], [0.75]])
    mean = (shares * means).sum(0)
    np.testing.assert_allclose(found["bn.running_mean"], mean, rtol=1e-6)
    expected = (shares * (variances + means**2)).sum(0) - mean**2
    np.testing.assert_allclose(found["bn.running_var"], expected, rtol=1e-5)
    assert found["bn.num_batches_tracked"] == 14
    for entry in read_header(tmp_path / "o" / "model.safetensors").values():
        assert entry.offset % entry.itemsize == 0, entry.name
    assert found["index"].tolist() == list(range(5))


def test_stream__processes_share_the_tensors(tmp_path: Path) -> None:
    """Three at once on one folder: what one process writes alone."""
    files = [make(tmp_path / f"m{n}.safetensors", n) for n in range(2)]
    fusion = Fusion([open_weights(f) for f in files], None, METHODS["average"], Settings((1.0, 1.0)))
    alone = merge(tmp_path / "alone", fusion)
    (tmp_path / "shared").mkdir()
    barrier, failures = threading.Barrier(3), []

    def work(rank: int) -> None:
        try:
            write_merged(fusion, tmp_path / "shared", rank=rank, size=3, together=barrier.wait, threads=1)
        except BaseException as error:
            failures.append(error)
            barrier.abort()

    workers = [threading.Thread(target=work, args=(rank,)) for rank in range(3)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    assert not failures
    found = load_file(tmp_path / "shared" / "model.safetensors")
    assert all(np.array_equal(found[key], tensor) for key, tensor in alone.items())
    targets = plan_targets(fusion)
    shares = [share_out(targets, rank, 3) for rank in range(3)]
    assert sorted(t.slot.name for share in shares for t in share) == sorted(SHAPES)
    assert all(shares)


def test_stream__memory_does_not_grow_with_the_model(tmp_path: Path) -> None:
    """At most the whole tensors of all models, however many tensors there are."""
    largest = 600 * 600 * 4
    peaks = {}
    for tensors in (2, 12):
        shapes = {f"t{n}.weight": (600, 600) for n in range(tensors)}
        files = [make(tmp_path / f"{tensors}-{n}.safetensors", n, shapes=shapes) for n in range(4)]
        models = [open_weights(f) for f in files]
        for name in ("average", "ties"):
            fusion = Fusion(models[1:], models[0], METHODS[name], Settings((1.0,) * 3, density=0.2))
            out = tmp_path / f"{name}-{tensors}"
            out.mkdir()
            tracemalloc.start()
            write_merged(fusion, out, threads=1)
            peaks[name, tensors] = tracemalloc.get_traced_memory()[1]
            tracemalloc.stop()
    for name in ("average", "ties"):
        assert peaks[name, 12] < peaks[name, 2] + largest / 4
        assert peaks[name, 12] < 6 * largest + 12 * (1 << 20)


# -- heads of different classes ----------------------------------------------------------------------------


def test_rows__are_merged_by_class_name(tmp_path: Path) -> None:
    known = [("a", "b", "c"), ("d", "b", "a"), ("b", "e")]
    base = ("x", "b")
    rng = np.random.default_rng(1)
    heads = [np.float32(rng.standard_normal((len(names), 4))) for names in (*known, base)]
    for number, head in enumerate(heads):
        save_file({"fc.weight": head}, tmp_path / f"{number}.safetensors")
    weights = [open_weights(tmp_path / f"{n}.safetensors") for n in range(4)]
    classes = ("a", "b", "c", "d", "e")
    told = Settings((1.0, 2.0, 3.0), scale=0.5)
    rows = {"fc.weight": plan_rows(classes, known, base)}
    method = METHODS["task_arithmetic"]
    found = merge(tmp_path / "o", Fusion(weights[:3], weights[3], method, told, rows))["fc.weight"]

    def row(model: int, name: str) -> np.ndarray:
        names = base if model == 3 else known[model]
        return heads[model][names.index(name)].astype(float)

    expected = {
        "a": (row(0, "a") + 2 * row(1, "a")) / 3,  # the base does not know it: the average of those that do
        "b": row(3, "b") + 0.5 * sum(w * (row(n, "b") - row(3, "b")) for n, w in enumerate((1, 2, 3))),
        "c": row(0, "c"),
        "d": row(1, "d"),
        "e": row(2, "e"),
    }
    for place, name in enumerate(classes):
        np.testing.assert_allclose(found[place], expected[name], rtol=1e-5, atol=1e-6, err_msg=name)


# -- refusals ----------------------------------------------------------------------------------------------


def test_stream__models_that_do_not_fit(tmp_path: Path) -> None:
    one, two = make(tmp_path / "1.safetensors", 0), tmp_path / "2.safetensors"
    for changed, reason in (
        ({**SHAPES, "more": (2,)}, "do not hold the same tensors: more and 0 more"),
        ({**SHAPES, "b.bias": (9,)}, r"'b.bias' has different shapes: \[8\], \[9\]"),
    ):
        make(two, 1, shapes=changed)
        weights = [open_weights(one), open_weights(two)]
        with pytest.raises(BundleError, match=reason):
            plan_targets(Fusion(weights, None, METHODS["average"], Settings((1.0, 1.0))))


@pytest.mark.parametrize("value", [np.nan, np.inf])
@pytest.mark.parametrize("name", ["average", "slerp"])
def test_stream__a_result_that_is_not_finite_is_refused(tmp_path: Path, name: str, value: float) -> None:
    make(tmp_path / "1.safetensors", 0)
    tensors = load_file(make(tmp_path / "2.safetensors", 1))
    tensors["a.weight"][3, 4] = value
    save_file(tensors, tmp_path / "2.safetensors")
    weights = [open_weights(tmp_path / f"{n}.safetensors") for n in (1, 2)]
    (tmp_path / "o").mkdir()
    with pytest.raises(ModelError, match=r"a\.weight holds NaN or infinity"):
        write_merged(Fusion(weights, None, METHODS[name], Settings((1.0, 1.0))), tmp_path / "o")


def test_files__hostile_and_damaged_ones(tmp_path: Path) -> None:
    file = make(tmp_path / "model.safetensors", 0)
    whole = file.read_bytes()
    file.write_bytes(whole[:-5])
    with pytest.raises(BundleError, match="damaged or truncated"):
        read_header(file)
    file.write_bytes(b"\xff" * 64)
    with pytest.raises(BundleError, match="damaged or truncated"):
        open_weights(tmp_path)
    file.write_bytes(whole)
    index = tmp_path / "model.safetensors.index.json"
    for table, reason in (
        ({"weight_map": {"a.weight": "../model.safetensors"}}, "points outside"),
        ({"weight_map": {"nothing": "model.safetensors"}}, "'nothing' is not in the file"),
        ({"weight_map": {"a.weight": "other.safetensors"}}, "missing"),
        ({"weight_map": ["a"]}, "expected a weight_map"),
        ([], "expected a weight_map"),
    ):
        index.write_text(json.dumps(table))
        with pytest.raises(BundleError, match=reason):
            open_weights(tmp_path)
    with pytest.raises(BundleError, match="no such file or folder"):
        open_weights(tmp_path / "nowhere")
    index.unlink()
    (tmp_path / "model.safetensors").rename(tmp_path / "one.safetensors")
    assert open_weights(tmp_path).entries.keys() == SHAPES.keys()
    make(tmp_path / "two.safetensors", 1)
    with pytest.raises(BundleError, match=r"found one\.safetensors, two\.safetensors"):
        open_weights(tmp_path)
