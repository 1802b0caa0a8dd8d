"""FSDP2 through Accelerate: the weights of DDP and of one process, checkpoints for any number of processes.

Accelerate gives FSDP to GPUs alone. Here the job says that it has some while it computes on the CPU; all
else is Accelerate's own path.
"""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from tests.support import make_splits
from tests.support_processes import RanksFailed, run_ranks

SETTINGS = {
    "weights": "none", "image_size": 32, "precision": "fp32", "batch_size": 8, "workers": 0, "epochs": 2,
    "augment": {"crop": None, "flip": False}, "calibrate": False, "select": "last", "cache": "off",
    "optimizer": {"name": "sgd", "lr": 0.05, "warmup": 0.0},
}  # fmt: skip


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    # 27 of 8: an uneven last step
    return make_splits(
        tmp_path_factory.mktemp("data") / "d", {"cat": 11, "dog": 9, "emu": 7}, {"cat": 4, "dog": 4, "emu": 5}
    )


def finetune(data: Path, out: Path, shards: bool, settings: dict[str, object]) -> str:
    """On one rank of a job."""
    from accelerate import PartialState
    from accelerate.utils import DistributedType
    from torch.distributed.tensor import DTensor

    from tldist import api
    from tldist.training import fit

    seen: list[str] = []
    if shards:
        os.environ.update(ACCELERATE_USE_FSDP="true", FSDP_VERSION=str(settings.pop("version", 2)))
        PartialState(cpu=True)
        PartialState._shared_state["distributed_type"] = DistributedType.MULTI_GPU
        train = fit.train

        def noting(learner, *arguments):  # type: ignore[no-untyped-def]
            seen.extend(n for n, p in learner.model.named_parameters() if isinstance(p, DTensor))
            yield from train(learner, *arguments)

        fit.train = noting  # type: ignore[assignment]
    api.finetune(data=str(data), out=out, **{**SETTINGS, **settings})
    return ",".join(seen)


def weights(out: Path) -> dict[str, torch.Tensor]:
    return load_file(out / "bundle/model.safetensors")


CASES = {
    "a clipped gradient": {
        "model": "tests.nets:plain_cnn", "train": "last:2",
        "optimizer": {"name": "sgd", "lr": 0.05, "warmup": 0.0, "clip": 0.01},
    },
    "live BatchNorm": {"model": "tests.nets:recording_cnn", "train": "all"},
    "a transformer": {"model": "timm/vit_tiny_patch16_224", "train": "last:2", "image_size": None},
    "a cached prefix": {
        "model": "resnet18", "train": "last:1", "cache": "auto", "unfreeze": ("1:last:2",),
    },
    "accumulation, bf16": {"model": "tests.nets:plain_cnn", "gradient_accumulation": 2, "precision": "bf16"},
}  # fmt: skip


@pytest.mark.parametrize("case", CASES)
def test_fsdp__gives_the_weights_of_ddp(data: Path, tmp_path: Path, case: str) -> None:
    settings = {k: v for k, v in CASES[case].items() if v is not None}
    if "timm" in str(settings["model"]):
        pytest.importorskip("timm", reason="needs the extra timm")
        settings |= {"image_size": 224, "epochs": 1}
    if settings.get("cache") == "auto":
        settings["cache"] = {"folder": str(tmp_path / "cache")}
    sharded = run_ranks(finetune, 2, data, tmp_path / "fsdp", True, settings)
    run_ranks(finetune, 2, data, tmp_path / "ddp", False, settings)
    assert sharded[0], "weights were spread over the processes"
    ours, theirs = weights(tmp_path / "fsdp"), weights(tmp_path / "ddp")
    assert set(ours) == set(theirs)
    worst = max(float((ours[n].double() - theirs[n].double()).abs().max()) for n in ours)
    assert worst < (1e-5 if settings.get("precision") != "bf16" else 1e-3)
    found, expected = (json.loads((tmp_path / n / "summary.json").read_text()) for n in ("fsdp", "ddp"))
    assert found["validation"]["accuracy"] == expected["validation"]["accuracy"]
    assert found["frozen"]["equal"]


@pytest.mark.parametrize("name", ["sgd", "adamw"])
def test_fsdp__a_checkpoint_goes_on_with_another_number_of_processes(
    data: Path, tmp_path: Path, name: str
) -> None:
    settings = {
        "model": "tests.nets:plain_cnn", "train": "all", "checkpoint": {"every_steps": 1, "keep": 99},
        "optimizer": {"name": name, "lr": 0.01, "warmup": 0.0},
    }  # fmt: skip
    run_ranks(finetune, 1, data, tmp_path / "calm", False, settings)
    run_ranks(finetune, 2, data, tmp_path / "rough", True, settings)
    for step, (ranks, shards) in {5: (3, True), 3: (1, False)}.items():
        # As if it had been killed after that step.
        for path in (tmp_path / "rough/checkpoints").glob("step-*"):
            if int(path.name[5:]) > step:
                shutil.rmtree(path)
        shutil.rmtree(tmp_path / "rough/bundle")
        (tmp_path / "rough/summary.json").unlink()
        run_ranks(finetune, ranks, data, tmp_path / "rough", shards, settings)
        ours, theirs = weights(tmp_path / "rough"), weights(tmp_path / "calm")
        assert all(torch.allclose(ours[n], theirs[n], atol=1e-5) for n in theirs)


def test_fsdp__what_it_cannot_do_is_refused(data: Path, tmp_path: Path) -> None:
    settings = {"model": "tests.nets:plain_cnn", "ema": 0.9}
    with pytest.raises(RanksFailed, match="ema: not with FSDP, which spreads the weights"):
        run_ranks(finetune, 2, data, tmp_path / "a", True, settings)
    with pytest.raises(RanksFailed, match="Set fsdp_version: 2"):
        run_ranks(finetune, 2, data, tmp_path / "b", True, {"model": "resnet18", "version": 1})
    with pytest.raises(RanksFailed, match="and this job has one"):
        run_ranks(finetune, 1, data, tmp_path / "c", True, {"model": "resnet18"})
