"""All scores of one candidate, from what it makes of both domains."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from tldist.errors import DomainError
from tldist.features.arrays import Values, as_features, as_labels
from tldist.features.scorers.answers import information_maximisation, mean_entropy, nuclear_norm
from tldist.features.scorers.density import soft_neighbourhood_density
from tldist.features.scorers.guard import Answers
from tldist.features.scorers.mixing import Consistency
from tldist.features.scorers.weighted import dev_risk, importance_weighted_risk, importance_weights


@dataclass(frozen=True)
class Scorer:
    """One way to judge a model without target labels.

    Attributes:
        larger: whether larger values are better.
        weight: in the mean of the places. MixVal's two share one.
    """

    larger: bool
    weight: float = 1.0


SCORERS: dict[str, Scorer] = {
    "entropy": Scorer(larger=False),
    "snd": Scorer(larger=True),
    "im": Scorer(larger=True),
    "bnm": Scorer(larger=True),
    "dev": Scorer(larger=False),
    "iw": Scorer(larger=False),
    "mixval_intra": Scorer(larger=True, weight=0.5),
    "mixval_inter": Scorer(larger=True, weight=0.5),
}
"""The family of label-free scorers, by the name of their value."""


@dataclass(frozen=True)
class SourceEvidence:
    """What a candidate makes of the labelled source; features as its last linear layer reads them.

    Attributes:
        features: (N, D), of images that it was trained on.
        held_out_features: (P, D), of images that it was not trained on.
        held_out_logits: (P, K), of these.
        held_out_labels: whole numbers (P,).
    """

    features: Values
    held_out_features: Values
    held_out_logits: Values
    held_out_labels: Values


@dataclass(frozen=True)
class Candidate:
    """A model among which one is to be chosen.

    Attributes:
        name: of the model.
        scores: by key of `SCORERS`; None: it has no such value.
        answers: to the target's images, for the guard against collapse.
    """

    name: str
    scores: dict[str, float | None]
    answers: Answers


def judge(
    name: str,
    target_logits: Values,
    *,
    target_features: Values | None = None,
    source: SourceEvidence | None = None,
    mixed: Consistency | None = None,
    seed: int = 0,
) -> Candidate:
    """Score a candidate; what is not given has no value.

    Args:
        name: of the candidate.
        target_logits: (M, K), of target images; the same images for all candidates.
        target_features: (M, D), as its last linear layer reads them (with ``source``: DEV and importance
            weighting).
        source: what it makes of the labelled source.
        mixed: of `tldist.features.scorers.mixing.mix_consistency`.
        seed: of the rows that fit the classifier of domains.
    """
    scores: dict[str, float | None] = dict.fromkeys(SCORERS)
    scores["entropy"] = mean_entropy(target_logits)
    scores["snd"] = soft_neighbourhood_density(target_logits)
    scores["im"] = information_maximisation(target_logits)
    scores["bnm"] = nuclear_norm(target_logits)
    accuracy = None
    if source is not None:
        logits = as_features(source.held_out_logits, "the held-out logits").cpu()
        labels = as_labels(source.held_out_labels, len(logits))
        wrong = (logits.argmax(1) != labels).double()
        accuracy = 1 - float(wrong.mean())
        if target_features is not None:
            weights = importance_weights(
                source.features, target_features, source.held_out_features, seed=seed
            )
            if len(weights) != len(logits):
                raise DomainError(f"{name}: {len(weights)} held-out features and {len(logits)} logits.")
            losses = torch.nn.functional.cross_entropy(logits, labels, reduction="none")
            scores["dev"] = dev_risk(weights, losses)
            scores["iw"] = importance_weighted_risk(weights, wrong)
    if mixed is not None:
        scores["mixval_intra"], scores["mixval_inter"] = mixed.intra, mixed.inter
    return Candidate(name, scores, Answers.of(target_logits, accuracy))
