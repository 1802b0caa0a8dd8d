"""Record what mergekit makes of random tensors, for test_mergekit.py. Run where mergekit is installed:

    python tests/fuse/weights/record_mergekit.py tests/fuse/weights/mergekit.safetensors

Needs mergekit alone (it pins other versions of what tldist needs, so that both seldom share an environment).
"""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
from importlib.metadata import version
from pathlib import Path
from unittest import mock

import torch
import yaml
from safetensors.torch import load_file, save_file

SHAPES = {"conv.weight": (6, 3, 3, 3), "fc.weight": (7, 40), "fc.bias": (7,)}
WEIGHTS = (0.5, 1.0, 1.5)
DENSITY, SCALE, ALPHA = 0.3, 0.7, 0.35


def inputs() -> dict[str, dict[str, torch.Tensor]]:
    """Three models and their base; some entries are equal, some opposite."""
    generator = torch.Generator().manual_seed(7)
    base = {name: torch.randn(shape, generator=generator) for name, shape in SHAPES.items()}
    models = {"base": base}
    for number in range(3):
        models[f"m{number}"] = {
            name: tensor + 0.3 * torch.randn(tensor.shape, generator=generator)
            for name, tensor in base.items()
        }
    return models


def runs() -> dict[str, dict[str, object]]:
    """A configuration of mergekit-pytorch for each method."""
    models = [{"model": f"m{n}", "parameters": {"weight": WEIGHTS[n]}} for n in range(3)]
    vectors = {"base_model": "base", "models": models}
    shared = {"lambda": SCALE}
    return {
        "average": {"merge_method": "linear", "models": models},
        "slerp": {
            "merge_method": "slerp",
            "base_model": "m0",
            "models": [{"model": "m0"}, {"model": "m1"}],
            "parameters": {"t": ALPHA},
        },
        "task_arithmetic": {"merge_method": "task_arithmetic", "parameters": shared, **vectors},
        "ties": {"merge_method": "ties", "parameters": {**shared, "density": DENSITY}, **vectors},
        "breadcrumbs": {
            "merge_method": "breadcrumbs",
            "parameters": {**shared, "density": DENSITY, "gamma": 0.05},
            **vectors,
        },
        "model_stock": {
            "merge_method": "model_stock",
            "base_model": "base",
            "models": [{"model": f"m{n}"} for n in range(3)],
        },
        "karcher": {
            "merge_method": "karcher",
            "models": models,
            "parameters": {"max_iter": 100, "tol": 1e-9},
        },
    }


def run_command(work: Path, name: str, config: dict[str, object]) -> dict[str, torch.Tensor]:
    """What ``mergekit-pytorch`` writes."""
    entries = config["models"]
    assert isinstance(entries, list)
    placed = [{**entry, "model": str(work / f"{entry['model']}.safetensors")} for entry in entries]
    config = {**config, "models": placed}
    if "base_model" in config:
        config["base_model"] = str(work / f"{config['base_model']}.safetensors")
    (work / "config.yaml").write_text(yaml.safe_dump(config))
    command = [str(Path(sys.executable).with_name("mergekit-pytorch")), "config.yaml", name]
    subprocess.run(command, cwd=work, check=True)
    return load_file(work / name / "model.safetensors")


def run_dare(models: dict[str, dict[str, torch.Tensor]], consensus: bool, masks: dict[str, torch.Tensor]):
    """mergekit's own function with its random masks replaced by ours; the rescaling is the paper's."""
    from mergekit import sparsify
    from mergekit.merge_methods.generalized_task_arithmetic import get_mask

    found = {}
    for name, base in models["base"].items():
        deltas = []
        for number in range(3):
            mask = masks[f"{name}.{number}"]
            with mock.patch.object(torch, "bernoulli", lambda probabilities, mask=mask: mask):
                sparse = sparsify.bernoulli(models[f"m{number}"][name] - base, DENSITY)
            deltas.append(WEIGHTS[number] * sparse / DENSITY)
        stacked = torch.stack(deltas)
        chosen = get_mask(stacked, "sum", base.dtype) if consensus else torch.ones_like(stacked)
        found[name] = base + SCALE * (stacked * chosen).sum(0)
    return found


def main() -> None:
    models = inputs()
    generator = torch.Generator().manual_seed(8)
    masks = {
        f"{name}.{number}": (torch.rand(shape, generator=generator) < DENSITY).float()
        for name, shape in SHAPES.items()
        for number in range(3)
    }
    stored = {f"mask/{name}": mask for name, mask in masks.items()}
    with tempfile.TemporaryDirectory() as temporary:
        work = Path(temporary)
        for label, tensors in models.items():
            save_file(tensors, work / f"{label}.safetensors")
            stored |= {f"input/{label}/{name}": tensor for name, tensor in tensors.items()}
        for name, config in runs().items():
            stored |= {f"{name}/{key}": t for key, t in run_command(work, name, config).items()}
    for name, consensus in (("dare_linear", False), ("dare_ties", True)):
        stored |= {f"{name}/{key}": t for key, t in run_dare(models, consensus, masks).items()}
    settings = {"weights": WEIGHTS, "density": DENSITY, "scale": SCALE, "alpha": ALPHA, "gamma": 0.05}
    metadata = {"mergekit": version("mergekit"), "torch": torch.__version__, "settings": json.dumps(settings)}
    save_file({name: t.contiguous() for name, t in stored.items()}, sys.argv[1], metadata)


if __name__ == "__main__":
    main()
