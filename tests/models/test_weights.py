"""Weights by name, from files, from a hub; and timm's models."""

from __future__ import annotations

import hashlib
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
import torch
import torchvision
from safetensors.torch import save, save_file

from tldist.errors import BundleError, ModelError
from tldist.models.heads import find_head
from tldist.models.load import start_model
from tldist.models.weights import find_weights, read_tensors


@pytest.fixture(scope="module")
def squeezenet() -> dict[str, torch.Tensor]:
    torch.manual_seed(0)
    return dict(torchvision.models.squeezenet1_1(num_classes=5).state_dict())


@pytest.mark.parametrize("suffix", [".safetensors", ".pth"])
def test_file__starts_the_backbone_and_not_the_head(
    tmp_path: Path, squeezenet: dict[str, torch.Tensor], suffix: str
) -> None:
    file = tmp_path / f"w{suffix}"
    if suffix == ".pth":
        torch.save({"state_dict": {f"module.{name}": t for name, t in squeezenet.items()}}, file)
    else:
        save_file(squeezenet, file)
    start = start_model("squeezenet1_1", str(file), ("a", "b"))
    state = start.model.state_dict()
    assert torch.equal(state["features.0.weight"], squeezenet["features.0.weight"])
    assert state["classifier.1.weight"].shape[0] == 2
    assert start.known_rows == 0


def test_file__that_is_more_than_weights_is_not_run(tmp_path: Path) -> None:
    marker = tmp_path / "ran"

    class Evil:
        def __reduce__(self):  # type: ignore[no-untyped-def]
            return (Path.touch, (marker,))

    torch.save({"w": Evil()}, tmp_path / "evil.pth")
    with pytest.raises(BundleError, match="without running code"):
        read_tensors(tmp_path / "evil.pth")
    assert not marker.exists()


class _Hub(BaseHTTPRequestHandler):
    """Answers as a model hub does: /OWNER/REPOSITORY/resolve/REVISION/FILE."""

    content = b""
    asked: list[str]

    def _head(self) -> bool:
        type(self).asked.append(self.path)
        if not self.path.startswith("/someone/squeeze/resolve/"):
            self.send_response(404)
            self.send_header("X-Error-Code", "RepoNotFound")
            self.end_headers()
            return False
        self.send_response(200)
        self.send_header("X-Repo-Commit", "a" * 40)
        self.send_header("ETag", f'"{hashlib.sha256(self.content).hexdigest()}"')
        self.send_header("Content-Length", str(len(self.content)))
        self.end_headers()
        return True

    def do_HEAD(self) -> None:
        self._head()

    def do_GET(self) -> None:
        if self._head():
            self.wfile.write(self.content)

    def log_message(self, *_: object) -> None:
        return None


@pytest.fixture
def hub(
    squeezenet: dict[str, torch.Tensor], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> Iterator[type[_Hub]]:
    _Hub.content, _Hub.asked = save(squeezenet), []
    server = ThreadingHTTPServer(("127.0.0.1", 0), _Hub)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    import huggingface_hub.constants as constants

    endpoint = f"http://127.0.0.1:{server.server_port}"
    monkeypatch.setattr(constants, "ENDPOINT", endpoint)
    monkeypatch.setattr(
        constants, "HUGGINGFACE_CO_URL_TEMPLATE", endpoint + "/{repo_id}/resolve/{revision}/{filename}"
    )
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    yield _Hub
    server.shutdown()


def test_hub__file_of_a_revision(hub: type[_Hub], squeezenet: dict[str, torch.Tensor]) -> None:
    found = find_weights("squeezenet1_1", "hf://someone/squeeze@v2/weights/one.safetensors")
    assert found is not None
    assert torch.equal(found.tensors["features.0.weight"], squeezenet["features.0.weight"])
    assert "/someone/squeeze/resolve/v2/weights/one.safetensors" in hub.asked


def test_hub__what_is_not_there_is_named(hub: type[_Hub]) -> None:
    with pytest.raises(ModelError, match="hf://someone/else: cannot be fetched"):
        find_weights("squeezenet1_1", "hf://someone/else")
    with pytest.raises(ModelError, match="expected hf://OWNER/REPOSITORY"):
        find_weights("squeezenet1_1", "hf://someone")


@pytest.mark.parametrize("name", ["timm/resnet10t", "timm/vit_tiny_patch16_224", "timm/convnext_atto"])
def test_timm__models_have_head_blocks_and_preprocessing(name: str) -> None:
    timm = pytest.importorskip("timm", reason="the extra timm is not installed")
    from tldist.models.blocks import cut_blocks

    torch.manual_seed(0)
    start = start_model(name, "none", ("a", "b", "c"))
    config = timm.data.resolve_model_data_config(start.model)
    assert find_head(start.model)[1].out_features == 3
    assert (start.config.preprocessing.height, start.config.preprocessing.mean) == (
        config["input_size"][1],
        tuple(config["mean"]),
    )
    blocks = cut_blocks(start.model)
    assert len(blocks) >= 5
    for parameter, _ in start.model.named_parameters():
        assert sum(block.owns(parameter) for block in blocks) == 1, parameter


def test_timm__unknown_name_gets_close_matches() -> None:
    pytest.importorskip("timm", reason="the extra timm is not installed")
    with pytest.raises(ModelError, match=r"unknown model 'timm/resnet5o'.*resnet50"):
        start_model("timm/resnet5o", "none", ("a", "b"))
