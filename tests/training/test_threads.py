"""How cores and memory are used where there is no GPU."""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

from tests.support import make_images, run_python
from tldist import api
from tldist.domain import open_domain
from tldist.domain.recipe import DataRecipe
from tldist.training.threads import (
    count_operations,
    mean_image_bytes,
    own_threads,
    threads_for_training,
)

PHOTO, DIGIT = 300_000, 600
SMALL, LARGE = 0.35e9, 25e9  # a step of mobilenet_v3_small and of resnet50, an image of 224 pixels


def test_threads__large_files_and_a_small_network_leave_cores_to_decoding() -> None:
    assert threads_for_training(2, 1, PHOTO, SMALL) == 1
    assert threads_for_training(2, 1, DIGIT, SMALL) == 2
    assert threads_for_training(2, 1, PHOTO, LARGE) == 2
    assert threads_for_training(16, 8, PHOTO, SMALL) == 9
    assert threads_for_training(16, 8, PHOTO, LARGE) == 16
    assert threads_for_training(1, 1, PHOTO, SMALL) == 1


def test_threads__are_never_none_nor_more_than_there_are() -> None:
    for cores in (1, 2, 7, 64):
        for workers in (0, 1, 8):
            for size in (0, 1e3, 1e7):
                for operations in (0, 1e6, 1e12):
                    assert 1 <= threads_for_training(cores, workers, size, operations) <= cores


def test_operations__of_layers_by_their_formulas() -> None:
    model = nn.Sequential(nn.Conv2d(3, 8, 3, padding=1), nn.ReLU(), nn.Flatten(), nn.Linear(8 * 36, 5))
    forward = 2 * (3 * 9) * 8 * 36 + 2 * 8 * 36 * 5
    assert count_operations(model, torch.zeros(1, 3, 6, 6)) == 3 * forward


def test_image_bytes__are_those_of_the_files(tmp_path: Path) -> None:
    folder = make_images(tmp_path / "d", {"a": 5, "b": 4})
    (folder / "a" / "zz.png").write_bytes(b"broken")
    expected = np.mean([path.stat().st_size for path in folder.rglob("*.png")])
    domain = open_domain(DataRecipe.make(path=str(folder)))
    assert mean_image_bytes(domain) == pytest.approx(expected)


def test_own_threads__are_put_back() -> None:
    before = torch.get_num_threads()
    with own_threads():
        torch.set_num_threads(before + 1)
    assert torch.get_num_threads() == before


def test_finetune__leaves_the_callers_threads_alone(tmp_path: Path) -> None:
    data = make_images(tmp_path / "d", {"a": 6, "b": 6})
    before = torch.get_num_threads()
    api.finetune(
        data=str(data), model="tests.nets:plain_cnn", weights="none", out=tmp_path / "r", epochs=1,
        image_size=32, workers=1, precision="fp32", track=None,
    )  # fmt: skip
    assert torch.get_num_threads() == before


@pytest.mark.skipif(sys.platform != "linux", reason="the C library of Linux")
def test_memory__that_is_freed_stays_with_the_process() -> None:
    """Pages that the kernel has to give anew for each large tensor, counted by the kernel."""
    script = """
import resource, sys, torch
from tldist import distributed
if sys.argv[1] == "kept":
    distributed.start()
torch.ones(20_000_000)
before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
for _ in range(40):
    torch.ones(20_000_000)
print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
"""
    plain, kept = (int(run_python(script, how).stdout.split()[-1]) for how in ("plain", "kept"))
    assert plain > 600_000  # 80 MB in pages of 4 KiB, forty times
    assert kept < plain / 4  # the heap may have to grow a few times
