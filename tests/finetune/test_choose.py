"""What trials are judged on: calibrated probabilities, the same for any scale of the logits."""

from __future__ import annotations

import copy
from pathlib import Path

import pytest
import torch

from tests.support import make_images
from tldist.distributed import Team
from tldist.domain import open_domain, seal
from tldist.finetune.choose import Bench, Trial, settle
from tldist.finetune.recipe import FinetuneRecipe
from tldist.models.load import start_model
from tldist.runs import RunFolder
from tldist.training.signals import StopFlag


@pytest.fixture
def bench(tmp_path: Path) -> Bench:
    learned = open_domain(make_images(tmp_path / "learned", {"a": 12, "b": 12, "c": 12}))
    held = open_domain(make_images(tmp_path / "held", {"a": 8, "b": 8, "c": 8}, seed=1))
    target = seal(open_domain(make_images(tmp_path / "target", {"a": 9, "b": 9, "c": 9}, seed=2)))
    recipe = FinetuneRecipe.make(
        data="x", model="tests.nets:plain_cnn", out=tmp_path / "r", adapt={"method": "mcc", "target": "y"}
    )
    (tmp_path / "r").mkdir()
    start = start_model("tests.nets:plain_cnn", "none", ("a", "b", "c"), image_size=32)
    return Bench(
        recipe, Team(0, 1, 1, torch.device("cpu")), RunFolder(tmp_path / "r", "finetune"), StopFlag(),
        start.config.preprocessing, ("a", "b", "c"), target, learned, held, 0,
    )  # fmt: skip


def test_scores__do_not_depend_on_the_scale_of_the_logits(bench: Bench) -> None:
    torch.manual_seed(0)
    model = start_model("tests.nets:plain_cnn", "none", ("a", "b", "c"), image_size=32).model
    with torch.no_grad():
        model[-1].weight.mul_(8)
        louder = copy.deepcopy(model)
        louder[-1].weight.mul_(3)
        louder[-1].bias.mul_(3)
    trials = [Trial("source_only", lambda: model), Trial("epoch-1", lambda: louder, 4)]
    choice = settle(bench, trials)
    one, two = (
        next(row for row in choice["candidates"] if row["name"] == trial.name)["scores"] for trial in trials
    )
    assert one["entropy"] is not None
    for name, value in one.items():
        assert two[name] == pytest.approx(value, rel=1e-3), name
    assert choice["candidates"][0]["step"] in (None, 4)
    assert choice["labels"] == "sealed"


def test_settle__an_earlier_choice_stands_until_there_are_other_trials(bench: Bench) -> None:
    model = start_model("tests.nets:plain_cnn", "none", ("a", "b", "c"), image_size=32).model
    first = settle(bench, [Trial("source_only", lambda: model), Trial("epoch-1", lambda: model, 4)])
    assert first["chosen"] == "source_only", "what is equal is not promoted"

    def never() -> torch.nn.Module:
        raise AssertionError("nothing is looked at again")

    assert settle(bench, [Trial("source_only", never), Trial("epoch-1", never, 4)]) == first
    with pytest.raises(AssertionError, match="nothing is looked at"):
        settle(bench, [Trial("source_only", never), Trial("epoch-2", never, 8)])
