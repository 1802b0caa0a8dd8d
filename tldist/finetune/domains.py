"""What learns from which images: the train and validation domains of a fine-tuning."""

from __future__ import annotations

from dataclasses import dataclass

from tldist.domain import DataRecipe, Domain, open_domain, sort_names
from tldist.errors import DomainError
from tldist.progress import warn


@dataclass(frozen=True)
class Domains:
    """What a fine-tuning learns from and is judged by.

    Attributes:
        train: what it learns from.
        validation: what chooses the best; None: nothing is held out.
        test: only looked at for duplicates of the others; None: there is none.
        classes: of the task, in natural order.
    """

    train: Domain
    validation: Domain | None
    test: Domain | None
    classes: tuple[str, ...]


def split_domains(data: DataRecipe, held_out: float, seed: int) -> Domains:
    """The domains to train and to validate on, and the classes of the task.

    Validation is the domain's val split; where there is none, a share of every class of the train split.
    A test split is never learned from nor measured on.

    Args:
        data: the settings of the domain.
        held_out: share of every class to hold out where there is no val split; 0: no validation.
        seed: of the choice.

    Raises:
        DomainError: no train split, no labels, or validation classes that are not trained on.
    """
    domain = open_domain(data)
    whole = domain.split("train") if "train" in domain.split_counts else domain
    if whole is domain and set(domain.split_counts) & {"val", "test"} and data.split is None:
        there = ", ".join(domain.split_counts)
        raise DomainError(f"{domain.name}: no train split to learn from (splits here: {there}).")
    if not whole.has_labels:
        raise DomainError(
            f"{whole.name}: no labels. Expected one folder of images a class, or a label column."
        )
    classes = whole.used_classes
    if len(classes) < (1 if whole.is_multilabel else 2):
        found = f"a single class '{classes[0]}'" if classes else "no class"
        raise DomainError(f"{whole.name}: {found}; a classifier needs at least two.")
    test = domain.split("test") if "test" in domain.split_counts and whole is not domain else None
    if "val" in domain.split_counts and whole is not domain:
        validation = domain.split("val")
        _check_classes(whole, validation, classes)
        return Domains(whole, validation, test, classes)
    if held_out == 0:
        return Domains(whole, None, test, classes)
    rest, held = whole.carve(held_out, seed)
    if len(held) == 0:
        warn("every class has a single image: nothing can be held out, the last weights are kept")
        return Domains(whole, None, test, classes)
    return Domains(rest, held, test, classes)


def _check_classes(train: Domain, validation: Domain, classes: tuple[str, ...]) -> None:
    present = set(validation.used_classes)
    unknown = sort_names(present - set(classes))
    if unknown:
        raise DomainError(
            f"{validation.name} has classes that {train.name} has no images of: {', '.join(unknown[:5])}. "
            f"The class folders of both must agree by name."
        )
    absent = sort_names(set(classes) - present)
    if absent:
        warn(f"{validation.name} has no images of: {', '.join(absent[:5])}")
