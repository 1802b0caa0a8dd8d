"""A head that asks the nearest of stored samples: k-NN as a layer that exports."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

_SHARED = 0.01
"""So much of the probability is spread over all classes: none is impossible because no neighbour has it."""


class Neighbours(nn.Linear):
    """The weighted vote of the k most similar samples, by cosine: (N, D) to the logarithms of shares (N, K).

    Votes are weighted by ``exp(cosine / temperature)``, as Wu et al., arXiv:1805.01978, section 3.4 (and
    DINO) have it. It is a linear layer in that it reads features and answers classes, and that its weight,
    (M, D), multiplies features: what looks for a model's head finds it.

    Args:
        in_features: D.
        out_features: K.
        samples: M, how many are stored.
        k: how many vote, at most M.
        temperature: of the votes' weights.
    """

    labels: Tensor  # int64 (M,), the classes of the samples

    def __init__(self, in_features: int, out_features: int, samples: int, k: int, temperature: float) -> None:
        super().__init__(in_features, samples, bias=False)
        self.out_features = out_features
        self.k, self.temperature = min(k, samples), temperature
        self.register_buffer("labels", torch.zeros(samples, dtype=torch.int64))

    @classmethod
    def of(cls, features: Tensor, labels: Tensor, num_classes: int, k: int, temperature: float) -> Neighbours:
        """The head of samples (M, D) with their labels, int64 (M,)."""
        head = cls(features.shape[1], num_classes, len(features), k, temperature).to(features.dtype)
        head.weight = nn.Parameter(nn.functional.normalize(features, dim=1), requires_grad=False)
        head.labels = labels
        return head

    def forward(self, features: Tensor) -> Tensor:
        """(N, D) to (N, K): logarithms of probabilities."""
        cosines = nn.functional.normalize(features, dim=1) @ self.weight.T
        nearest, places = cosines.topk(self.k, dim=1)
        votes = (nearest / self.temperature).softmax(1)
        classes = torch.arange(self.out_features, device=features.device)
        chosen = (self.labels[places].unsqueeze(2) == classes).to(votes.dtype)  # (N, k, K)
        shares = (votes.unsqueeze(1) @ chosen).squeeze(1)
        return ((1 - _SHARED) * shares + _SHARED / self.out_features).log()

    def describe(self) -> dict[str, Any]:
        """As plain data."""
        samples, width = self.weight.shape
        return {
            "type": "neighbours",
            "in": width,
            "out": self.out_features,
            "samples": samples,
            "k": self.k,
            "temperature": self.temperature,
        }


def build_head(description: Mapping[str, Any]) -> nn.Linear:
    """The head of a chain's description, to be filled with its tensors."""
    width, outputs = int(description["in"]), int(description["out"])
    if description.get("type") == "neighbours":
        samples, k = int(description["samples"]), int(description["k"])
        return Neighbours(width, outputs, samples, k, float(description["temperature"]))
    return nn.Linear(width, outputs)
