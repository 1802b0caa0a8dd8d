"""Alignments and weights against SKADA, ADAPT and J. Wang's toolbox, recorded by record_references.py.

Where a convention differs, the helper that bridges it says so.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from scipy.linalg import subspace_angles
from sklearn.metrics.pairwise import rbf_kernel

from tldist.align.methods import Fit, coral, jda, monge, subspace, tca
from tldist.align.weights import kmm, solve_kmm
from tldist.features.moments import Moments
from tldist.models.transforms import Affine, Kernel

RECORD = np.load(Path(__file__).parent / "references.npz")
DOMAINS = ("small", "uneven", "digits")
DIMS, GAMMA, SHRINKAGE, LAMB = 5, 0.7, 0.3, 0.5  # as record_references.py has them
WIDE = 0.1


def recorded(domain: str, name: str) -> np.ndarray:
    return RECORD[f"{domain}.{name}"]


def features(domain: str) -> tuple[np.ndarray, np.ndarray]:
    """Random features, or real ones: digits of MNIST and USPS."""
    scale = 255 if domain == "digits" else 1
    return recorded(domain, "xs") / scale, recorded(domain, "xt") / scale


def unit(values: np.ndarray) -> np.ndarray:
    """Samples of length 1: the toolbox makes them so."""
    return values / np.linalg.norm(values, axis=1, keepdims=True)


def loaded(values: np.ndarray, extra: float = 0.0, by_n: bool = False) -> Moments:
    """Moments whose covariance has ``extra`` on its diagonal (an absolute number, where ``ridge`` is a
    multiple of the mean variance), and is divided by N where ``by_n`` says so."""
    found = Moments.from_batch(values)
    count = found.count + by_n
    return Moments(count, found.mean, found.scatter + extra * (count - 1) * torch.eye(found.width).double())


@pytest.mark.parametrize("domain", DOMAINS)
def test_coral__agrees_with_skada(domain: str) -> None:
    xs, xt = features(domain)
    fit = coral(loaded(xs, by_n=True), loaded(xt, by_n=True), ridge=SHRINKAGE / (1 - SHRINKAGE))
    # SKADA moves both domains to the mean 0; here the source takes the target's.
    found = fit.map_source(xs) - xt.mean(0)
    np.testing.assert_allclose(found, recorded(domain, "skada_coral_source"), atol=1e-9)
    np.testing.assert_allclose(xt - xt.mean(0), recorded(domain, "skada_coral_target"), atol=1e-12)


@pytest.mark.parametrize("domain", DOMAINS)
def test_coral__agrees_with_adapt(domain: str) -> None:
    xs, xt = features(domain)
    fit = coral(loaded(xs, 0.1), loaded(xt, 0.1), ridge=0.0)
    # ADAPT leaves the means as they are: it multiplies by the same matrix.
    found = fit.map_source(xs) - fit.map_source(np.zeros_like(xs[:1]))
    np.testing.assert_allclose(found, recorded(domain, "adapt_coral"), atol=1e-8)


@pytest.mark.parametrize("domain", DOMAINS)
def test_monge__agrees_with_skada(domain: str) -> None:
    xs, xt = features(domain)
    fit = monge(loaded(xs, 0.1, by_n=True), loaded(xt, 0.1, by_n=True), ridge=0.0)
    np.testing.assert_allclose(fit.map_source(xs), recorded(domain, "skada_monge"), atol=1e-8)


@pytest.mark.parametrize("library", ["skada", "adapt"])
@pytest.mark.parametrize("domain", DOMAINS)
def test_subspace__agrees_with_skada_and_adapt(domain: str, library: str) -> None:
    xs, xt = features(domain)
    fit = subspace(xs, xt, dims=DIMS)
    source, target = fit.map_source(xs), fit.map_target(xt)
    expected = recorded(domain, f"{library}_sa_source"), recorded(domain, f"{library}_sa_target")
    # An axis may point the other way: then so do both domains' components.
    side = np.sign((target * expected[1]).sum(0))
    np.testing.assert_allclose(source * side, expected[0], atol=1e-8)
    np.testing.assert_allclose(target * side, expected[1], atol=1e-8)
    angles = subspace_angles(weight_of(fit).T, np.linalg.lstsq(xt - xt.mean(0), expected[1], rcond=None)[0])
    assert angles.max() < 1e-6 or domain == "digits"  # of rank below 64, where the last is not unique


def weight_of(fit: Fit) -> np.ndarray:
    assert isinstance(fit.target, Affine | Kernel)
    return fit.target.weight.numpy()


def same_components(found: np.ndarray, expected: np.ndarray) -> None:
    """Rows of weights against columns of unit length, each up to its sign; and the spaces by their angles."""
    side = np.sign((found * expected.T).sum(1))
    np.testing.assert_allclose(found * side[:, None], expected.T, atol=1e-6)
    assert subspace_angles(found.T, expected).max() < 1e-6


@pytest.mark.parametrize(("kind", "name"), [("linear", "primal"), ("rbf", "rbf")])
@pytest.mark.parametrize("domain", DOMAINS)
def test_tca__agrees_with_the_toolbox(domain: str, kind: str, name: str) -> None:
    xs, xt = map(unit, features(domain))
    mu = LAMB * (1 / len(xs) + 1 / len(xt))  # it divides the matrix of means by its Frobenius norm
    fit = tca(xs, xt, dims=DIMS, kind=kind, mu=mu, gamma=GAMMA)
    same_components(weight_of(fit), recorded(domain, f"tca_{name}"))
    # What comes out is what the weights say of the kernel, less its mean.
    values = np.concatenate([xs, xt])
    lifted = values if kind == "linear" else rbf_kernel(values, gamma=GAMMA)
    expected = (lifted - lifted.mean(0)) @ weight_of(fit).T
    np.testing.assert_allclose(np.concatenate([fit.map_source(xs), fit.map_target(xt)]), expected, atol=1e-9)


@pytest.mark.parametrize(("kind", "name"), [("linear", "primal"), ("rbf", "rbf")])
@pytest.mark.parametrize("domain", DOMAINS)
@pytest.mark.parametrize("rounds", [1, 2, 3, 4])
def test_jda__agrees_with_the_toolbox(domain: str, kind: str, name: str, rounds: int) -> None:
    xs, xt = map(unit, features(domain))
    labels = recorded(domain, "ys")
    fit = jda(xs, xt, labels, dims=DIMS, kind=kind, mu=LAMB, gamma=GAMMA, iterations=rounds)
    same_components(weight_of(fit), recorded(domain, f"jda_{name}")[rounds - 1])


@pytest.mark.parametrize("domain", DOMAINS)
def test_kmm__agrees_with_adapt(domain: str) -> None:
    xs, xt = features(domain)
    expected = recorded(domain, "adapt_kmm")
    np.testing.assert_allclose(kmm(xs, xt, gamma=GAMMA).numpy(), expected, atol=1e-6)


@pytest.mark.parametrize("domain", DOMAINS)
def test_kmm__agrees_with_adapt_where_bounds_hold(domain: str) -> None:
    xs, xt = features(domain)
    expected = recorded(domain, "adapt_kmm_bounded")
    found = kmm(xs, xt, gamma=WIDE, most=1.5, slack=0.01).numpy()
    assert expected.max() == pytest.approx(1.5, abs=1e-6)
    np.testing.assert_allclose(found, expected, atol=1e-6)


def test_solve_kmm__satisfies_the_conditions_of_an_optimum() -> None:
    """Karush, Kuhn and Tucker, which hold at the optimum of a convex programme and nowhere else."""
    random = np.random.default_rng(5)
    values = random.normal(size=(80, 4))
    kernel = rbf_kernel(values, gamma=0.2)
    kappa = 80 * rbf_kernel(values, random.normal(size=(50, 4)) + 1, gamma=0.2).mean(1)
    weights = solve_kmm(kernel, kappa, most=1000.0, slack=0.5)
    assert abs(weights.sum() - 80) <= 0.5 + 1e-6
    gradient = kernel @ weights - kappa
    active = weights > 1e-9
    multiplier = gradient[active].mean()  # of the bound on the sum
    np.testing.assert_allclose(gradient[active], multiplier, atol=1e-6)
    assert (gradient[~active] >= multiplier - 1e-6).all()
