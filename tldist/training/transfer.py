"""What a step learns besides labels: from images of a target domain, over all processes together.

Shapes: N source and M target images of one process, K classes, D features.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from torch import Tensor

from tldist.adaptation.adversarial import rise
from tldist.adaptation.methods import Method, Pair
from tldist.adaptation.network import Said
from tldist.adaptation.recipe import AdaptRecipe
from tldist.data.loader import Batch
from tldist.distributed import Team


@dataclass(frozen=True)
class Others:
    """The target's images of a step.

    Attributes:
        images: the model's input, on the device; None: the step's own images are the target's.
        count: of them that count: the rest keeps this process in step with the others.
        strength: of the method's loss in this step.
    """

    images: Tensor | None
    count: int
    strength: float

    @property
    def arguments(self) -> tuple[Tensor | None, float]:
        """What `tldist.adaptation.network.Adapting` gets besides the step's own images."""
        return self.images, self.strength


@dataclass(frozen=True)
class Transfer:
    """Adaptation, as the loop sees it.

    Attributes:
        method, settings, team: what is computed, and by whom.
        weight: the highest weight of the method's loss.
        share_done: samples seen to the share of the training that is done.
    """

    method: Method
    settings: AdaptRecipe
    team: Team
    weight: float
    share_done: Callable[[float], float]

    @property
    def rises(self) -> bool:
        """Whether the weight rises from 0."""
        asked = self.settings.schedule
        return self.method.opposes if asked == "auto" else asked == "rise"

    def others(self, batch: Batch, samples: float, to_input: Callable[[Tensor], Tensor]) -> Others:
        """The target's images that go with a batch.

        Args:
            batch: of the source; of the target itself where it has no other beside it.
            samples: seen until the middle of the step.
            to_input: the loader's images on the device to the model's input.
        """
        strength = self.weight * (rise(self.share_done(samples)) if self.rises else 1.0)
        if batch.beside is None:
            return Others(None, int(batch.valid.sum()), strength)
        whole = batch.beside.valid
        images = batch.beside.images[whole] if whole.any() else batch.beside.images[:1]
        on_device = images.to(self.team.device, non_blocking=True)
        return Others(to_input(on_device), int(whole.sum()), strength)

    def loss(self, said: tuple[Said, Said | None], labels: Tensor, count: int, others: Others) -> Tensor:
        """The method's loss on what was said of the images of all processes: the same on each of them.

        Each goes backward from it to its own images. So the sum over the processes is the whole gradient,
        however many there are.

        Args:
            said: of this process's images.
            labels: int64 (N,).
            count: of the N images that count.
            others: of the target.
        """
        first, second = said
        source, labels = (first, labels[:count]) if second is not None else (_none_of(first), labels[:0])
        target = first if second is None else second
        pair = Pair(
            self._gather(source, count),
            self.team.gather_rows(labels),
            self._gather(target, others.count),
            self.settings,
        )
        loss = self.method.loss(pair)
        return loss if self.method.opposes else loss * others.strength

    def _gather(self, said: Said, count: int) -> Said:
        parts = (part[:count].float() for part in said)
        return Said(*(self.team.gather_rows(part) if part.shape[1] else part for part in parts))


def logits_of(outputs: Tensor | tuple[Said, Said | None]) -> Tensor:
    """The logits of the images whose labels are learned."""
    return outputs if isinstance(outputs, Tensor) else outputs[0].logits


def _none_of(said: Said) -> Said:
    return Said(*(part[:0] for part in said))
