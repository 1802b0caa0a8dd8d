"""Every torchvision classifier through the general mechanism, with real numbers: ``docs/zoo.md``.

    python benchmarks/zoo_table.py [--pattern resnet*] [--out docs/zoo.md]

For each: head, blocks and feature width as `tldist layers` finds them; whether the model cut before its last
two blocks computes bitwise what the whole computes; and whether one step of training changes just what should
learn. Random weights, the smallest input that the network takes, a few minutes for all.
"""

from __future__ import annotations

import argparse
import fnmatch
import gc
import time
from pathlib import Path

import torch
from common import machine
from torch import nn

from tldist.models.blocks import cut_blocks, freeze, trainable_blocks, training_mode
from tldist.models.heads import find_head, head_width
from tldist.models.split import split_model
from tldist.models.zoo import build_network, describe_network, list_architectures

SIZES = {"inception_v3": 299, "maxvit_t": 224, "alexnet": 96, "squeezenet1_0": 96, "squeezenet1_1": 96}


def row(name: str) -> str:
    """One line of the table."""
    begin = time.perf_counter()
    size = 224 if name.startswith("vit_") else SIZES.get(name, 64)
    torch.manual_seed(0)
    model = build_network(describe_network(name, 3), trust_code=False)
    path, head = find_head(model)
    blocks = cut_blocks(model)
    learning = trainable_blocks(model, blocks, "last:2")
    training_mode(model, freeze(model, learning))
    prefix, suffix = split_model(model, blocks, learning)
    images = torch.randn(2, 3, size, size)
    before = {n: t.clone() for n, t in model.state_dict().items()}

    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1)
    with torch.no_grad():
        features = prefix.eval()(images)
    training_mode(model, freeze(model, learning))
    nn.functional.cross_entropy(suffix(features), torch.tensor([0, 1])).backward()
    optimizer.step()
    after = model.state_dict()
    changed = {n for n in before if not torch.equal(before[n], after[n])}
    only = all(any(block.owns(n) for block in learning) for n in changed)
    model.eval()
    with torch.no_grad():
        exact = torch.equal(suffix(prefix(images)), model(images))
    cells = (
        name,
        f"{sum(p.numel() for p in model.parameters()) / 1e6:.1f} M",
        f"`{path}`",
        str(head_width(head)),
        str(len(blocks)),
        "yes" if exact else "NO",
        "yes" if changed and only else "NO",
        f"{time.perf_counter() - begin:.1f}",
    )
    return f"| {' | '.join(cells)} |"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--pattern", default="*")
    parser.add_argument("--out", type=Path, default=Path("docs/zoo.md"))
    options = parser.parse_args()
    names = [name for name in list_architectures() if fnmatch.fnmatchcase(name, options.pattern)]
    rows = []
    for name in names:
        rows.append(row(name))
        print(rows[-1], flush=True)
        gc.collect()
    head = (
        "# Every torchvision classifier\n\n"
        f"Made by `make table` ({machine()}). *Cut exact*: the model cut before its last two blocks computes "
        "bitwise what the whole computes. *Learns alone*: one step of training changes the last two blocks "
        "and the head, and nothing else. Parameters are with three classes.\n\n"
        "| model | parameters | head | width | blocks | cut exact | learns alone | s |\n"
        "| --- | --- | --- | --- | --- | --- | --- | --- |\n"
    )
    options.out.write_text(head + "\n".join(rows) + "\n", encoding="utf-8")
    if any("NO" in line for line in rows):
        raise SystemExit("some models fail: see NO in the table")


if __name__ == "__main__":
    main()
