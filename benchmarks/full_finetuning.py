"""Full fine-tuning against a bare PyTorch loop, both fed the same tensors from memory.

    python benchmarks/full_finetuning.py [--models resnet18,mobilenet_v3_small] [--rounds 5]

The bare loop does what training cannot do without: input, forward, loss, backward, SGD, in float32 and
channels_last. tldist's loop is the one that `tldist finetune` runs, with its schedule, counts, checks for
numbers that are not finite, and logging as often as in a run of a thousand steps (a line in five steps, to
metrics.jsonl and TensorBoard). The two take turns; ratios are of the same turn.
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch
from common import machine
from torch import nn

from tldist import distributed
from tldist.data.loader import Batch
from tldist.data.order import plan_steps
from tldist.models.load import input_tensor
from tldist.models.zoo import build_network, describe_network
from tldist.runs import RunFolder
from tldist.runtime.preprocess import Preprocessing
from tldist.training.loop import Learner, train
from tldist.training.objective import cross_entropy
from tldist.training.optim import build_optimizer, learning_rate
from tldist.training.signals import StopFlag
from tldist.training.track import Journal
from tldist.training.window import Window

SIZE, BATCH, STEPS, LOG_EVERY = 96, 32, 60, 5
HOW = Preprocessing(height=SIZE, width=SIZE, resize=SIZE)


def bare(name: str, images: torch.Tensor, labels: torch.Tensor) -> float:
    """Images a second of the bare loop."""
    model = network(name)
    model.train()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01, momentum=0.9, nesterov=True, weight_decay=1e-4)
    begin = time.perf_counter()
    for _ in range(STEPS):
        loss = nn.functional.cross_entropy(model(input_tensor(images, HOW, torch.channels_last)), labels)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
    return STEPS * BATCH / (time.perf_counter() - begin)


def ours(name: str, images: torch.Tensor, labels: torch.Tensor, folder: Path) -> float:
    """Images a second of tldist's loop."""
    team = distributed.start()
    model = network(name)
    optimizer = build_optimizer(model, name="sgd", lr=0.01, weight_decay=1e-4, momentum=0.9)
    accelerator = team.accelerator("fp32")
    wrapped, _ = accelerator.prepare(model, optimizer)
    total = STEPS * BATCH
    learner = Learner(
        model=model,
        wrapped=wrapped,
        optimizer=optimizer,
        bare_optimizer=optimizer,
        accelerator=accelerator,
        team=team,
        frozen=[],
        objective=cross_entropy(),
        to_input=lambda batch: input_tensor(batch, HOW, torch.channels_last),
        learning_rate=lambda samples: learning_rate(samples, total, 0.01, 0.1, "cosine"),
        seed=0,
    )
    plans = plan_steps(size=total, batch_size=BATCH, seed=0, epochs=1, first_step=0, rank=0, ranks=1)
    window = Window(Journal(RunFolder(folder, "finetune"), ["tensorboard"], {}, team), team, LOG_EVERY)

    def batches() -> Iterator[Batch]:
        for plan in plans:
            yield Batch(
                images, labels, torch.from_numpy(plan.indices), torch.ones(BATCH, dtype=torch.bool), [], plan
            )

    begin = time.perf_counter()
    for step in train(learner, batches(), 0, StopFlag()):
        window.add(step, flush=False)
    return total / (time.perf_counter() - begin)


def network(name: str) -> nn.Module:
    """The same weights for both."""
    torch.manual_seed(0)
    model = build_network(describe_network(name, 10), trust_code=False)
    return model.to(memory_format=torch.channels_last)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--models", default="resnet18,mobilenet_v3_small")
    parser.add_argument("--rounds", type=int, default=5)
    options = parser.parse_args()
    print(machine())
    random = np.random.default_rng(0)
    images = torch.from_numpy(random.integers(0, 255, (BATCH, SIZE, SIZE, 3), dtype=np.uint8))
    labels = torch.from_numpy(random.integers(0, 10, BATCH))
    for name in options.models.split(","):
        ratios, rates = [], []
        with tempfile.TemporaryDirectory() as folder:
            ours(name, images, labels, Path(folder))  # warm
            for turn in range(options.rounds):
                first = bare(name, images, labels) if turn % 2 else 0.0
                mine = ours(name, images, labels, Path(folder))
                theirs = first or bare(name, images, labels)
                rates.append((theirs, mine))
                ratios.append(mine / theirs)
        theirs, mine = (statistics.median(column) for column in zip(*rates))
        spread = f"median of {len(ratios)}, {min(ratios):.3f} to {max(ratios):.3f}"
        print(
            f"{name}: bare loop {theirs:.1f} img/s, tldist {mine:.1f} img/s, ratio "
            f"{statistics.median(ratios):.3f} ({spread})",
            flush=True,
        )


if __name__ == "__main__":
    main()
