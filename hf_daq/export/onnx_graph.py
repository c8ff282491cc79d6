"""An ONNX graph with its constants as arrays, and what there is in that of a quantized network.

Quantized convolutions look like this, with `scale` a constant of shape (), `weight_scale` one of shape (out,):

    x -> QuantizeLinear(scale, zero_point) -> [Clip] -> DequantizeLinear -> Conv(., DequantizeLinear(weight), bias)
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterable
from typing import Any

import numpy as np
import onnx
from onnx import helper, numpy_helper

Array = np.ndarray[Any, Any]


class Graph:
    """A graph with its constants as arrays. Call `index` after nodes were changed by hand.

    producers: value -> node. consumers: value -> nodes, with None for an output of the graph.
    """

    def __init__(self, model: Any) -> None:
        self.model, self.graph = model, model.graph
        self._tensors = {tensor.name: tensor for tensor in self.graph.initializer}
        self.index()

    def index(self) -> None:
        self.producers = {output: node for node in self.graph.node for output in node.output}
        self.consumers: dict[str, list[Any]] = defaultdict(list)
        for node in self.graph.node:
            for name in node.input:
                self.consumers[name].append(node)
        for output in self.graph.output:
            self.consumers[output.name].append(None)

    def constant(self, name: str) -> Array | None:
        """The values of a constant, or None for a value that is computed."""
        node, tensor = self.producers.get(name), self._tensors.get(name)
        if node is not None and node.op_type == "Constant":
            tensor = node.attribute[0].t
        values: Array | None = None if tensor is None else numpy_helper.to_array(tensor)
        return values

    def values(self, name: str) -> Array:
        """The values of what must be a constant."""
        values = self.constant(name)
        if values is None:
            raise KeyError(name)
        return values

    def add_tensor(self, tensor: Any) -> str:
        """Add a constant, under its name or the next one that is free. None is replaced: others may use it."""
        name, number = tensor.name, 0
        while tensor.name in self._tensors:
            number += 1
            tensor.name = f"{name}.{number}"
        self.graph.initializer.append(tensor)
        self._tensors[tensor.name] = self.graph.initializer[-1]
        return str(tensor.name)

    def add(self, name: str, values: Array) -> str:
        return self.add_tensor(numpy_helper.from_array(np.ascontiguousarray(values).reshape(values.shape), name))

    def nodes(self, *kinds: str) -> list[Any]:
        return [node for node in self.graph.node if node.op_type in kinds]

    def producer(self, name: str, kind: str) -> Any:
        """The node of this kind that computes a value, or None."""
        node = self.producers.get(name)
        return node if node is not None and node.op_type == kind else None

    def only_consumer(self, name: str) -> Any:
        """The node that alone uses a value, or None."""
        users = self.consumers[name]
        return users[0] if len(users) == 1 else None

    def rewrite(self, change: Callable[[Any], Iterable[Any]]) -> None:
        """Put `change(node)` in the place of each node."""
        nodes = [new for node in list(self.graph.node) for new in change(node)]
        del self.graph.node[:]
        self.graph.node.extend(nodes)
        self.index()

    def remove(self, nodes: Iterable[Any]) -> None:
        gone = {id(node) for node in nodes}
        self.rewrite(lambda node: () if id(node) in gone else (node,))

    def redirect(self, old: str, new: str) -> None:
        """Let every node that uses the value `old` use `new`."""
        for node in self.consumers[old]:
            if node is not None:
                for position, name in enumerate(node.input):
                    if name == old:
                        node.input[position] = new


def attribute(node: Any, name: str, default: Any = None) -> Any:
    return next((helper.get_attribute_value(found) for found in node.attribute if found.name == name), default)


def set_attribute(node: Any, name: str, value: Any) -> None:
    kept = [found for found in node.attribute if found.name != name]
    del node.attribute[:]
    node.attribute.extend([*kept, helper.make_attribute(name, value)])


def note(node: Any, key: str) -> str | None:
    """What the emitted node says of itself."""
    return next((prop.value for prop in node.metadata_props if prop.key == key), None)


def has_bias(conv: Any) -> bool:
    return len(conv.input) > 2 and bool(conv.input[2])


def set_bias(graph: Graph, conv: Any, name: str) -> None:
    if len(conv.input) > 2:
        conv.input[2] = name
    else:
        conv.input.append(name)


def weight_node(graph: Graph, conv: Any) -> Any:
    """The DequantizeLinear of constant integers, with a scale for each channel, that is the weight; or None."""
    node = graph.producer(conv.input[1], "DequantizeLinear")
    if node is None or graph.constant(node.input[0]) is None:
        return None
    return node if graph.values(node.input[1]).ndim == 1 else None


def input_node(graph: Graph, conv: Any) -> Any:
    """The DequantizeLinear of the input's codes, or None."""
    node = graph.producer(conv.input[0], "DequantizeLinear")
    return node if node is not None and graph.constant(node.input[0]) is None else None


def quantized_convolutions(graph: Graph) -> list[Any]:
    """Convolutions of codes with integers."""
    return [conv for conv in graph.nodes("Conv") if input_node(graph, conv) is not None and weight_node(graph, conv)]


def offset_convolutions(graph: Graph) -> list[Any]:
    """Convolutions with `scale * (code + 1/2)`, of which the weight's node holds `scale * code`."""
    weights = [(conv, weight_node(graph, conv)) for conv in graph.nodes("Conv")]
    return [conv for conv, weight in weights if weight is not None and note(weight, "hf_daq_offset") is not None]


def with_outputs(model: Any, names: Iterable[str], kind: int) -> Any:
    """A copy of a model that returns these values of the element type `kind` too."""
    copy = onnx.ModelProto()
    copy.CopyFrom(model)
    copy.graph.output.extend(helper.make_tensor_value_info(name, kind, None) for name in names)
    return copy


def input_codes(model: Any) -> list[str]:
    """The names of the values with the input codes of layers."""
    return [name for node in model.graph.node for name in node.output if ".input_codes" in name]
