"""The self-test of an opened package: whether this machine computes what was certified."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from tldist.errors import PackageError
from tldist.runtime.reference import EXTREMES, SLACK, Reference, largest_error
from tldist.runtime.session import LOGITS, PROBABILITIES, Session

SAMPLES = 4
"""Stored images that a self-test runs: one of each group, then more of the first one, which are pictures."""


def find_problems(
    session: Session,
    reference: Reference,
    tolerances: Mapping[str, Any],
    samples: int | None = SAMPLES,
    temperature: float = 1.0,
) -> list[str]:
    """Run stored images and compare with the stored answers: a line for each output that differs.

    The answers are those that the package itself gave where it was made, held to ``max_drift``; where they
    are not stored, PyTorch's, held to ``max_relative``. Errors are relative to the largest value of the
    output on the group of samples, those of probabilities absolute. NaN and infinity always differ.

    Args:
        session: the loaded graph.
        reference: what the package carries.
        tolerances: of the package's profile.
        samples: how many images; None: all.
        temperature: that the graph's probabilities divide the logits by.

    Raises:
        PackageError: the reference belongs to another graph, or the profile has no tolerances.
    """
    stored = reference.exported or reference.expected
    if set(stored) != set(session.outputs):
        raise PackageError(
            f"its reference samples answer {', '.join(stored) or 'nothing'}, its graph gives "
            f"{', '.join(session.outputs)}; they do not belong together."
        )
    rows = _choose(reference, samples)
    chosen = reference.take(rows)
    found = chosen.samples.collect(session.run)
    groups, of_all = chosen.samples.group_of, reference.samples.group_of
    problems = []
    for name in session.outputs:
        for group in dict.fromkeys(groups.tolist()):
            part = Part(reference, name, of_all == group, tolerances, temperature)
            limit = np.inf if group in EXTREMES and tolerances.get("extremes") == "reported" else part.limit
            expected, answered = stored[name][rows][groups == group], found[name][groups == group]
            error = largest_error(expected, answered) / part.magnitude
            if not (np.isfinite(error) and error <= limit):
                problems.append(
                    f"output '{name}' is off by {error:.1e} of its largest value on {group} samples, "
                    f"tolerance {limit:.1e}"
                )
    return problems


@dataclass(frozen=True)
class Part:
    """One output on one group of the stored samples: what its errors are relative to, and their limit."""

    reference: Reference
    name: str
    rows: np.ndarray
    tolerances: Mapping[str, Any]
    temperature: float

    @property
    def magnitude(self) -> float:
        """The largest value; where that is nearly nothing, a millionth of the largest of all groups."""
        values = np.abs(self.reference.expected[self.name])
        if self.name == PROBABILITIES:
            return 1.0
        return max(float(values[self.rows].max()), 1e-6 * float(values.max())) or 1.0

    @property
    def limit(self) -> float:
        """The profile's tolerance, or what PyTorch is off by itself, in float32 or by another resize."""
        try:
            allowed = float(self.tolerances["max_relative"])
            if self.reference.exported and self.tolerances.get("max_drift") is not None:
                allowed = float(self.tolerances["max_drift"])
        except (KeyError, TypeError, ValueError) as error:
            raise PackageError(f"its profile has no tolerances to hold it to: {error}.") from error
        own = SLACK * self._distance(self.reference.referee)
        widest = max(allowed, own, self._distance(self.reference.fitted))
        if self.name == PROBABILITIES and LOGITS in self.reference.expected:
            # A softmax changes by at most half the change of its logits, a sigmoid by a quarter.
            logits = replace(self, name=LOGITS)
            widest = max(widest, 0.5 * logits.limit * logits.magnitude / self.temperature)
        return widest

    def _distance(self, others: Mapping[str, np.ndarray]) -> float:
        if self.name not in others:
            return 0.0
        expected = self.reference.expected[self.name]
        return largest_error(others[self.name][self.rows], expected[self.rows]) / self.magnitude


def _choose(reference: Reference, samples: int | None) -> np.ndarray:
    """Positions of the images to run, in rising order."""
    groups = reference.samples.group_of
    if samples is None or samples >= len(groups):
        return np.arange(len(groups))
    _, first = np.unique(groups, return_index=True)
    order = dict.fromkeys([*sorted(first.tolist()), *range(len(groups))])
    return np.array(sorted(list(order)[:samples]))


def explain(problems: list[str], session: Session) -> str:
    """The problems and what to do about them, for people."""
    version = session.describe()["onnxruntime"]
    return (
        f"self-test failed on {session.provider} of ONNX Runtime {version}: {'; '.join(problems)}. "
        f"This machine computes something else than what was certified. `tldist parity PACKAGE` compares all "
        f"samples; use the ONNX Runtime that parity.json names, or export again for this machine "
        f"(self_test=False opens the package as it is)."
    )
