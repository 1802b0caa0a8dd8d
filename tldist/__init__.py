"""tldist: transfer learning for vision, distributed, up to production.

The stages of the command line are functions of `tldist.api`, with the same settings as keywords::

    from tldist import api
    api.finetune(data="photos", model="resnet18", out="runs/first")
    api.export(bundle="runs/first", profile="cpu-fp32", out="packages/first")

Importing this package imports nothing heavy: torch comes with the stage that needs it.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from tldist.domain import open_domain
    from tldist.models.load import load_bundle
    from tldist.runtime.package import Package

__version__ = "0.1.0"

__all__ = ["Package", "__version__", "load_bundle", "open_domain"]

_LAZY = {
    "load_bundle": "tldist.models.load",
    "open_domain": "tldist.domain",
    "Package": "tldist.runtime.package",
}


def __getattr__(name: str) -> Any:
    if name in _LAZY:
        return getattr(importlib.import_module(_LAZY[name]), name)
    raise AttributeError(f"module 'tldist' has no attribute '{name}'")
