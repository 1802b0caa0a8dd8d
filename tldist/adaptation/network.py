"""A network that sees images of two domains in one step, and what learns beside it.

Shapes: N source and M target images of one process, K classes, D features, E outputs of what learns beside.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from tldist.adaptation.adversarial import multilinear, random_multilinear, reverse_gradient
from tldist.models.heads import pool


class Said(NamedTuple):
    """What a network says of N images.

    Attributes:
        logits: (N, K).
        features: (N, D), what the head reads.
        beside: (N, E), of the auxiliary module; E is 0 where there is none.
    """

    logits: Tensor
    features: Tensor
    beside: Tensor


class DomainCritic(nn.Module):
    """A discriminator of domains behind a reversed gradient (DANN, arXiv:1505.07818; CDAN, arXiv:1705.10667).

    It has no BatchNorm: what it says of an image does not depend on the others, nor on how many processes
    share them.

    Args:
        features: D.
        classes: K where it reads the products of features and answers (CDAN); 0: the features alone (DANN).
        hidden: width of its two hidden layers.
        widest: from more products on, so many random ones stand for them (CDAN, eq. 5).
    """

    of_features: Tensor
    of_classes: Tensor

    def __init__(self, features: int, classes: int, hidden: int, widest: int) -> None:
        super().__init__()
        self.reads_answers, width = classes > 0, features * max(1, classes)
        self.is_random = self.reads_answers and width > widest
        if self.is_random:
            self.register_buffer("of_features", torch.randn(features, widest))
            self.register_buffer("of_classes", torch.randn(classes, widest))
            width = widest
        self.layers = nn.Sequential(
            nn.Linear(width, hidden),
            nn.ReLU(),
            nn.Linear(hidden, hidden),
            nn.ReLU(),
            nn.Linear(hidden, 1),
        )

    def forward(self, said: Said, strength: float) -> Tensor:
        """Features and answers to logits (N, 1); above 0: an image of the source."""
        read = said.features
        if self.reads_answers:
            answers = said.logits.detach().softmax(1).to(read.dtype)
            read = (
                random_multilinear(read, answers, self.of_features, self.of_classes)
                if self.is_random
                else multilinear(read, answers)
            )
        logits: Tensor = self.layers(reverse_gradient(read, strength))
        return logits


class SecondHead(nn.Module):
    """A second head on the same features (MCD, arXiv:1712.02560).

    Args:
        features: D.
        classes: K.
    """

    def __init__(self, features: int, classes: int) -> None:
        super().__init__()
        self.head = nn.Linear(features, classes)

    def forward(self, said: Said, strength: float) -> Tensor:
        """Features to logits (N, K)."""
        logits: Tensor = self.head(said.features)
        return logits


class Adapting(nn.Module):
    """A network and what learns beside it, as one module: one forward pass, one exchange of gradients.

    Args:
        net: images (or features of its frozen part) to logits.
        head: the layer of ``net`` that answers; what it reads are the features.
        auxiliary: gets what the network says, and the strength of the reversed gradient; None: nothing.
        reverses_target: reverse the gradient that comes from both heads to the features of target images
            (MCD).
        apart: normalise each domain by its own batch in every BatchNorm layer, and remember the statistics of
            the target alone; False: both together.
    """

    def __init__(
        self,
        net: nn.Module,
        head: nn.Module,
        auxiliary: nn.Module | None,
        *,
        reverses_target: bool = False,
        apart: bool = False,
    ) -> None:
        super().__init__()
        self.net, self.auxiliary = net, auxiliary
        self._head = (head,)  # a part of ``net``: not to be registered twice
        self.reverses_target, self.apart = reverses_target, apart

    def forward(self, images: Tensor, others: Tensor | None, strength: float) -> tuple[Said, Said | None]:
        """What is said of both domains' images.

        Args:
            images: (N, ...), whose labels are learned.
            others: (M, ...), of the target; None: ``images`` are the target's.
            strength: of the reversed gradient.
        """
        if others is None:
            return self._say(images, len(images), strength), None
        if self.apart:
            with _forgetting(self.net):
                source = self._say(images, len(images), strength)
            return source, self._say(others, 0, strength)
        both = self._say(torch.cat([images, others]), len(images), strength)
        first, second = zip(*(part.split([len(images), len(others)]) for part in both))
        return Said(*first), Said(*second)

    def _say(self, images: Tensor, sources: int, strength: float) -> Said:
        """Of images whose first ``sources`` are the source's."""
        read: list[Tensor] = []

        def tap(_: nn.Module, inputs: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
            features, *rest = inputs
            if self.reverses_target:
                reversed_ = reverse_gradient(features[sources:], strength)
                features = torch.cat([features[:sources], reversed_])
            read[:] = [pool(features)]
            return (features, *rest)

        handle = self._head[0].register_forward_pre_hook(tap)
        try:
            logits = self.net(images)
        finally:
            handle.remove()
        said = Said(logits, read[0], logits[:, :0])
        return said if self.auxiliary is None else said._replace(beside=self.auxiliary(said, strength))


@contextmanager
def _forgetting(net: nn.Module) -> Iterator[None]:
    """While inside, BatchNorm layers that learn leave the statistics that they remember as they are."""
    layers = [m for m in net.modules() if isinstance(m, _BatchNorm) and m.training and m.track_running_stats]
    for layer in layers:
        layer.track_running_stats = False
    try:
        yield
    finally:
        for layer in layers:
            layer.track_running_stats = True
