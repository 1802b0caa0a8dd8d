"""One process, two processes and a plain float64 loop give the same weights, order and metrics."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from tests.support import make_images
from tests.support_processes import run_ranks
from tldist.data.order import epoch_order, seed_of
from tldist.domain import open_domain
from tldist.finetune.recipe import FinetuneRecipe
from tldist.finetune.run import run
from tldist.models.blocks import cut_blocks, freeze, trainable_blocks, training_mode
from tldist.models.load import start_model
from tldist.runtime.preprocess import prepare

BATCH, EPOCHS, LR, MOMENTUM, DECAY, WARMUP = 8, 2, 0.1, 0.9, 1e-3, 0.1
CASES = {"plain": ("tests.nets:plain_cnn", "all"), "frozen_batchnorm": ("resnet18", "head")}


def recipe(data: Path, case: str, out: Path, pieces: int = 1) -> FinetuneRecipe:
    model, train = CASES[case]
    return FinetuneRecipe.make(
        data={"path": str(data)},
        model=model,
        weights="none",
        train=train,
        out=out,
        epochs=EPOCHS,
        batch_size=BATCH,
        gradient_accumulation=pieces,
        precision="fp32",
        image_size=32,
        select="last",
        optimizer={"name": "sgd", "lr": LR, "momentum": MOMENTUM, "weight_decay": DECAY, "warmup": WARMUP},
        augment={"crop": None, "flip": False},
        workers=0,
    )


def train_in_float64(data: Path, case: str) -> dict[str, torch.Tensor]:
    """The same training as a plain loop in float64, written from the definitions."""
    name, train = CASES[case]
    learned = open_domain(data).split("train")
    torch.manual_seed(seed_of("init", 0))
    start = start_model(name, "none", learned.classes, image_size=32)
    model, how = start.model.double(), start.config.preprocessing
    frozen = freeze(model, trainable_blocks(model, cut_blocks(model), train))
    images = torch.stack([torch.from_numpy(prepare(learned.read(i), how)) for i in range(len(learned))])
    inputs = images.double().permute(0, 3, 1, 2) / 255
    mean, std = (torch.tensor(v, dtype=torch.float64).view(1, 3, 1, 1) for v in (how.mean, how.std))
    inputs = (inputs - mean) / std
    labels = torch.from_numpy(learned.labels.astype(np.int64))
    parameters = [p for p in model.parameters() if p.requires_grad]
    velocity = [torch.zeros_like(p) for p in parameters]
    total, seen = len(learned) * EPOCHS, 0
    for epoch in range(EPOCHS):
        order = epoch_order(0, epoch, len(learned))
        for start_of_batch in range(0, len(learned), BATCH):
            batch = order[start_of_batch : start_of_batch + BATCH]
            done = (seen + len(batch) / 2) / total
            cosine = 0.5 * (1 + np.cos(np.pi * (done - WARMUP) / (1 - WARMUP)))
            lr = LR * (done / WARMUP if done < WARMUP else cosine)
            training_mode(model, frozen)
            loss = torch.nn.functional.cross_entropy(model(inputs[batch]), labels[batch])
            gradients = torch.autograd.grad(loss, parameters)
            with torch.no_grad():
                for p, v, g in zip(parameters, velocity, gradients):
                    g = g + (DECAY if p.dim() > 1 else 0.0) * p
                    v.mul_(MOMENTUM).add_(g)
                    p -= lr * (g + MOMENTUM * v)  # Nesterov, as PyTorch defines it
            seen += len(batch)
    return model.state_dict()


def weights(out: Path) -> dict[str, torch.Tensor]:
    return load_file(out / "bundle" / "model.safetensors")


def largest_difference(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> float:
    assert a.keys() == b.keys()
    return max(float((a[name].double() - b[name].double()).abs().max()) for name in a)


def metrics(out: Path) -> list[dict[str, float]]:
    lines = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    return [{k: v for k, v in line.items() if k not in ("images_per_second", "data_wait")} for line in lines]


def train_all(data: list[Path], case: str, outs: list[Path]) -> int:
    """Runs in each rank."""
    for source, out in zip(data, outs):
        run(recipe(source, case, out))
    return len(outs)


@pytest.mark.parametrize("case", CASES)
def test_processes__one_two_and_float64_agree(tmp_path: Path, case: str) -> None:
    # Every remainder of the size by the batch; with remainder 1 the second process has no sample in the
    # last step.
    sizes = range(16, 16 + BATCH) if case == "plain" else (17, 20)
    data = [domain_of(tmp_path / f"data{size}", size) for size in sizes]
    ones = [tmp_path / f"one{size}" for size in sizes]
    twos = [tmp_path / f"two{size}" for size in sizes]
    run_ranks(train_all, 1, data, case, ones)
    run_ranks(train_all, 2, data, case, twos)
    for folder, one, two in zip(data, ones, twos):
        reference = train_in_float64(folder, case)
        initial = weights_moved(folder, case, reference)
        assert initial > 1e-3, "the training moves the weights"
        assert largest_difference(weights(one), weights(two)) < 1e-5
        assert largest_difference(weights(one), reference) < 1e-5
        assert largest_difference(weights(two), reference) < 1e-5
        assert len(metrics(one)) == len(metrics(two))
        for first, second in zip(metrics(one), metrics(two)):
            assert first == pytest.approx(second, abs=1e-5)


def weights_moved(data: Path, case: str, after: dict[str, torch.Tensor]) -> float:
    learned = open_domain(data).split("train")
    torch.manual_seed(seed_of("init", 0))
    start = start_model(CASES[case][0], "none", learned.classes, image_size=32)
    return largest_difference(start.model.state_dict(), after)


def domain_of(folder: Path, size: int) -> Path:
    make_images(folder / "train", {"a": 7, "b": 6, "c": size - 13}, seed=size)
    make_images(folder / "val", {"a": 3, "b": 2, "c": 4}, seed=size + 100)
    return folder


def test_gradient_accumulation__is_the_same_training(tmp_path: Path) -> None:
    folder = domain_of(tmp_path / "data", 21)
    run_ranks(_train_pieces, 1, folder, tmp_path)
    assert largest_difference(weights(tmp_path / "whole"), weights(tmp_path / "pieces")) < 1e-6


def _train_pieces(folder: Path, out: Path) -> None:
    run(recipe(folder, "plain", out / "whole"))
    run(recipe(folder, "plain", out / "pieces", pieces=3))
