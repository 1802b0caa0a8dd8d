"""Watches the answers of a model that learns without labels for a collapse into one."""

from __future__ import annotations

import math
from collections import Counter, deque

from torch import Tensor

from tldist.fuse.statistics.collapse import MIXED, Answers, largest_share
from tldist.progress import warn

_ENOUGH = 32
"""Images whose answers tell a collapse from chance."""


class CollapseGuard:
    """Remembers where to go back to.

    Args:
        start: the coefficients before the first step.

    Attributes:
        shares: of each step, the part of the last images that got the most frequent answer.
        best, best_step: the coefficients of least entropy among the steps at least half as mixed as the
            first images were, and how many updates they had seen.
        collapsed: whether all answers became one.
    """

    def __init__(self, start: Tensor) -> None:
        self.window: deque[Answers] = deque()
        self.shares: list[float] = []
        self.first: float | None = None
        self.best, self.best_entropy, self.best_step = start.detach().clone(), math.inf, 0
        self.collapsed = False

    def sees_collapse(self, answers: Answers, found: float, coefficients: Tensor) -> bool:
        """Take note of a step, by what its coefficients have answered; whether they have collapsed."""
        self.window.append(answers)
        while sum(some.total() for some in list(self.window)[1:]) >= _ENOUGH:
            self.window.popleft()
        together: Answers = sum(self.window, Counter())
        share = largest_share(together)
        self.shares.append(share)
        if together.total() < _ENOUGH:
            return False
        if self.first is None:
            self._start(share)
        assert self.first is not None
        if self.first <= MIXED and share == 1:
            self.collapsed = True
            warn(
                f"AdaMerging: after {len(self.shares) - 1} steps the merged model gives all images one "
                f"answer. Learning stops, and the coefficients of step {self.best_step} are kept; a smaller "
                f"learning rate or fewer steps may go further."
            )
        elif found < self.best_entropy and share <= (1 + self.first) / 2:
            self.best, self.best_entropy = coefficients.detach().clone(), found
            self.best_step = len(self.shares) - 1
        return self.collapsed

    def _start(self, share: float) -> None:
        self.first = share
        if share > MIXED:
            warn(
                f"AdaMerging: {share:.0%} of the first images get one answer, so a collapse into one "
                f"answer would not be noticed"
            )
