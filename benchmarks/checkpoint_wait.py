"""What a step waits for a checkpoint: tldist's save beside the loop, against `accelerator.save_state`.

    python benchmarks/checkpoint_wait.py [--models resnet50,vit_b_32] [--rounds 5]

Both save model and AdamW state of the whole network. *Wait*: seconds in which the loop stands still, before
the next forward pass and before the next change of the weights; a forward and backward pass of eight images
of 224 pixels lies between them. *Step*: what that pass takes, without a save and beside one. *On disk*: until
tldist's files are whole, synced and renamed. The two take turns.
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
import time
from pathlib import Path

import torch
from common import machine

from tldist import distributed
from tldist.models.zoo import build_network, describe_network
from tldist.training.checkpoint import Position
from tldist.training.optim import build_optimizer
from tldist.training.saver import Saver


def step(model: torch.nn.Module, images: torch.Tensor) -> float:
    """Seconds of a forward and backward pass."""
    begin = time.perf_counter()
    model(images).square().mean().backward()
    return time.perf_counter() - begin


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--models", default="resnet50,vit_b_32")
    parser.add_argument("--rounds", type=int, default=5)
    options = parser.parse_args()
    print(machine())
    team = distributed.start()
    for name in options.models.split(","):
        torch.manual_seed(0)
        model = build_network(describe_network(name, 10), trust_code=False)
        optimizer = build_optimizer(model, name="adamw", lr=1e-3, weight_decay=0.05, momentum=0.9)
        accelerator = team.accelerator("fp32")
        model, _ = accelerator.prepare(model, optimizer)
        for parameter in model.parameters():
            parameter.grad = torch.randn_like(parameter)
        optimizer.step()
        waits, blocked, written, steps = [], [], [], []
        images = torch.randn(8, 3, 224, 224)
        with tempfile.TemporaryDirectory() as folder:
            saver = Saver(Path(folder) / "tldist", keep=1, frozen=(), team=team)
            (Path(folder) / "tldist").mkdir()
            for turn in range(options.rounds + 1):
                begin = time.perf_counter()
                accelerator.save_state(f"{folder}/accelerate")
                middle = time.perf_counter()
                alone = step(model, images)
                start = time.perf_counter()
                saver.save(model, optimizer, None, Position(step=turn + 1))
                saved = time.perf_counter()
                beside = step(model, images)
                again = time.perf_counter()
                saver.settle()
                settled = time.perf_counter()
                saver.wait()
                if turn:  # the first save takes fresh memory
                    blocked.append(middle - begin)
                    waits.append(saved - start + settled - again)
                    written.append(time.perf_counter() - start)
                    steps.append((alone, beside))
        ratio = statistics.median(wait / block for wait, block in zip(waits, blocked))
        print(
            f"{name}: save_state {statistics.median(blocked):.3f} s, tldist waits "
            f"{statistics.median(waits):.3f} s, on disk after {statistics.median(written):.2f} s, "
            f"wait / save_state {ratio:.3f}, step {statistics.median(a for a, _ in steps):.2f} s alone, "
            f"{statistics.median(b for _, b in steps):.2f} s beside a save",
            flush=True,
        )


if __name__ == "__main__":
    main()
