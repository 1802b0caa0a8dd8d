"""What a student learns from and is judged by; labels are welcome and not needed."""

from __future__ import annotations

from dataclasses import dataclass

from tldist.domain import Domain
from tldist.errors import DomainError
from tldist.progress import warn


@dataclass(frozen=True)
class Domains:
    """The target domain, cut.

    Attributes:
        train: what the student learns from.
        validation: what chooses the best weights; None: nothing is held out.
    """

    train: Domain
    validation: Domain | None


def split_target(domain: Domain, held_out: float, seed: int, *, split: str | None = None) -> Domains:
    """The train split and the val split; where there is no val split, a share of every class of the train
    split (of all images where they have no labels). A test split is never learned from.

    Args:
        domain: the target.
        held_out: that share; 0: no validation where there is no val split.
        seed: of the choice.
        split: what ``data.split`` asked for; that is learned from, whatever its name.

    Raises:
        DomainError: there are splits, and none to learn from.
    """
    splits = domain.split_counts
    if "train" not in splits and set(splits) & {"val", "test"} and split is None:
        raise DomainError(
            f"{domain.name}: no train split to learn from (splits here: {', '.join(splits)}). "
            f"data.split= names another one to learn from."
        )
    train = domain.training_split()
    if train.is_multilabel:
        warn(f"{train.name}: its images have several classes each; the labels are not used")
    if "val" in splits and train is not domain:
        return Domains(train, domain.split("val"))
    if held_out == 0:
        return Domains(train, None)
    rest, held = train.carve(held_out, seed)
    if len(held) == 0:
        warn("too few images to hold any out, the last weights are kept")
        return Domains(train, None)
    return Domains(rest, held)
