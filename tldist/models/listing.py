"""What there is to choose from: architectures by name, and the blocks and layers of one."""

from __future__ import annotations

import fnmatch
from typing import Any

from accelerate import init_empty_weights
from torch import nn
from torchvision import models as torchvision_models

from tldist.bundle import read_bundle
from tldist.domain import natural_key
from tldist.errors import RecipeError, close_matches
from tldist.models.blocks import Block, cut_blocks
from tldist.models.description import architecture_name, build_model
from tldist.models.heads import Several, find_head, head_width, num_logits, single_models
from tldist.models.load import names_folder
from tldist.models.recipe import LayersRecipe, ModelsRecipe
from tldist.models.zoo import build_network, describe_network, list_architectures
from tldist.runs import Outcome

_CLASSES = 1000
"""Outputs of a network that is shown by its name: those of the published weights."""


def list_models(recipe: ModelsRecipe) -> Outcome:
    """The architectures that match a pattern, with their size and weights.

    Raises:
        RecipeError: none matches.
    """
    names = sorted(list_architectures(), key=natural_key)
    pattern = recipe.pattern.lower()
    found = [name for name in names if pattern in name or fnmatch.fnmatchcase(name, pattern)]
    if not found:
        raise RecipeError(f"no model matches '{recipe.pattern}'. {close_matches(pattern.strip('*'), names)}")
    rows = [_describe(name) for name in found]
    width = max(map(len, found))
    lines = [
        f"{row['name'].ljust(width)}  {row['parameters'] / 1e6:7.1f} M  {', '.join(row['weights'])}"
        for row in rows
    ]
    text = "\n".join([f"{'model'.ljust(width)}  parameters  weights", *lines])
    return Outcome("models", values={"models": rows}, text=text, next_command=f"tldist layers {found[0]}")


def _describe(name: str) -> dict[str, Any]:
    weights = torchvision_models.get_model_weights(name)
    return {
        "name": name,
        "parameters": weights.DEFAULT.meta["num_params"],
        "weights": [weight for weight in weights.__members__ if weight != "DEFAULT"],
    }


def list_layers(recipe: LayersRecipe) -> Outcome:
    """The blocks of a model in order, the head last, and the layers of each.

    Raises:
        ModelError: the architecture is unknown.
        BundleError: a folder that is not a bundle.
    """
    name, model = _build(recipe)
    singles = single_models(model)
    rows = [row for single in singles for row in _rows(single, _path_in(model, single))]
    several = isinstance(model, Several)
    if several:  # as a whole it does not learn
        rows = [{**row, "train": ""} for row in rows]
    values = {
        "model": name,
        "parameters": sum(row["parameters"] for row in rows),
        "features": sum(head_width(find_head(single)[1]) for single in singles),
        "outputs": num_logits(model),
        "head": None if several else find_head(model)[0],
        "blocks": rows,
    }
    return Outcome("layers", values=values, text=_words(values))


def _path_in(model: nn.Module, part: nn.Module) -> str:
    """What stands before the names of a part: empty for the whole, else its path and a dot."""
    path = next(path for path, module in model.named_modules() if module is part)
    return f"{path}." if path else ""


def _rows(model: nn.Module, prefix: str) -> list[dict[str, Any]]:
    """The blocks of a model with one head."""
    blocks = cut_blocks(model)
    return [
        {
            "name": f"{prefix}{block.name}",
            "train": "head" if block is blocks[-1] else f"last:{len(blocks) - 1 - place}",
            "parameters": _count(block, model),
            "layers": [{**layer, "name": prefix + layer["name"]} for layer in _layers_of(block, model)],
        }
        for place, block in enumerate(blocks)
    ]


def _build(recipe: LayersRecipe) -> tuple[str, nn.Module]:
    """The module without memory for its weights."""
    # torch.device("meta") would do too, but RegNet computes its widths with tensors.
    with init_empty_weights():
        if names_folder(recipe.model):
            description = read_bundle(recipe.model, verify=False)[1].model
            return architecture_name(description), build_model(description, trust_code=recipe.trust_code)
        described = describe_network(recipe.model, _CLASSES)
        return recipe.model, build_network(described, trust_code=True)  # named by the person at the keyboard


def _layers_of(block: Block, model: nn.Module) -> list[dict[str, str]]:
    """The modules of a block that have no children, by dotted name."""
    return [
        {"name": path, "type": type(module).__name__}
        for path, module in model.named_modules()
        if path and not any(True for _ in module.children()) and block.owns(path)
    ]


def _count(block: Block, model: nn.Module) -> int:
    return sum(parameter.numel() for name, parameter in model.named_parameters() if block.owns(name))


def _words(values: dict[str, Any]) -> str:
    lines = [
        f"{values['model']}: {values['parameters']:,} parameters, features of width {values['features']:,}, "
        f"{values['outputs']:,} outputs",
        "blocks in order; train=last:N trains block last:N and all below it, train=head the head alone"
        if values["head"]
        else "the blocks of the members in order; an ensemble is not fine-tuned as a whole, its members are",
    ]
    for row in values["blocks"]:
        lines.append(f"\n{row['train']:8}  {row['name']}  ({row['parameters']:,} parameters)")
        width = max((len(layer["name"]) for layer in row["layers"]), default=0)
        lines += [f"          {layer['name'].ljust(width)}  {layer['type']}" for layer in row["layers"]]
    return "\n".join(lines)
