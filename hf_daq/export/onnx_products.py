"""What ONNX Runtime computes convolutions of integers with: matrix products, and float with groups or in other than two
dimensions."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
from onnx import TensorProto, helper

from .onnx_graph import Graph, attribute, has_bias, input_node, note, quantized_convolutions, weight_node

_MARK = "hf_daq", "WrittenForOnnxRuntimeAlone"


def convolutions_as_products(graph: Graph) -> None:
    """Quantized convolutions without groups become matrix products of the codes under the kernel, gathered with the
    channels last. ONNX Runtime has no integer convolution with a float output that is fast, but such a product."""
    sizes = {info.name: _sizes(info) for info in graph.graph.value_info}
    wanted = {
        id(conv): conv
        for conv in quantized_convolutions(graph)
        if attribute(conv, "group", 1) == 1
        and all(len(sizes.get(name, ())) == 2 for name in (conv.input[0], conv.output[0]))
    }
    graph.rewrite(lambda node: _as_product(graph, node, sizes) if id(node) in wanted else (node,))
    graph.remove([node for node in graph.nodes("DequantizeLinear") if not graph.consumers[node.output[0]]])


def others_in_float(graph: Graph) -> None:
    """Quantized convolutions with groups, or not in two dimensions, become float ones, of codes with a weight that the runtime
    makes of its integers when it loads the file. ONNX Runtime computes sums of few products several times as fast in float as
    in integers. There is no DequantizeLinear here, because it would round weights and biases behind one to integers of its own."""
    wanted = {
        id(conv)
        for conv in quantized_convolutions(graph)
        if attribute(conv, "group", 1) > 1 or graph.values(weight_node(graph, conv).input[0]).ndim != 4
    }
    graph.rewrite(lambda node: _in_float(graph, node) if id(node) in wanted else (node,))
    graph.remove([node for node in graph.nodes("DequantizeLinear") if not graph.consumers[node.output[0]]])


def refuse_others(graph: Graph) -> None:
    """Let ONNX Runtime alone open the file: the first output passes through a function of the file that does nothing. ONNX
    Runtime takes it apart when it loads the file, and OpenVINO, which has no functions, names it in its error."""
    output = next(output.name for output in graph.graph.output if output.name in graph.producers)
    before, last = f"{output}.value", graph.producers[output]
    graph.redirect(output, before)
    last.output[list(last.output).index(output)] = before
    does_nothing = [helper.make_node("Identity", ["x"], ["y"])]
    standard = [entry for entry in graph.model.opset_import if entry.domain == ""]
    graph.model.functions.append(helper.make_function(*_MARK, ["x"], ["y"], does_nothing, standard))
    graph.model.opset_import.append(helper.make_opsetid(_MARK[0], 1))
    graph.graph.node.append(helper.make_node(_MARK[1], [before], [output], domain=_MARK[0]))
    graph.index()


def _in_float(graph: Graph, conv: Any) -> list[Any]:
    name, data, weight = conv.name, input_node(graph, conv), weight_node(graph, conv)
    zero, step = graph.values(data.input[2]), graph.values(data.input[1])
    nodes = []

    def emit(kind: str, inputs: list[str], role: str, **attributes: Any) -> str:
        nodes.append(helper.make_node(kind, inputs, [f"{name}.{role}"], f"{name}.{role}", **attributes))
        return f"{name}.{role}"

    def constant(role: str, value: Any) -> str:
        return graph.add(f"{name}.{role}", np.asarray(value, np.float32))

    x = emit("Cast", [data.input[0]], "codes", to=TensorProto.FLOAT)
    if zero:
        x = emit("Sub", [x, constant("zero", zero)], "centered")
    integers = emit("Cast", [weight.input[0]], "integers", to=TensorProto.FLOAT)
    if note(weight, "hf_daq_offset") is not None:
        integers = emit("Add", [integers, constant("half", 0.5)], "halves")
    scale = graph.values(weight.input[1]) * step
    scale = scale.reshape(-1, *(1,) * (graph.values(weight.input[0]).ndim - 1))
    conv.input[:2] = [x, emit("Mul", [integers, constant("scale", scale)], "float_weight")]
    return [*nodes, conv]


def _sizes(info: Any) -> tuple[int, ...]:
    """Height and width, or () where they are not known."""
    sizes = tuple(dim.dim_value for dim in info.type.tensor_type.shape.dim[2:])
    return sizes if all(sizes) else ()


def _as_product(graph: Graph, conv: Any, sizes: Mapping[str, tuple[int, ...]]) -> list[Any]:
    name, data, weight = conv.name, input_node(graph, conv), weight_node(graph, conv)
    codes, nodes = graph.values(weight.input[0]), []

    def emit(kind: str, inputs: list[str], role: str, **attributes: Any) -> str:
        nodes.append(helper.make_node(kind, inputs, [f"{name}.{role}"], f"{name}.{role}", **attributes))
        return f"{name}.{role}"

    x = emit("Transpose", [data.input[0]], "channels_last", perm=[0, 2, 3, 1])
    x = _gathered(graph, conv, x, data.input[2], sizes, codes.shape, emit)
    x = emit("DequantizeLinear", [x, *data.input[1:]], "window")
    scale = graph.values(weight.input[1])
    matrix = graph.add(f"{name}.matrix_codes", codes.transpose(2, 3, 1, 0).reshape(-1, len(codes)))
    zeros = graph.add(f"{name}.matrix_zero_point", np.zeros(len(codes), np.int8))
    output = emit(
        "MatMul", [x, emit("DequantizeLinear", [matrix, weight.input[1], zeros], "matrix", axis=1)], "product"
    )
    if has_bias(conv):
        output = emit("Add", [output, conv.input[2]], "biased")
    if note(weight, "hf_daq_offset") is not None:
        ones = graph.add(f"{name}.ones_codes", np.ones((codes[0].size, 1), np.int8))
        one = [graph.add(f"{name}.one", np.array(1, np.float32)), graph.add(f"{name}.zero", np.array(0, np.int8))]
        sums = emit("MatMul", [x, emit("DequantizeLinear", [ones, *one], "ones")], "sums")
        half = graph.add(f"{name}.half_step", (scale / 2).astype(np.float32))
        output = emit("Add", [output, emit("Mul", [sums, half], "offset")], "corrected")
    nodes.append(helper.make_node("Transpose", [output], list(conv.output), f"{name}.output", perm=[0, 3, 1, 2]))
    return nodes


def _gathered(
    graph: Graph, conv: Any, x: str, zero_point: str, sizes: Any, shape: tuple[int, ...], emit: Callable[..., str]
) -> str:
    """The codes under the kernel for each output: (N, H, W, C) to (N, height, width, kernel * C)."""
    channels, kernel, output = shape[1], shape[2:], sizes[conv.output[0]]
    top, left, bottom, right = attribute(conv, "pads", [0] * 4)
    strides, dilations = attribute(conv, "strides", [1, 1]), attribute(conv, "dilations", [1, 1])
    if top or left or bottom or right:
        amounts = graph.add(f"{conv.name}.amounts", np.array([0, top, left, 0, 0, bottom, right, 0]))
        x = emit("Pad", [x, amounts, zero_point], "padded")
    if kernel == (1, 1) and tuple(strides) == (1, 1):
        return x
    # Places in the padded image, flattened: a small sum that runtimes compute once when they load the file.
    height, width = (np.arange(size) * stride for size, stride in zip(output, strides, strict=True))
    down, across = (np.arange(size) * dilation for size, dilation in zip(kernel, dilations, strict=True))
    rows = (height[:, None, None, None] + down[:, None]) * (sizes[conv.input[0]][1] + left + right)
    columns = width[:, None, None] + across
    places = [graph.add(f"{conv.name}.place_rows", rows), graph.add(f"{conv.name}.place_columns", columns)]
    x = emit("Reshape", [x, graph.add(f"{conv.name}.flat_shape", np.array([0, -1, channels]))], "flat")
    x = emit("Gather", [x, emit("Add", places, "places")], "gathered", axis=1)
    return emit("Reshape", [x, graph.add(f"{conv.name}.shape", np.array([0, *output, -1]))], "together")
