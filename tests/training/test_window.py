"""The line that a training logs: mean loss and rate of the steps since the line before."""

from __future__ import annotations

import json
import time
from pathlib import Path

import numpy as np
import pytest
import torch

from tldist.data.order import StepPlan
from tldist.distributed import Team
from tldist.runs import RunFolder
from tldist.training.loop import Step
from tldist.training.track import Journal
from tldist.training.window import Window

ALONE = Team(0, 1, 1, torch.device("cpu"))


def step(number: int, images: int, loss: float) -> Step:
    plan = StepPlan(number, 0, images, np.arange(images))
    total = torch.tensor(loss * images, dtype=torch.float64)
    counts = torch.tensor([images, 0], dtype=torch.float64)
    return Step(plan, images * (number + 1), total, counts, 0.1)


def test_window__each_line_is_of_its_own_steps_and_time(tmp_path: Path) -> None:
    window = Window(Journal(RunFolder(tmp_path, "finetune"), [], {}, ALONE), ALONE, 2)
    seconds = []
    for number in range(6):
        begin = time.perf_counter()
        time.sleep(0.05)
        mean = window.add(step(number, 4 if number % 2 else 8, loss=float(number)), flush=False)
        assert (mean is None) == (number % 2 == 0)
        seconds.append(time.perf_counter() - begin)
    time.sleep(0.5)
    window.restart()  # what lay between was no training
    for number in (6, 7):
        begin = time.perf_counter()
        time.sleep(0.05)
        window.add(step(number, 6, loss=1.0), flush=False)
        seconds.append(time.perf_counter() - begin)
    lines = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == [2, 4, 6, 8]
    assert [line["loss"] for line in lines] == pytest.approx([4 / 12, (16 + 12) / 12, (32 + 20) / 12, 1.0])
    for line, first, second in zip(lines, seconds[::2], seconds[1::2]):
        assert line["images_per_second"] == pytest.approx(12 / (first + second), rel=0.2)
