"""Features by PyTorch: the one module of this stage that needs torch."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch

from tldist import distributed
from tldist.distributed import Team
from tldist.models.heads import tapped
from tldist.models.load import input_tensor, load_bundle

_DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


def join_team() -> Team:
    """Join the job that the launcher started, or be alone."""
    return distributed.start()


class TorchEngine:
    """What a bundle's head reads, for batches of images, on this process's device.

    Args:
        path: the bundle.
        precision: fp32, bf16 or fp16 (autocast).
        trust_code: allow a bundle that names code of its own.
    """

    def __init__(self, path: Path, precision: str, trust_code: bool) -> None:
        self.device = distributed.start().device
        distributed.check_precision(precision, self.device)
        model, config = load_bundle(path, trust_code=trust_code)
        self.model, self.how = model.to(self.device), config.preprocessing
        self.precision = precision

    @torch.inference_mode()
    def __call__(self, images: np.ndarray) -> np.ndarray:
        """uint8 images (B, H, W, 3) to float32 features (B, D)."""
        batch = torch.from_numpy(images).to(self.device)
        mixed = torch.autocast(
            self.device.type, dtype=_DTYPES[self.precision], enabled=self.precision != "fp32"
        )
        with tapped(self.model) as features, mixed:
            self.model(input_tensor(batch, self.how))
            return features().float().cpu().numpy()
