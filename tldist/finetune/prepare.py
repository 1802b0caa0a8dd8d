"""A fine-tuning made ready: what learns when, what rests, in which numbers, from which checkpoint."""

from __future__ import annotations

import torch
from torch import nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from tldist.data.loader import num_workers
from tldist.data.order import seed_of, steps_per_epoch
from tldist.distributed import Team
from tldist.errors import MachineError, RecipeError
from tldist.finetune.adapt import build_adaptation, candidate_steps
from tldist.finetune.inputs import Inputs
from tldist.finetune.job import Job
from tldist.finetune.phases import plan_phases, total_epochs
from tldist.finetune.recipe import FinetuneRecipe
from tldist.finetune.sweep import sweep_settings, widen
from tldist.models.blocks import Block, cut_blocks, freeze, frozen_tensors, trainable_blocks
from tldist.models.load import hash_tensors
from tldist.models.lora import Adapters, add_lora
from tldist.progress import warn
from tldist.runs import CHECKPOINTS
from tldist.training.checkpoint import Position
from tldist.training.fit import Fit, resume
from tldist.training.ledger import LEDGER, Ledger
from tldist.training.optim import PullToStart
from tldist.training.precision import settle_numerics
from tldist.training.saver import Saver
from tldist.training.signals import StopFlag
from tldist.training.threads import settle_threads
from tldist.training.track import Journal


def prepare(recipe: FinetuneRecipe, team: Team, journal: Journal, inputs: Inputs, stop: StopFlag) -> Job:
    """Plan the phases, note what stays frozen, choose the numerics.

    Raises:
        RecipeError: what shall learn cannot.
        MachineError: this machine cannot do what is asked.
    """
    folder = journal.folder
    if team.shards:
        _check_shardable(recipe)
    model, how = inputs.start.model.to(team.device), inputs.how
    if recipe.sync_batchnorm:
        if team.device.type == "cpu":
            raise MachineError(
                "sync_batchnorm=true needs GPUs: PyTorch has none for CPUs. Leave it out here."
            )
        nn.SyncBatchNorm.convert_sync_batchnorm(model)
    phases, blocks = plan_phases(recipe), cut_blocks(model)
    if recipe.sweep.is_on:
        if inputs.validation is None:
            raise RecipeError(
                "sweep.* chooses on validation; give the domain a val split, or validation= a share."
            )
        widen(model, blocks[-1], len(sweep_settings(recipe)))
    learning = {phase: trainable_blocks(model, blocks, phase.train) for phase in phases}
    adapters: Adapters | None = None
    if recipe.lora.rank:
        everywhere = [block for live in learning.values() for block in live]
        adapters = _adapt(recipe, model, everywhere, blocks[-1], (how.height, how.width))
        learning = {phase: adapters.beside(live, blocks[-1]) for phase, live in learning.items()}
    adaptation = build_adaptation(recipe, inputs, learning.values(), blocks[-1])
    if adaptation and adaptation.method.keeps_head:
        learning = {phase: [b for b in live if b is not blocks[-1]] for phase, live in learning.items()}
    auxiliary = adaptation.auxiliary.to(team.device) if adaptation and adaptation.auxiliary else None
    resting = [frozen_tensors(model, freeze(model, live)) for live in learning.values()]
    frozen_names = [name for name in resting[0] if all(name in names for names in resting[1:])]
    last = freeze(model, learning[phases[-1]])
    share = -(-recipe.batch_size // (team.size * recipe.gradient_accumulation))
    numerics = settle_numerics(
        recipe.precision,
        recipe.channels_last,
        folder.path / "precision.json",
        model,
        last,
        (how.height, how.width),
        team,
        share,
    )
    model.to(memory_format=numerics.memory_format)
    workers = num_workers(recipe.workers, team.local_size)
    backbone = [name for name, _ in model.named_parameters() if not blocks[-1].owns(name)]
    frozen_before = hash_tensors(model.state_dict(), frozen_names)
    strength = recipe.optimizer.l2_sp
    pull = PullToStart(model, backbone, strength) if strength else None
    average = _average(model, recipe.ema) if recipe.ema else None
    position, resumed = resume(folder, team, model, average, auxiliary)
    return Job(
        recipe=recipe,
        team=team,
        folder=folder,
        inputs=inputs,
        phases=phases,
        learning=learning,
        blocks=blocks,
        numerics=numerics,
        workers=workers,
        cores=torch.get_num_threads(),
        threads=settle_threads(team, model, (how.height, how.width), inputs.train, workers),
        frozen_names=frozen_names,
        frozen_before=frozen_before,
        adapters=adapters,
        pull=pull,
        average=average,
        adaptation=adaptation,
        state=_state(recipe, team, journal, inputs, position, frozen_names),
        stop=stop,
        resumed=resumed,
    )


def _check_shardable(recipe: FinetuneRecipe) -> None:
    """Refuse what reads or copies whole weights in every step."""
    asked = {
        "ema": recipe.ema is not None,
        "optimizer.l2_sp": recipe.optimizer.l2_sp > 0,
        "lora.rank": recipe.lora.rank > 0,
        "compile": recipe.compile,
        "adapt.method": recipe.adapt.is_on,
    }
    refused = [name for name, is_asked in asked.items() if is_asked]
    if refused:
        raise RecipeError(
            f"{', '.join(refused)}: not with FSDP, which spreads the weights over the processes. "
            f"Leave it out, or start with a configuration of plain data-parallel processes (DDP)."
        )


def _adapt(
    recipe: FinetuneRecipe, model: nn.Module, learning: list[Block], head: Block, size: tuple[int, int]
) -> Adapters:
    """Adapters wherever any phase learns; their first matrices depend on the seed alone."""
    torch.manual_seed(seed_of("lora", recipe.seed))
    rank, alpha, dropout = recipe.lora.rank, recipe.lora.alpha or 2.0 * recipe.lora.rank, recipe.lora.dropout
    adapters = add_lora(model, learning, head, size, rank=rank, alpha=alpha, dropout=dropout)
    if adapters.bypassed:
        warn(f"no LoRA in {len(adapters.bypassed)} layers whose weights the model reads without calling them")
    if adapters.grouped:
        warn(f"no LoRA in {len(adapters.grouped)} grouped convolutions: they cannot be merged back")
    return adapters


def _average(model: nn.Module, decay: float) -> AveragedModel:
    return AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(decay), use_buffers=True)


def _state(
    recipe: FinetuneRecipe,
    team: Team,
    journal: Journal,
    inputs: Inputs,
    position: Position,
    frozen: list[str],
) -> Fit:
    folder, epochs = journal.folder, total_epochs(recipe)
    epoch_steps = steps_per_epoch(len(inputs.train), recipe.batch_size)
    candidates = candidate_steps(recipe.adapt.candidates, epochs, epoch_steps) if inputs.target else {}
    ledger = Ledger(inputs.train, folder.path / LEDGER)
    ledger.found = {int(index): reason for index, reason in position.broken.items()}
    return Fit(
        folder=folder,
        journal=journal,
        position=position,
        ledger=ledger,
        images=len(inputs.train),
        batch_size=recipe.batch_size,
        epochs=epochs,
        validates=inputs.validation is not None,
        every_steps=recipe.checkpoint.every_steps,
        saver=Saver(folder.path / CHECKPOINTS, recipe.checkpoint.keep, frozen, team, candidates.values()),
        patience=recipe.patience,
    )
