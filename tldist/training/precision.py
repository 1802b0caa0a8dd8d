"""precision=auto: the fastest number format and memory layout for this model on this machine, by trial."""

from __future__ import annotations

import copy
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from tldist.distributed import Precision, Team, check_precision, launcher_precision
from tldist.errors import RecipeError
from tldist.files import read_json, write_json
from tldist.models.blocks import training_mode

TRIAL_BATCH = 16
TRIAL_STEPS = 3


@dataclass(frozen=True)
class Numerics:
    """How a run computes.

    Attributes:
        precision: of the matrix products; weights stay fp32.
        channels_last: memory layout of images and kernels.
        reason: why, for people.
        trial_ms: milliseconds a step of each variant tried.
    """

    precision: Precision
    channels_last: bool
    reason: str
    trial_ms: dict[str, float]

    @property
    def memory_format(self) -> torch.memory_format:
        """The layout as PyTorch names it."""
        return torch.channels_last if self.channels_last else torch.contiguous_format


def settle_numerics(
    asked: str,
    layout: str,
    file: Path,
    model: nn.Module,
    frozen: list[nn.Module],
    size: tuple[int, int],
    team: Team,
    batch: int,
) -> Numerics:
    """What this run computes with: as asked, as chosen at an earlier start, or by trial.

    Args:
        asked: the recipe's ``precision``.
        layout: the recipe's ``channels_last``: auto, true or false.
        file: where the choice is written, and read on resume.
        model: on the CPU or the device; it is not changed.
        frozen: its frozen modules.
        size: height and width of its input.
        team: called by all processes together; the main process decides.
        batch: images that this process handles at once.
    """

    def decide() -> Numerics:
        if file.is_file():
            return Numerics(**read_json(file, RecipeError, "precision of a run"))
        chosen = _decide(asked, layout, model, frozen, size, team, min(batch, TRIAL_BATCH))
        write_json(file, asdict(chosen))
        return chosen

    return team.on_main(decide)


def _decide(
    asked: str,
    layout: str,
    model: nn.Module,
    frozen: list[nn.Module],
    size: tuple[int, int],
    team: Team,
    batch: int,
) -> Numerics:
    fixed = launcher_precision() if asked == "auto" else asked
    on_gpu = team.device.type == "cuda"
    if fixed is not None:
        # No trial: what is asked for by name gives the same numbers each time.
        check_precision(fixed, team.device)
        reason = "as the recipe asks" if asked != "auto" else "as the launcher's configuration asks"
        return Numerics(fixed, on_gpu if layout == "auto" else layout == "true", reason, {})  # type: ignore[arg-type]
    lays_out = any(parameter.dim() == 4 for parameter in model.parameters())
    layouts = [layout == "true"] if layout != "auto" else [False, True] if lays_out else [False]
    formats: list[Precision] = ["fp32"]
    if not on_gpu or torch.cuda.is_bf16_supported():
        formats.append("bf16")
    variants = [(precision, channels_last) for precision in formats for channels_last in layouts]
    times = {variant: time_steps(model, frozen, size, team.device, batch, *variant) for variant in variants}
    (precision, channels_last), best = min(times.items(), key=lambda item: item[1])
    named = {f"{p}{' channels_last' if c else ''}": round(1000 * t, 2) for (p, c), t in times.items()}
    reason = f"the fastest of {len(named)} by trial: {1000 * best:.1f} ms a step of {batch} images"
    return Numerics(precision, channels_last, reason, named)


def time_steps(
    model: nn.Module,
    frozen: list[nn.Module],
    size: tuple[int, int],
    device: torch.device,
    batch: int,
    precision: Precision,
    channels_last: bool,
) -> float:
    """Seconds of one forward and backward pass, the least of a few, on a copy of the model."""
    memory = torch.channels_last if channels_last else torch.contiguous_format
    places = {module: place for place, module in enumerate(model.modules())}
    trial: Any = copy.deepcopy(model).to(device).to(memory_format=memory)
    modules = list(trial.modules())
    training_mode(trial, [modules[places[module]] for module in frozen])
    images = torch.rand(max(2, batch), 3, *size, device=device).contiguous(memory_format=memory)
    seconds = []
    for _ in range(TRIAL_STEPS):
        begin = time.perf_counter()
        with torch.autocast(device.type, dtype=torch.bfloat16, enabled=precision == "bf16"):
            loss = trial(images).float().square().mean()
        loss.backward()
        if device.type == "cuda":
            torch.cuda.synchronize()
        seconds.append(time.perf_counter() - begin)
    return min(seconds[1:])
