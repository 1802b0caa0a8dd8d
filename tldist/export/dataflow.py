"""Which value of an ONNX graph comes from which, and where in its model a node belongs. Needs onnx."""

from __future__ import annotations

import ast
from collections.abc import Collection, Iterator

import onnx

_SCOPES = "pkg.torch.onnx.name_scopes"


class Dataflow:
    """The nodes of a graph by what they read and write.

    Args:
        proto: the graph; only its top level is looked at.
    """

    def __init__(self, proto: onnx.ModelProto) -> None:
        self.nodes = list(proto.graph.node)
        self.writer = {name: node for node in self.nodes for name in node.output if name}
        self.readers: dict[str, list[onnx.NodeProto]] = {}
        for node in self.nodes:
            for name in node.input:
                self.readers.setdefault(name, []).append(node)

    def nearest_before(self, value: str, known: Collection[str]) -> tuple[list[str], list[onnx.NodeProto]]:
        """The nearest values before ``value`` that are known, and the nodes in between, its own left out."""
        found, between, seen = [], [], {value}
        waiting = list(self.writer[value].input)
        while waiting:
            name = waiting.pop(0)
            if name in seen or name not in self.writer:
                continue
            seen.add(name)
            if name in known:
                found.append(name)
                continue
            between.append(self.writer[name])
            waiting += self.writer[name].input
        return found, between

    def nearest_after(self, value: str, known: Collection[str]) -> Iterator[str]:
        """The nearest values after ``value`` that are known."""
        waiting, seen = [value], {value}
        while waiting:
            for node in self.readers.get(waiting.pop(0), []):
                for name in node.output:
                    if name in seen:
                        continue
                    seen.add(name)
                    if name in known:
                        yield name
                    else:
                        waiting.append(name)


def module_of(node: onnx.NodeProto) -> str:
    """The path of the PyTorch module that a node was exported from; empty where it does not say so."""
    for entry in node.metadata_props:
        if entry.key == _SCOPES:
            return _module_of_scopes(entry.value)
    # The TorchScript exporter: /model/layer1/layer1.0/conv1/Conv
    parts: list[str] = []
    for part in node.name.strip("/").split("/")[:-1]:
        if parts and part.startswith(f"{parts[-1]}."):
            parts[-1] = part
        else:
            parts.append(part)
    return ".".join(parts)


def _module_of_scopes(text: str) -> str:
    """The dynamo exporter's note: a list of module paths, the operation last."""
    try:
        scopes = ast.literal_eval(text)
    except (ValueError, SyntaxError, MemoryError, RecursionError):
        return ""  # a hostile file says what it likes
    return str(scopes[-2]) if isinstance(scopes, list) and len(scopes) > 1 else ""
