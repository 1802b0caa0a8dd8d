"""A fine-tuning, prepared: what all its phases share, and how it is measured."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel

from tldist.distributed import Team
from tldist.finetune.adapt import Adaptation
from tldist.finetune.frozen import CachedFeatures, FrozenPart
from tldist.finetune.inputs import Inputs
from tldist.finetune.phases import Phase
from tldist.finetune.recipe import FinetuneRecipe
from tldist.finetune.sweep import one_probe, sweep_settings
from tldist.models.blocks import Block
from tldist.models.lora import Adapters
from tldist.runs import RunFolder
from tldist.training.checkpoint import Checkpoint
from tldist.training.fit import Fit
from tldist.training.measure import Measurement, measure, predictor
from tldist.training.optim import PullToStart
from tldist.training.precision import Numerics
from tldist.training.signals import StopFlag


@dataclass
class Job:
    """A fine-tuning, prepared.

    Attributes:
        recipe, team, folder, inputs: what it was prepared from.
        phases: what learns when.
        learning: the blocks that learn in each phase.
        blocks: of the model, the head last.
        numerics: how it computes.
        workers: decoding processes of each process.
        cores, threads: that this process has; that it trains on while images are decoded beside it.
        frozen_names: parameters and buffers that no phase may change.
        frozen_before: their hash.
        adapters: LoRA, until they are merged.
        pull, average: L2-SP and the moving average of the weights, over all phases.
        adaptation: to a target domain, if any.
        state: where the training stands.
        resumed: the checkpoint that it goes on from, until its optimiser's state is taken over.
        stop: whether this process was asked to stop.
    """

    recipe: FinetuneRecipe
    team: Team
    folder: RunFolder
    inputs: Inputs
    phases: list[Phase]
    learning: dict[Phase, list[Block]]
    blocks: list[Block]
    numerics: Numerics
    workers: int
    cores: int
    threads: int
    frozen_names: list[str]
    frozen_before: str
    adapters: Adapters | None
    pull: PullToStart | None
    average: AveragedModel | None
    adaptation: Adaptation | None
    state: Fit
    resumed: Checkpoint | None
    stop: StopFlag

    @property
    def model(self) -> nn.Module:
        """The bare module, whole."""
        return self.inputs.start.model

    def measure(
        self, precision: str, label: str, *, keep_logits: bool = False, probe: int | None = None
    ) -> Measurement:
        """Measure the whole model as it is now on validation; called by all processes together.

        Args:
            precision: of the matrix products.
            label: of the bar.
            keep_logits: hand over the logits too.
            probe: of a sweep, which of them; None: there is one head.
        """
        assert self.inputs.validation is not None
        self.team.same_buffers(self.model)
        whole = predictor(
            self.model, self.inputs.how, precision=precision, channels_last=self.numerics.channels_last
        )
        return measure(
            lambda images: self._pick(whole(images), probe),
            self.inputs.validation,
            self.inputs.classes,
            self.inputs.how,
            self.team,
            workers=self.workers,
            label=label,
            keep_logits=keep_logits,
            stop=self.stop,
        )

    def _pick(self, logits: Tensor, probe: int | None) -> Tensor:
        return logits if probe is None else one_probe(logits, probe, len(sweep_settings(self.recipe)))

    def measure_cached(
        self,
        part: FrozenPart,
        features: CachedFeatures,
        label: str,
        *,
        keep_logits: bool = False,
        probe: int | None = None,
    ) -> Measurement:
        """The same from cached features of the frozen part."""
        assert self.inputs.validation is not None

        @torch.no_grad()
        def predict(batch: Tensor) -> Tensor:
            if self.model.training:  # setting it walks through every module
                self.model.eval()
            return self._pick(part.suffix(batch).float(), probe)

        self.team.same_buffers(self.model)
        return measure(
            predict,
            self.inputs.validation,
            self.inputs.classes,
            self.inputs.how,
            self.team,
            label=label,
            load=features.batches,
            keep_logits=keep_logits,
            stop=self.stop,
        )
