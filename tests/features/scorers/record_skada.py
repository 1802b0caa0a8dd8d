"""Record what SKADA's scorers say of random domains, for test_skada.py. Run where skada is installed:

python tests/features/scorers/record_skada.py tests/features/scorers/skada.npz
"""

from __future__ import annotations

import sys
from importlib.metadata import version

import numpy as np
from skada import make_da_pipeline
from skada.metrics import (
    DeepEmbeddedValidation,
    MixValScorer,
    PredictionEntropyScorer,
    SoftNeighborhoodDensity,
)
from sklearn.linear_model import LogisticRegression
from sklearn.model_selection import train_test_split
from sklearn.preprocessing import StandardScaler
from sklearn.utils import check_random_state

CLASSES, WIDTH, SOURCE, TARGET, SEED = 4, 6, 150, 90, 3


def domains() -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Features, labels and domains (1: source, -2: target) of four classes that move and turn."""
    random = np.random.default_rng(SEED)
    centres = random.normal(size=(CLASSES, WIDTH)) * 0.7
    labels = random.integers(0, CLASSES, SOURCE + TARGET)
    values = centres[labels] + random.normal(size=(len(labels), WIDTH))
    turn = np.linalg.qr(random.normal(size=(WIDTH, WIDTH)) + 3 * np.eye(WIDTH))[0]
    values[SOURCE:] = values[SOURCE:] @ turn * 1.2 + 0.5
    return values, labels, np.array([1] * SOURCE + [-2] * TARGET)


def main(path: str) -> None:
    """Fit a pipeline, score it, write inputs and answers."""
    values, labels, domain = domains()
    masked = np.where(domain > 0, labels, -1)
    pipeline = make_da_pipeline(StandardScaler(), LogisticRegression())
    pipeline.fit(values, masked, sample_domain=domain)

    def logits(points: np.ndarray, number: int) -> np.ndarray:
        where = np.full(len(points), number)
        extra = {"allow_source": True} if number > 0 else {}
        return np.log(pipeline.predict_proba(points, sample_domain=where, **extra))

    def score(scorer: object) -> float:
        return float(scorer(pipeline, values, masked, sample_domain=domain))  # type: ignore[operator]

    def column_of_losses(answers: np.ndarray, probabilities: np.ndarray) -> np.ndarray:
        # SKADA 0.6.0's own loss is a row, which its column of weights makes a matrix of all pairs
        return -np.log(probabilities[np.arange(len(answers)), answers])[:, None]

    dev = DeepEmbeddedValidation(loss_func=column_of_losses, random_state=SEED, greater_is_better=True)
    found = {
        "entropy": score(PredictionEntropyScorer(greater_is_better=True)),
        "snd": score(SoftNeighborhoodDensity()),
        "dev": score(dev),
    }
    # the parts that DEV made, by the same calls
    train, held_out, _, held_out_labels = train_test_split(
        values[domain > 0], labels[domain > 0], test_size=0.33, random_state=check_random_state(SEED)
    )
    transform = pipeline[:-1].transform
    found |= {"dev_train": transform(train), "dev_at": transform(held_out)}
    found |= {"dev_target": transform(values[domain < 0])}
    domain_answers = dev.domain_classifier_.predict_proba(found["dev_at"])
    found["dev_weights"] = len(train) / TARGET * domain_answers[:, 0] / domain_answers[:, 1]
    found |= {"dev_logits": logits(held_out, 1), "dev_labels": held_out_labels}
    # MixVal draws its partners from the same generator
    target = values[domain < 0]
    partner = check_random_state(SEED).permutation(len(target))
    found |= {
        "intra": score(MixValScorer(ice_type="intra", random_state=SEED)),
        "inter": score(MixValScorer(ice_type="inter", random_state=SEED)),
        "target_logits": logits(target, -2),
        "partner": partner,
        "mixed_logits": logits(0.55 * target + 0.45 * target[partner], -2),
    }
    np.savez_compressed(path, skada=version("skada"), **found)


if __name__ == "__main__":
    main(sys.argv[1])
