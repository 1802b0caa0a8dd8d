"""timm's architectures, by the extra ``timm``: ``timm/NAME``."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from tldist.errors import ModelError, close_matches, needs
from tldist.runtime.preprocess import Preprocessing

PREFIX = "timm/"


def owns(name: str) -> bool:
    """Whether a model name is timm's."""
    return name.startswith(PREFIX)


def build(name: str, num_classes: int, options: dict[str, Any], *, pretrained: bool = False) -> nn.Module:
    """Build one of timm's models.

    Raises:
        MissingExtra: timm is not installed.
        ModelError: unknown to timm.
    """
    with needs("timm"):
        import timm
    plain = name.removeprefix(PREFIX)
    if not timm.is_model(plain):
        raise ModelError(f"unknown model '{name}'. {close_matches(plain, timm.list_models())}")
    model: nn.Module = timm.create_model(plain, pretrained=pretrained, num_classes=num_classes, **options)
    return model


def published(name: str) -> tuple[dict[str, Tensor], tuple[str, ...], Preprocessing]:
    """The pre-trained tensors of a model (its class names are not known to timm), and their preprocessing.

    Raises:
        ModelError: they cannot be downloaded.
    """
    try:
        model = build(name, 1000, {}, pretrained=True)
    except Exception as error:  # hub, network and timm raise their own
        if isinstance(error, ModelError):
            raise
        reason = str(error).strip().splitlines()[0]
        raise ModelError(
            f"the weights of {name} cannot be downloaded ({reason}). Give a file with "
            f"weights=FILE.safetensors, or start from random weights with weights=none."
        ) from error
    return dict(model.state_dict()), (), preprocessing_of(model)


def preprocessing_of(model: nn.Module) -> Preprocessing:
    """How a timm model's inputs are made."""
    from timm.data.config import resolve_model_data_config

    found = resolve_model_data_config(model)
    _, height, width = found["input_size"]
    return Preprocessing(
        height=height,
        width=width,
        resize=round(min(height, width) / found["crop_pct"]),
        interpolation="bilinear" if found["interpolation"] == "bilinear" else "bicubic",
        mean=tuple(found["mean"]),
        std=tuple(found["std"]),
    )
