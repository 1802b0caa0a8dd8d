"""Real processes, killed and started again in other numbers, and told to stop at awkward moments."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from tests.e2e.test_resume import IMAGES, domain
from tests.support_processes import start_ranks

BATCH, EPOCHS, EVERY = 8, 3, 2
PER_EPOCH = -(-IMAGES // BATCH)
STEPS = PER_EPOCH * EPOCHS


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = domain(tmp_path_factory.mktemp("data") / "d")
    for image in list(folder.glob("val/*/0.png")):
        for number in range(1, 71):  # several batches to measure
            image.with_name(f"{number}.png").symlink_to(image)
    return folder


def command(data: Path, out: Path, model: str, *settings: str) -> list[str]:
    return [
        sys.executable, "-m", "tldist", "finetune", f"data={data}", f"model=tests.nets:{model}",
        "weights=none", f"out={out}", f"epochs={EPOCHS}", f"batch_size={BATCH}", "precision=fp32",
        "image_size=40", "workers=0", f"checkpoint.every_steps={EVERY}", "optimizer.name=sgd",
        "optimizer.lr=0.05", "calibrate=false", "track=none", *settings,
    ]  # fmt: skip


def ended(processes: list[subprocess.Popen[str]]) -> list[str]:
    return [process.communicate(timeout=120)[0] for process in processes]


def kill(processes: list[subprocess.Popen[str]]) -> None:
    for process in processes:
        os.killpg(process.pid, signal.SIGKILL)
    ended(processes)


def wait_for(condition: Callable[[], bool], processes: list[subprocess.Popen[str]]) -> None:
    until = time.monotonic() + 100
    while not condition():
        assert all(process.poll() is None for process in processes), ended(processes)
        assert time.monotonic() < until
        time.sleep(0.001)


def steps_saved(out: Path) -> int:
    return max((int(path.name[5:]) for path in out.glob("checkpoints/step-*")), default=0)


def weights(out: Path) -> dict[str, torch.Tensor]:
    return load_file(out / "bundle/model.safetensors")


def test_two_one_two_processes__each_killed__every_sample_once_and_the_same_weights(
    data: Path, tmp_path: Path
) -> None:
    calm, rough = tmp_path / "calm", tmp_path / "rough"
    (text,) = ended(start_ranks(command(data, calm, "tracing_cnn"), 1))
    assert (calm / "bundle").is_dir(), text

    seen: dict[int, list[str]] = {}
    for attempt, ranks in enumerate((2, 1, 2)):
        trace = tmp_path / f"trace-{attempt}-{{rank}}"
        before = steps_saved(rough)
        processes = start_ranks(
            command(data, rough, "tracing_cnn"), ranks,
            TLDIST_TEST_TRACE=str(trace), TLDIST_TEST_STEP_SECONDS="0.03",
        )  # fmt: skip
        if attempt < 2:
            wait_for(lambda goal=before + 4 * EVERY: steps_saved(rough) >= goal, processes)  # type: ignore[misc]
            kill(processes)
            assert before < steps_saved(rough) < STEPS
        else:
            texts = ended(processes)
            assert all(process.returncode == 0 for process in processes), texts
        if before:
            assert before % EVERY == 0
        # What counts of this attempt: from where it began to what it saved.
        lines = [(tmp_path / f"trace-{attempt}-{rank}").read_text().splitlines() for rank in range(ranks)]
        for step in range(before, steps_saved(rough)):
            seen[step] = " ".join(part[step - before] for part in lines).split()

    assert sorted(seen) == list(range(STEPS))
    for epoch in range(EPOCHS):
        ids = [one for step in range(epoch * PER_EPOCH, (epoch + 1) * PER_EPOCH) for one in seen[step]]
        assert Counter(ids) == {str(number): 1 for number in range(IMAGES)}
    ours, theirs = weights(rough), weights(calm)
    for name, tensor in theirs.items():
        assert torch.allclose(ours[name], tensor, rtol=0, atol=1e-5), name


def test_signal_to_one_rank_while_all_measure__all_save_and_leave_with_75_and_go_on(
    data: Path, tmp_path: Path
) -> None:
    calm, rough, marker = tmp_path / "calm", tmp_path / "rough", tmp_path / "marker"
    ended(start_ranks(command(data, calm, "slow_cnn"), 2))
    processes = start_ranks(command(data, rough, "slow_cnn"), 2, TLDIST_TEST_MARKER=str(marker))
    wait_for(marker.exists, processes)
    processes[1].send_signal(signal.SIGUSR1)
    texts = ended(processes)
    assert [process.returncode for process in processes] == [75, 75], texts
    assert json.loads((rough / "summary.json").read_text())["status"] == "preempted"
    # The epoch's measurement was cut short: it is not in the numbers, and it is made up for.
    assert steps_saved(rough) == PER_EPOCH
    assert "val_accuracy" not in (rough / "metrics.jsonl").read_text()
    texts = ended(start_ranks(command(data, rough, "slow_cnn"), 2))
    assert re.search(rf"goes on after step {PER_EPOCH}\b", texts[0]), texts

    measured = [
        [
            line
            for line in map(json.loads, (out / "metrics.jsonl").read_text().splitlines())
            if "val_loss" in line
        ]
        for out in (rough, calm)
    ]
    assert measured[0] == measured[1]
    assert len(measured[0]) == EPOCHS
    ours, theirs = weights(rough), weights(calm)
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)


def test_ranks_with_other_settings_or_data__are_named_before_the_first_step(
    data: Path, tmp_path: Path
) -> None:
    processes = start_ranks([*command(data, tmp_path / "r", "plain_cnn")[:-1], "optimizer.lr=0.0{rank}1"], 1)
    ended(processes)  # a literal brace is no number: refused before anything starts
    assert processes[0].returncode == 2

    script = (
        "import os, sys; from tldist.cli import main; "
        "sys.argv[0] = 'tldist'; sys.argv.append('seed=' + os.environ['RANK']); sys.exit(main())"
    )
    processes = start_ranks(
        [sys.executable, "-c", script, *command(data, tmp_path / "s", "plain_cnn")[3:]], 2
    )
    texts = ended(processes)
    assert all(process.returncode == 2 for process in processes), texts
    assert "the recipe differs between processes: rank 1 on" in texts[0]
    assert not (tmp_path / "s").exists()
