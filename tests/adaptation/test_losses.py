"""Each loss against its formula written another way, in value and gradient; and with nothing to say."""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np
import pytest
import torch
from scipy.spatial.distance import cdist
from torch import Tensor

from tests.adaptation import references
from tldist.adaptation import adversarial, alignment, predictions
from tldist.adaptation.pseudo_labels import pseudo_labels


def random(*shape: int, seed: int = 0, scale: float = 1.0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return (scale * torch.randn(*shape, generator=generator, dtype=torch.float64)).requires_grad_()


def assert_equal(
    ours: Callable[..., Tensor], theirs: Callable[..., Tensor], *inputs: Tensor, tolerance: float = 1e-10
) -> None:
    """The same value, and the same gradient with respect to each input."""
    found, expected = ours(*inputs), theirs(*inputs)
    assert found.item() == pytest.approx(expected.item(), rel=tolerance, abs=tolerance)
    for mine, other in zip(torch.autograd.grad(found, inputs), torch.autograd.grad(expected, inputs)):
        torch.testing.assert_close(mine, other, rtol=1e-7, atol=tolerance)


PAIRS = [(7, 5, 3), (2, 2, 4), (4, 9, 12)]
"""Source and target images, features: also the least, and fewer images than features."""


@pytest.mark.parametrize(("n", "m", "d"), PAIRS)
def test_deep_coral__is_the_distance_of_covariances(n: int, m: int, d: int) -> None:
    assert_equal(alignment.deep_coral, references.deep_coral, random(n, d) * 2 + 5, random(m, d, seed=1))


@pytest.mark.parametrize(("n", "m", "d"), PAIRS)
def test_dan__is_the_unbiased_estimate_pair_by_pair(n: int, m: int, d: int) -> None:
    source, target = random(n, d), random(m, d, seed=1, scale=2)
    widths = alignment.WIDTHS
    assert_equal(
        alignment.multi_kernel_mmd,
        lambda s, t: references.dan(s, t, widths),
        source + 3,
        target,
        tolerance=1e-9,
    )


def test_dan__same_distribution_is_zero_on_average() -> None:
    values = [
        alignment.multi_kernel_mmd(random(20, 3, seed=2 * i), random(20, 3, seed=2 * i + 1)).item()
        for i in range(60)
    ]
    assert abs(np.mean(values)) < 3 * np.std(values) / math.sqrt(len(values))
    assert min(values) < 0, "unbiased: also below 0"
    apart = alignment.multi_kernel_mmd(random(20, 3), random(20, 3, seed=1) + 2)
    assert apart.item() > 10 * np.std(values)


@pytest.mark.parametrize("loss", [alignment.deep_coral, alignment.multi_kernel_mmd])
@pytest.mark.parametrize(("n", "m"), [(0, 5), (1, 5), (5, 1), (0, 0)])
def test_alignment__fewer_than_two_images_say_nothing(loss: Callable[..., Tensor], n: int, m: int) -> None:
    source, target = random(n, 3), random(m, 3)
    found = loss(source, target)
    assert float(found) == 0
    for gradient in torch.autograd.grad(found, (source, target)):
        assert not gradient.any()


def test_alignment__constant_features_have_finite_gradients() -> None:
    for loss in (alignment.deep_coral, alignment.multi_kernel_mmd):
        source, target = torch.ones(4, 3, requires_grad=True), torch.ones(5, 3, requires_grad=True)
        found = loss(source, target)
        found.backward()
        assert torch.isfinite(found)
        assert torch.isfinite(source.grad).all()


LOGITS = [(6, 4, 1.0), (3, 5, 6.0), (1, 3, 1.0)]


@pytest.mark.parametrize(("m", "k", "scale"), LOGITS)
@pytest.mark.parametrize("temperature", [1.0, 2.5])
def test_mcc__is_the_confusion_entry_by_entry(m: int, k: int, scale: float, temperature: float) -> None:
    assert_equal(
        lambda logits: predictions.minimum_class_confusion(logits, temperature),
        lambda logits: references.mcc(logits, temperature),
        random(m, k, scale=scale),
    )


def test_mcc__sure_answers_confuse_nothing_and_no_answer_all() -> None:
    sure = torch.eye(4, dtype=torch.float64) * 1000
    assert float(predictions.minimum_class_confusion(sure, 2.5)) == pytest.approx(0, abs=1e-12)
    assert float(predictions.minimum_class_confusion(torch.zeros(6, 4), 2.5)) == pytest.approx(3 / 4)
    extreme = torch.tensor([[1e4, -1e4], [-1e4, 1e4]], requires_grad=True)
    loss = predictions.minimum_class_confusion(extreme, 1.0)
    loss.backward()
    assert torch.isfinite(extreme.grad).all()


@pytest.mark.parametrize(("m", "k", "scale"), [(6, 4, 1.0), (8, 5, 3.0)])
def test_bnm__is_the_nuclear_norm(m: int, k: int, scale: float) -> None:
    assert_equal(predictions.batch_nuclear_norm, references.bnm, random(m, k, scale=scale), tolerance=1e-8)


def test_bnm__is_lowest_for_sure_and_diverse_answers() -> None:
    diverse = torch.eye(4, dtype=torch.float64).repeat(2, 1) * 100
    one_class = torch.eye(4, dtype=torch.float64)[:1].repeat(8, 1) * 100
    unsure = torch.zeros(8, 4, dtype=torch.float64)
    values = [float(predictions.batch_nuclear_norm(logits)) for logits in (diverse, one_class, unsure)]
    assert values == sorted(values)
    assert values[0] == pytest.approx(-math.sqrt(8 * 4) / 8), "the largest nuclear norm is sqrt(M K)"


@pytest.mark.parametrize(("m", "k", "scale"), LOGITS)
def test_information__is_minus_the_mutual_information(m: int, k: int, scale: float) -> None:
    assert_equal(predictions.information_maximisation, references.information, random(m, k, scale=scale))


def test_information__extreme_logits_have_finite_gradients() -> None:
    logits = torch.tensor([[500.0, -500.0, 0.0], [500.0, -500.0, 0.0]], requires_grad=True)
    predictions.information_maximisation(logits).backward()
    assert torch.isfinite(logits.grad).all()


@pytest.mark.parametrize(
    "loss",
    [
        lambda logits: predictions.minimum_class_confusion(logits, 2.5),
        predictions.batch_nuclear_norm,
        predictions.information_maximisation,
        lambda logits: adversarial.discrepancy(logits, logits),
        lambda logits: adversarial.domain_loss(logits[:, 0], logits[:, 0]),
    ],
)
def test_losses__no_image_is_zero_and_stays_in_the_graph(loss: Callable[[Tensor], Tensor]) -> None:
    logits = random(0, 4)
    found = loss(logits)
    assert float(found) == 0
    assert torch.autograd.grad(found, logits)[0].shape == (0, 4)


# -- opponents -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("weighted", [False, True])
def test_domain_loss__is_the_mean_of_both_domains(weighted: bool) -> None:
    weights = (random(7).detach().abs(), random(4, seed=3).detach().abs()) if weighted else None
    assert_equal(
        lambda s, t: adversarial.domain_loss(s, t, *(weights or ())),
        lambda s, t: references.domain_loss(s, t, weights),
        random(7, scale=3),
        random(4, seed=1),
    )


def test_entropy_weights__have_mean_one_and_do_not_learn() -> None:
    logits = random(6, 5, scale=3)
    found = adversarial.entropy_weights(logits)
    torch.testing.assert_close(found, references.certainty_weights(logits))
    assert float(found.mean()) == pytest.approx(1)
    assert not found.requires_grad


def test_reverse_gradient__is_the_identity_forward_and_minus_strength_back() -> None:
    features = random(3, 4)
    reversed_ = adversarial.reverse_gradient(features, 0.7)
    assert torch.equal(reversed_, features)
    gradient = torch.autograd.grad((reversed_**3).sum(), features)[0]
    torch.testing.assert_close(gradient, -0.7 * 3 * features.detach() ** 2)


def test_rise__from_zero_to_almost_one() -> None:
    values = [adversarial.rise(done) for done in (0, 0.1, 0.5, 1)]
    assert values == pytest.approx([0, math.tanh(0.5), math.tanh(2.5), math.tanh(5)])


def test_multilinear__are_all_products_class_by_class() -> None:
    features, answers = random(5, 3), random(5, 4, seed=1)
    expected = np.einsum("nk,nd->nkd", answers.detach().numpy(), features.detach().numpy()).reshape(5, 12)
    np.testing.assert_allclose(adversarial.multilinear(features, answers).detach(), expected)


def test_random_multilinear__keeps_inner_products_in_expectation() -> None:
    generator = torch.Generator().manual_seed(0)
    features, answers = random(6, 5).detach(), random(6, 3, seed=1).detach()
    of_features = torch.randn(5, 200_000, generator=generator, dtype=torch.float64)
    of_classes = torch.randn(3, 200_000, generator=generator, dtype=torch.float64)
    mapped = adversarial.random_multilinear(features, answers, of_features, of_classes)
    whole = adversarial.multilinear(features, answers)
    torch.testing.assert_close(mapped @ mapped.T, whole @ whole.T, rtol=0.1, atol=0.15)


def test_discrepancy__is_the_mean_distance_of_probabilities() -> None:
    assert_equal(
        adversarial.discrepancy,
        lambda a, b: (torch.softmax(a, 1) - torch.softmax(b, 1)).abs().mean(),
        random(5, 3),
        random(5, 3, seed=1),
    )


# -- pseudo-labels ---------------------------------------------------------------------------------------


def labels_by_loops(features: np.ndarray, probabilities: np.ndarray) -> np.ndarray:
    """As the authors' code goes: centres from answers, nearest by cosine, once more from labels."""
    rows = np.hstack([features, np.ones((len(features), 1))])
    rows = (rows.T / np.linalg.norm(rows, axis=1)).T
    classes = probabilities.shape[1]
    shares = probabilities
    for _ in range(2):
        kept = np.flatnonzero(np.bincount(shares.argmax(1), minlength=classes) > 0)
        centres = np.stack([(shares[:, k, None] * rows).sum(0) / (1e-8 + shares[:, k].sum()) for k in kept])
        labels = kept[cdist(rows, centres, "cosine").argmin(1)]
        shares = np.eye(classes)[labels]
    return labels


@pytest.mark.parametrize(("m", "d", "k"), [(40, 6, 4), (12, 3, 5), (5, 8, 9)])
def test_pseudo_labels__are_the_nearest_centres_of_the_authors(m: int, d: int, k: int) -> None:
    for seed in range(5):
        features = random(m, d, seed=seed).detach()
        probabilities = random(m, k, seed=seed + 100, scale=2).detach().softmax(1)
        expected = labels_by_loops(features.numpy(), probabilities.numpy())
        assert pseudo_labels(features, probabilities).tolist() == expected.tolist()


def test_pseudo_labels__mend_the_answers_of_clear_clusters() -> None:
    truth = torch.arange(3).repeat(20)
    features = torch.eye(3, dtype=torch.float64)[truth] * 5 + random(60, 3, scale=0.1).detach()
    answers = torch.eye(3, dtype=torch.float64)[truth]
    answers[:5] = torch.tensor([0.0, 0.0, 1.0], dtype=torch.float64)  # wrong, or right, whatever the image
    assert pseudo_labels(features, answers).tolist() == truth.tolist()
