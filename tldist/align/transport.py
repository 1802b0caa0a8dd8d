"""An alignment by optimal transport between samples: ot, through POT."""

from __future__ import annotations

from typing import Any

import torch

from tldist.align.fit import Data, Fit, Labels, known_labels, two_samples
from tldist.errors import RecipeError, needs
from tldist.models.transforms import Displace

KINDS = ("entropic", "emd")


def ot(
    source: Data,
    target: Data,
    source_labels: Labels | None = None,
    target_labels: Labels | None = None,
    *,
    kind: str = "entropic",
    ridge: float = 0.05,
    strength: float = 0.1,
) -> Fit:
    """Move each source sample to the mean of the target samples that its mass is carried to.

    Courty et al., arXiv:1507.00504: the plan of least cost between the samples, with squared distances
    (over their largest). Target features stay as they are. A new source sample goes where the nearest of
    these goes: it is moved by the same difference (POT's rule). Linear transport between Gaussians is
    `monge`.

    Args:
        source, target: features (N, D); the plan is a matrix (N_S, N_T).
        source_labels: (N_S,); with them samples of several classes avoid the same target sample.
        target_labels: (N_T,), -1 where unknown: with them no mass goes between samples of two classes.
        kind: ``entropic``, with the group-lasso penalty of eq. 17 where labels are given; or ``emd``, the
            exact plan, which takes no penalty.
        ridge: of the entropy.
        strength: of the penalty on classes.
    """
    library = _library()
    first, second = two_samples(source, target)
    labels = None if source_labels is None else known_labels(source_labels, len(first), "source").numpy()
    known = None if target_labels is None else known_labels(target_labels, len(second), "target").numpy()
    if kind not in KINDS:
        raise RecipeError(f"kind={kind}: ot has {' and '.join(KINDS)}; method=monge is the linear one.")
    if kind == "emd":
        plan = library.EMDTransport(norm="max", max_iter=1_000_000)
    elif labels is None:
        plan = library.SinkhornTransport(reg_e=ridge, norm="max")
    else:
        plan = library.SinkhornLpl1Transport(reg_e=ridge, reg_cl=strength, norm="max")
    plan.fit(Xs=first.numpy(), ys=labels, Xt=second.numpy(), yt=known)
    moved = torch.from_numpy(plan.transform(Xs=first.numpy()))
    return Fit(Displace.of(first, moved), None, {"kind": kind})


def _library() -> Any:
    with needs("ot"):
        import ot.da
    return ot.da
