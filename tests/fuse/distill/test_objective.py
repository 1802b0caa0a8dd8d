"""The objective against its definition, written again in NumPy's float64."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from tldist.bundle import BundleConfig
from tldist.fuse.distill.job import lesson_of
from tldist.fuse.distill.objective import soft_targets, teachers_loss, vote_matrix
from tldist.fuse.distill.recipe import DistillRecipe
from tldist.fuse.distill.student import Student
from tldist.fuse.distill.teachers import Layout, Teacher
from tldist.runtime.preprocess import Preprocessing

CASES = {
    "the same classes": ([["a", "b", "c"], ["a", "b", "c"]], ["a", "b", "c"]),
    "halves": ([["a", "b"], ["c", "d"]], ["a", "b", "c", "d"]),
    "overlapping, in other orders": ([["c", "a"], ["b", "c", "d"], ["d"]], ["d", "a", "c", "b"]),
    "a class of labels alone": ([["a", "b"], ["b", "c"]], ["a", "b", "c", "new"]),
}


def softmax(z: np.ndarray) -> np.ndarray:
    e = np.exp(z - z.max(axis=-1, keepdims=True))
    return e / e.sum(axis=-1, keepdims=True)


def reference(
    outputs: np.ndarray, rows: np.ndarray, known: list[list[str]], shares: np.ndarray, classes: list[str],
    temperature: float, labels_share: float, weight: float, widths: list[int],
    mean: np.ndarray, scale: np.ndarray,
) -> list[float]:  # fmt: skip
    """Image by image, class by class."""
    k, losses = len(classes), []
    for output, row in zip(outputs, rows):
        label, at, votes = int(row[0]), 1, {}
        for names, share in zip(known, shares):
            probabilities = softmax(row[at : at + len(names)] / temperature)
            at += len(names)
            for name, probability in zip(names, probabilities):
                votes.setdefault(name, []).append((share, probability))
        q = {n: sum(s * p for s, p in v) / sum(s for s, _ in v) for n, v in votes.items()}
        total = sum(q.values())
        there = [place for place, name in enumerate(classes) if name in q]
        student = dict(zip((classes[place] for place in there), softmax(output[there] / temperature)))
        kl = sum(q[n] / total * (np.log(q[n] / total) - np.log(student[n])) for n in q)
        share = labels_share if label >= 0 else 0.0
        loss = (1 - share) * temperature**2 * kl
        if label >= 0:
            loss += share * -np.log(softmax(output[:k])[label])
        start = k
        for width, part in zip(widths, shares):
            target = (row[at : at + width] - mean[start - k : start - k + width]) / scale[
                start - k : start - k + width
            ]
            loss += weight * part * np.mean((output[start : start + width] - target) ** 2)
            at, start = at + width, start + width
        losses.append(float(loss))
    return losses


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize(
    ("temperature", "labels_share", "weight"), [(1.0, 0.0, 0.0), (4.0, 0.3, 2.0), (0.5, 1.0, 0.5)]
)
def test_objective__equals_float64(case: str, temperature: float, labels_share: float, weight: float) -> None:
    known, classes = CASES[case]
    random = np.random.default_rng([len(case), int(10 * temperature)])
    shares = random.random(len(known))
    shares /= shares.sum()
    widths = random.integers(1, 6, len(known)).tolist() if weight else []
    n, j, d = 9, sum(map(len, known)), sum(widths)
    outputs = random.normal(0, 3, (n, len(classes) + d))
    labels = random.integers(-1, len(classes), n)
    labels[0] = -1
    rows = np.concatenate([labels[:, None], random.normal(0, 3, (n, j + d))], 1)

    settings = DistillRecipe.make(temperature=temperature, labels_share=labels_share, features=weight)
    teachers = [
        Teacher(None, None, BundleConfig({}, tuple(names), Preprocessing()), share)  # type: ignore[arg-type]
        for names, share in zip(known, shares.tolist())
    ]
    layout = Layout(tuple(map(len, known)), tuple(widths))
    student = Student(torch.nn.Linear(3, len(classes)), layout, seed=0)
    mean, scale = random.normal(size=d), random.uniform(0.5, 2, d)
    if weight:
        student.mean.copy_(torch.from_numpy(mean))
        student.scale.copy_(torch.from_numpy(scale))
    objective = lesson_of(settings, teachers, layout, classes, torch.device("cpu")).objective(student)
    found = objective(torch.from_numpy(outputs).float(), torch.from_numpy(rows).float())

    expected = reference(
        outputs, rows, known, shares, classes, temperature, labels_share, weight, widths, mean, scale
    )
    assert found.numpy() == pytest.approx(expected, rel=2e-5, abs=1e-5)


def test_votes__one_teacher_that_knows_a_class_decides_it_alone() -> None:
    votes = vote_matrix([["a", "b"], ["b", "c"]], [0.25, 0.75], ["a", "b", "c", "z"])
    assert votes.tolist() == [[1, 0, 0, 0], [0, 0.25, 0, 0], [0, 0.75, 0, 0], [0, 0, 1, 0]]


def test_votes__a_teacher_without_a_share_does_not_count() -> None:
    votes = vote_matrix([["a", "b"], ["b", "c"]], [1.0, 0.0], ["a", "b", "c"])
    assert votes.tolist() == [[1, 0, 0], [0, 1, 0], [0, 0, 0], [0, 0, 0]]


def test_soft_targets__order_of_classes_and_of_teachers_does_not_matter() -> None:
    random = torch.Generator().manual_seed(0)
    first, second = torch.randn(5, 3, generator=random), torch.randn(5, 2, generator=random)
    one = soft_targets(
        torch.cat([first, second], 1),
        (3, 2),
        vote_matrix([["a", "b", "c"], ["d", "b"]], [0.3, 0.7], "abcd").float(),
        2.0,
    )
    other = soft_targets(
        torch.cat([second.flip(1), first[:, [2, 0, 1]]], 1), (2, 3),
        vote_matrix([["b", "d"], ["c", "a", "b"]], [0.7, 0.3], "dcba").float(), 2.0,
    )  # fmt: skip
    assert torch.allclose(one, other.flip(1), atol=1e-7)
    assert torch.allclose(one.sum(1), torch.ones(5))


def test_teachers_loss__is_zero_where_the_student_agrees_and_leaves_unknown_classes_alone() -> None:
    logits = torch.randn(4, 3, generator=torch.Generator().manual_seed(1))
    votes = vote_matrix([["a", "b", "c"]], [1.0], ["a", "b", "c", "new"]).float()
    targets = soft_targets(logits, (3,), votes, 3.0)
    student = torch.cat([logits, torch.full((4, 1), 50.0)], 1).requires_grad_()
    loss = teachers_loss(student, targets, votes.any(0), 3.0)
    assert loss.detach().numpy() == pytest.approx(np.zeros(4), abs=1e-5)
    (student.grad,) = torch.autograd.grad(loss.sum(), student)
    assert student.grad[:, 3].tolist() == [0.0] * 4
