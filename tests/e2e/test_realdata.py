"""The whole chain on real photos with real pre-trained weights."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch

from tests.support import run_tldist
from tldist.models.load import start_model
from tldist.models.weights import Weights, load_into, read_tensors
from tldist.models.zoo import build_network, describe_network

pytestmark = pytest.mark.realdata


def verdict(*arguments: str | Path) -> dict:  # type: ignore[type-arg]
    done = run_tldist(*arguments, "--json")
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


def test_weights__give_the_output_published_with_them(real_data: Path) -> None:
    """Logits that somebody else computed, for an input in 0..255 without normalisation."""
    model = build_network(describe_network("squeezenet1_1", 1000), trust_code=False).eval()
    load_into(model, Weights("file", read_tensors(real_data / "models" / "squeezenet1_1.safetensors")))
    reference = np.load(real_data / "models" / "squeezenet1_1_reference.npz", allow_pickle=False)
    with torch.no_grad():
        logits = model(torch.from_numpy(reference["input"])).numpy()
    np.testing.assert_allclose(logits, reference["output"], atol=1e-3 * np.abs(reference["output"]).max())


def test_weights__of_another_head_start_the_backbone(real_data: Path) -> None:
    file = real_data / "models" / "mobilenet_v2.safetensors"
    start = start_model("mobilenet_v2", str(file), ("a", "b"))
    state, given = start.model.state_dict(), read_tensors(file)
    assert all(torch.equal(state[n], given[n]) for n in given if not n.startswith("classifier"))


def test_chain__photos_to_a_checked_package(real_data: Path, tmp_path: Path) -> None:
    """A linear probe reaches what a logistic regression on these features does (0.84 to 0.86), or about."""
    photos, run, package = real_data / "photos", tmp_path / "run", tmp_path / "package"
    tuned = verdict(
        "finetune", f"data={photos}", "model=squeezenet1_1", f"out={run}", "train=head", "epochs=30",
        f"weights={real_data / 'models' / 'squeezenet1_1.safetensors'}", f"cache.folder={tmp_path / 'c'}",
        "augment.crop=none", "augment.flip=false", "precision=fp32", "optimizer.lr=3e-3",
    )  # fmt: skip
    assert tuned["accuracy"] >= 0.75
    exported = verdict("export", run, f"data={photos}", "profile=cpu-fp32", f"out={package}", "output=both")
    assert exported["status"] == "done"
    assert verdict("parity", package)["status"] == "done"
    found = [verdict("evaluate", model, f"data={photos}") for model in (run, package)]
    assert found[0]["accuracy"] == found[1]["accuracy"] == pytest.approx(tuned["accuracy"])
    assert found[0]["loss"] == pytest.approx(found[1]["loss"], rel=1e-4)
    verdict("embed", package, f"data={photos}", f"out={tmp_path / 'v'}")
    assert verdict("embed", f"out={tmp_path / 'v'}", "verify=true")["status"] == "done"
