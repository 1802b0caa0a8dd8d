"""Adaptation on one process, on two and in a float64 loop gives the same weights, losses and choice."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from tests.adaptation import references
from tests.adaptation.test_losses import labels_by_loops
from tests.distributed.test_same_weights import largest_difference, metrics, weights
from tests.support import make_images
from tests.support_processes import run_ranks
from tldist.adaptation.alignment import WIDTHS
from tldist.adaptation.network import DomainCritic, SecondHead
from tldist.data.order import epoch_order, seed_of
from tldist.distributed import start
from tldist.domain import Domain, open_domain, seal
from tldist.finetune.recipe import FinetuneRecipe
from tldist.finetune.run import run
from tldist.models.load import start_model
from tldist.runtime.preprocess import prepare
from tldist.training.checkpoint import list_checkpoints

BATCH, EPOCHS, LR, MOMENTUM, DECAY, WARMUP = 8, 2, 0.1, 0.9, 1e-3, 0.1
WEIGHTS = {"deep_coral": 300.0, "dan": 2.0, "cdan": 1.0, "mcd": 1.0, "mcc": 10.0, "bnm": 10.0, "shot": 1.5}
SIZES = {17: 13, 20: 5}
"""Source to target images: of 17 one process has none in the last step; 5 are less than a batch."""
CASES = [(17, method) for method in WEIGHTS if method != "shot"] + [(20, "deep_coral"), (20, "cdan")]


def recipe(source: Path, target: Path, method: str, out: Path) -> FinetuneRecipe:
    return FinetuneRecipe.make(
        data={"path": str(source)},
        model="tests.nets:plain_cnn",
        weights="none",
        out=out,
        epochs=EPOCHS,
        batch_size=BATCH,
        precision="fp32",
        image_size=32,
        select="last",
        optimizer={"name": "sgd", "lr": LR, "momentum": MOMENTUM, "weight_decay": DECAY, "warmup": WARMUP},
        augment={"crop": None, "flip": False},
        adapt={
            "method": method,
            "target": {"path": str(target)},
            "weight": WEIGHTS[method],
            "hidden": 12,
            "pseudo_labels": 0.7,
        },
        track=None,
        guard={"duplicates": "off"},
        workers=0,
    )


def pixels(domain: Domain, how) -> Tensor:  # type: ignore[no-untyped-def]
    images = torch.stack([torch.from_numpy(prepare(domain.read(i), how)) for i in range(len(domain))])
    mean, std = (torch.tensor(v, dtype=torch.float64).view(1, 3, 1, 1) for v in (how.mean, how.std))
    return (images.double().permute(0, 3, 1, 2) / 255 - mean) / std


def opponent(method: str) -> nn.Module | None:
    torch.manual_seed(seed_of("auxiliary", 0))
    if method == "cdan":
        return DomainCritic(64, 3, 12, 4096).double()
    return SecondHead(64, 3).double() if method == "mcd" else None


def losses(
    method: str, source: tuple[Tensor, Tensor], target: tuple[Tensor, Tensor], labels: Tensor, beside
) -> tuple[Tensor, Tensor]:  # type: ignore[no-untyped-def]
    """What all lower, and what the opponent (in MCD both heads) raises against the features."""
    (features_s, logits_s), (features_t, logits_t) = source, target
    none = torch.zeros((), dtype=torch.float64)
    weight = WEIGHTS[method]
    if method == "deep_coral":
        return weight * references.deep_coral(features_s, features_t), none
    if method == "dan":
        return weight * references.dan(features_s, features_t, WIDTHS), none
    if method == "mcc":
        return weight * references.mcc(logits_t, 2.5), none
    if method == "bnm":
        return weight * references.bnm(logits_t), none
    if method == "mcd":
        second_s, second_t = beside.head(features_s), beside.head(features_t)
        apart = (logits_t.softmax(1) - second_t.softmax(1)).abs().mean()
        return nn.functional.cross_entropy(second_s, labels), apart
    scores = [
        beside.layers(torch.einsum("nk,nd->nkd", logits.detach().softmax(1), features).flatten(1))[:, 0]
        for features, logits in (source, target)
    ]
    sure = references.certainty_weights(logits_s), references.certainty_weights(logits_t)
    return none, -references.domain_loss(scores[0], scores[1], sure)


def adapt_in_float64(source: Path, target: Path, method: str) -> dict[str, Tensor]:
    """The same training as a plain loop, its gradients taken apart: no reversed gradient, no gathering."""
    learned, others = open_domain(source).split("train"), seal(open_domain(target))
    torch.manual_seed(seed_of("init", 0))
    begun = start_model("tests.nets:plain_cnn", "none", learned.classes, image_size=32)
    model, how = begun.model.double(), begun.config.preprocessing
    body, head, beside = model[:-1], model[-1], opponent(method)
    inputs, unlabelled = pixels(learned, how), pixels(others, how)
    labels = torch.from_numpy(learned.labels.astype(np.int64))
    lower = list(model.parameters())
    heads = set(head.parameters())
    more = [] if beside is None else list(beside.parameters())
    velocity = [torch.zeros_like(p) for p in [*lower, *more]]
    total, seen, step = len(learned) * EPOCHS, 0, 0
    taken = min(BATCH, len(others))
    for epoch in range(EPOCHS):
        order = epoch_order(0, epoch, len(learned))
        for place in range(0, len(learned), BATCH):
            batch = order[place : place + BATCH]
            other_epoch, other_place = divmod(step, len(others) // taken)
            chosen = epoch_order(seed_of("beside", 0), other_epoch, len(others))
            chosen = chosen[other_place * taken : (other_place + 1) * taken]
            done = (seen + len(batch) / 2) / total
            cosine = 0.5 * (1 + np.cos(np.pi * (done - WARMUP) / (1 - WARMUP)))
            lr = LR * (done / WARMUP if done < WARMUP else cosine)
            strength = WEIGHTS[method] * np.tanh(5 * done)

            features, features_t = body(inputs[batch]), body(unlabelled[chosen])
            logits = head(features)
            common, game = torch.zeros((), dtype=torch.float64), torch.zeros((), dtype=torch.float64)
            if len(batch) > 1 or method in ("mcc", "bnm", "mcd", "cdan"):
                common, game = losses(
                    method, (features, logits), (features_t, head(features_t)), labels[batch], beside
                )
            objective = nn.functional.cross_entropy(logits, labels[batch]) + common
            everything = [*lower, *more]
            down = torch.autograd.grad(objective, everything, retain_graph=True, allow_unused=True)
            up = [None] * len(everything)
            if game.requires_grad:
                up = list(torch.autograd.grad(game, everything, allow_unused=True))
            with torch.no_grad():
                for place_, (p, v) in enumerate(zip(everything, velocity)):
                    g = torch.zeros_like(p) if down[place_] is None else down[place_].clone()
                    if up[place_] is not None:
                        below = place_ < len(lower) and p not in heads
                        g += up[place_] * (strength if below else -1.0)
                    g += (DECAY if p.dim() > 1 else 0.0) * p
                    v.mul_(MOMENTUM).add_(g)
                    p -= lr * (g + MOMENTUM * v)
            seen += len(batch)
            step += 1
    return model.state_dict()


def shoot_in_float64(start: dict[str, Tensor], target: Path) -> dict[str, Tensor]:
    """SHOT as a plain loop, from source-only's weights: the head rests, labels are made before each epoch."""
    others = seal(open_domain(target))
    begun = start_model("tests.nets:plain_cnn", "none", ("a", "b", "c"), image_size=32)
    model = begun.model.double()
    model.load_state_dict({name: tensor.double() for name, tensor in start.items()})
    body, head = model[:-1], model[-1]
    inputs, lower = pixels(others, begun.config.preprocessing), list(model[:-1].parameters())
    velocity = [torch.zeros_like(p) for p in lower]
    total, seen = len(others) * EPOCHS, 0
    for epoch in range(EPOCHS):
        with torch.no_grad():
            features = body(inputs)
            made = labels_by_loops(features.numpy(), head(features).softmax(1).numpy())
        order = epoch_order(0, epoch, len(others))
        for place in range(0, len(others), BATCH):
            batch = order[place : place + BATCH]
            done = (seen + len(batch) / 2) / total
            cosine = 0.5 * (1 + np.cos(np.pi * (done - WARMUP) / (1 - WARMUP)))
            lr = LR * (done / WARMUP if done < WARMUP else cosine)
            logits = head(body(inputs[batch]))
            loss = WEIGHTS["shot"] * references.information(logits)
            loss = loss + 0.7 * nn.functional.cross_entropy(logits, torch.from_numpy(made[batch]))
            gradients = torch.autograd.grad(loss, lower)
            with torch.no_grad():
                for p, v, g in zip(lower, velocity, gradients):
                    g = g + (DECAY if p.dim() > 1 else 0.0) * p
                    v.mul_(MOMENTUM).add_(g)
                    p -= lr * (g + MOMENTUM * v)
            seen += len(batch)
    return {name: tensor for name, tensor in model.state_dict().items() if not name.startswith("6.")}


def test_shot__one_two_and_float64_agree(domains: dict[int, tuple[Path, Path]], tmp_path: Path) -> None:
    ones, twos = ([(*domains[17], "shot", tmp_path / name)] for name in ("one", "two"))
    run_ranks(adapt_all, 1, ones)
    run_ranks(adapt_all, 2, twos)
    begin = weights(tmp_path / "one" / "source_only")
    reference = shoot_in_float64(begin, domains[17][1])
    assert max(float((begin[name] - reference[name]).abs().max()) for name in reference) > 1e-3
    assert largest_difference(result(tmp_path / "one"), reference) < 1e-5
    assert largest_difference(result(tmp_path / "two"), reference) < 1e-5


def adapt_all(cases: list[tuple[Path, Path, str, Path]]) -> None:
    for source, target, method, out in cases:
        run(recipe(source, target, method, out))


@pytest.fixture(scope="module")
def domains(tmp_path_factory: pytest.TempPathFactory) -> dict[int, tuple[Path, Path]]:
    folder = tmp_path_factory.mktemp("domains")
    found = {}
    for size, others in SIZES.items():
        source, target = folder / f"source{size}", folder / f"target{size}"
        make_images(source / "train", {"a": 7, "b": 6, "c": size - 13}, seed=size)
        make_images(source / "val", {"a": 3, "b": 2, "c": 4}, seed=size + 100)
        make_images(target, {"a": 2, "b": others - 3, "c": 1}, size=(30, 50), seed=size + 200)
        found[size] = source, target
    return found


def result(out: Path) -> dict[str, Tensor]:
    """The weights after the last step, whichever model was chosen."""
    return list_checkpoints(out / "checkpoints")[-1].result()


def test_adaptation__one_two_and_float64_agree(domains: dict[int, tuple[Path, Path]], tmp_path: Path) -> None:
    ones, twos = (
        [(*domains[size], method, tmp_path / f"{name}-{method}-{size}") for size, method in CASES]
        for name in ("one", "two")
    )
    run_ranks(adapt_all, 1, ones)
    run_ranks(adapt_all, 2, twos)
    for (_, method), one, two in zip(CASES, ones, twos):
        reference = adapt_in_float64(one[0], one[1], method)
        moved = largest_difference(weights(one[3] / "source_only"), reference)
        assert moved > 1e-3, f"{method} changes the training"
        assert largest_difference(result(one[3]), reference) < 1e-5, method
        assert largest_difference(result(two[3]), reference) < 1e-5, method
        assert largest_difference(weights(one[3]), weights(two[3])) < 1e-5, method
        assert len(metrics(one[3])) == len(metrics(two[3]))
        for first, second in zip(metrics(one[3]), metrics(two[3])):
            assert first == pytest.approx(second, abs=1e-5), method
        choices = [json.loads((case[3] / "choice.json").read_text()) for case in (one, two)]
        assert choices[0]["chosen"] == choices[1]["chosen"]
        for first, second in zip(*(choice["candidates"] for choice in choices)):
            for scorer in ("entropy", "im", "bnm"):
                assert first["scores"][scorer] == pytest.approx(second["scores"][scorer], abs=1e-5)


def _gathered(counts: tuple[int, ...]) -> tuple[list[list[float]], list[float]]:
    team = start()
    rows = (torch.arange(counts[team.rank] * 2.0).view(-1, 2) + 10 * team.rank).requires_grad_()
    whole = team.gather_rows(rows)
    (whole**2).sum().backward()
    assert rows.grad is not None
    return whole.tolist(), (rows.grad - 2 * rows).flatten().tolist()


@pytest.mark.parametrize("counts", [(2, 3), (0, 2), (3, 0)])
def test_gather_rows__all_see_all_and_gradients_come_home(counts: tuple[int, ...]) -> None:
    answers = run_ranks(_gathered, 2, counts)
    rows = [[2.0 * i + 10 * rank, 2.0 * i + 1 + 10 * rank] for rank in (0, 1) for i in range(counts[rank])]
    for whole, rest in answers:
        assert whole == rows
        assert not any(rest)
