"""Passes over the ONNX graph of a quantized network. Each takes a `Graph` and changes it in place."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from typing import Any

import numpy as np
import onnx
from onnx import helper

from .onnx_graph import (
    Array,
    Graph,
    attribute,
    has_bias,
    input_node,
    note,
    offset_convolutions,
    quantized_convolutions,
    set_attribute,
    set_bias,
    weight_node,
)

LARGEST = 127
_BIAS_BITS, _MOST_BIAS_BITS = 24, 28
_END = np.iinfo(np.int64).max
_MOVING = ("Pad", "Slice", "Concat", "Transpose", "Reshape", "Squeeze", "Unsqueeze", "Flatten", "Gather")


def name_values(graph: Graph) -> None:
    """Give the codes and constants of a layer the layer's name: `layer.input_codes`, `layer.weight_codes`, and so on. A
    layer that is called more than once has `layer.input_codes.1`, ... too."""
    names: dict[str, str] = {}
    for node in graph.graph.node:
        role = note(node, "hf_daq")
        if role is not None:
            names[node.output[0]], node.name = role, role
    for node in graph.graph.node:
        for field in (node.input, node.output):
            for position, name in enumerate(field):
                if name in names:
                    field[position] = names[name]
    for info in graph.graph.value_info:
        info.name = names.get(info.name, info.name)
    graph.index()


def separate_weights(graph: Graph) -> None:
    """A DequantizeLinear of its own for each convolution: a layer that is called twice has one, and what is folded into
    it after one call is not for the other."""

    def change(conv: Any) -> list[Any]:
        weight = weight_node(graph, conv) if conv.op_type == "Conv" else None
        if weight is None or id(weight) not in used:
            used.add(id(weight))
            return [conv]
        copy = onnx.NodeProto()
        copy.CopyFrom(weight)
        copy.name = copy.output[0] = f"{weight.output[0]}.{conv.name}"
        conv.input[1] = copy.output[0]
        return [copy, conv]

    used: set[int] = set()
    graph.rewrite(change)


def fold_pads(graph: Graph) -> None:
    """A Pad with zeros in front of a convolution becomes padding of the convolution."""
    for conv in graph.nodes("Conv"):
        while (pad := graph.producer(conv.input[0], "Pad")) is not None:
            both = _image_padding(graph, pad)
            if both is None or attribute(conv, "auto_pad", b"NOTSET") != b"NOTSET":
                break
            own = attribute(conv, "pads", [0] * len(both))
            set_attribute(conv, "pads", [int(value) for value in both + np.array(own)])
            conv.input[0] = pad.input[0]
    graph.index()
    graph.remove([pad for pad in graph.nodes("Pad") if not graph.consumers[pad.output[0]]])


def _image_padding(graph: Graph, pad: Any) -> Array | None:
    """How many zeros a Pad puts before and after height and width; None for a Pad that does something else."""
    amounts = graph.constant(pad.input[1])
    if amounts is None or not _pads_zeros(graph, pad) or (amounts < 0).any() or (len(pad.input) > 3 and pad.input[3]):
        return None
    before, after = np.split(amounts, 2)
    return None if before[:2].any() or after[:2].any() else np.concatenate([before[2:], after[2:]])


def _pads_zeros(graph: Graph, pad: Any) -> bool:
    fill = graph.constant(pad.input[2]) if len(pad.input) > 2 and pad.input[2] else np.zeros(1)
    return attribute(pad, "mode", b"constant") == b"constant" and fill is not None and not fill.any()


def expand_circular_pads(graph: Graph) -> None:
    """Slices and a Concat in the place of a Pad that wraps around, which OpenVINO does not know."""

    def change(node: Any) -> list[Any]:
        amounts = graph.constant(node.input[1]) if node.op_type == "Pad" else None
        if amounts is None or attribute(node, "mode", b"") != b"wrap" or (amounts < 0).any():
            return [node]
        before, after = np.split(amounts, 2)
        axes = graph.values(node.input[3]) if len(node.input) > 3 and node.input[3] else np.arange(len(before))
        nodes, value = [], node.input[0]
        for axis, first, last in zip(axes.tolist(), before.tolist(), after.tolist(), strict=True):
            if first or last:
                nodes += _wrapped(graph, value, f"{node.output[0]}.axis{axis}", axis, first, last)
                value = nodes[-1].output[0]
        return [*nodes, helper.make_node("Identity", [value], [node.output[0]], node.name)]

    graph.rewrite(change)
    for node in graph.nodes("Identity"):
        graph.redirect(node.output[0], node.input[0])
    graph.index()
    graph.remove([node for node in graph.nodes("Identity") if not graph.consumers[node.output[0]]])


def _wrapped(graph: Graph, value: str, name: str, axis: int, first: int, last: int) -> list[Any]:
    """The last `first` values of an axis, all, and the first `last`."""
    nodes, parts = [], [value]
    for role, count, start, end in (("last", first, -first, _END), ("first", last, 0, last)):
        if count:
            part = f"{name}.{role}"
            bounds = [graph.add(f"{part}.bound", np.array([bound])) for bound in (start, end, axis)]
            nodes.append(helper.make_node("Slice", [value, *bounds], [part], part))
            parts.insert(0 if role == "last" else len(parts), part)
    return [*nodes, helper.make_node("Concat", parts, [name], name, axis=axis)]


def move_codes(graph: Graph) -> None:
    """What only moves values about between the input's codes and a convolution (padding that is not zeros) moves the
    codes, so that the convolution follows their DequantizeLinear."""
    moved: dict[int, Any] = {}
    for conv in graph.nodes("Conv"):
        between = _between(graph, conv.input[0]) if weight_node(graph, conv) else None
        moved |= {id(node): dequantize for node, dequantize in between or ()}

    def change(node: Any) -> list[Any]:
        if id(node) not in moved:
            return [node]
        old, constants = node.output[0], moved[id(node)].input[1:]
        for position in range(len(node.input) if node.op_type == "Concat" else 1):
            source = graph.producers[node.input[position]]
            node.input[position] = source.input[0] if source.op_type == "DequantizeLinear" else source.output[0]
        if node.op_type == "Pad" and attribute(node, "mode", b"constant") == b"constant":
            node.input[2:3] = [constants[1]]
        node.output[0] = f"{old}.codes"
        return [node, helper.make_node("DequantizeLinear", [node.output[0], *constants], [old], f"{old}.dequantized")]

    graph.rewrite(change)
    while unused := [node for node in graph.nodes("DequantizeLinear") if not graph.consumers[node.output[0]]]:
        graph.remove(unused)


def _between(graph: Graph, value: str) -> list[tuple[Any, Any]] | None:
    """The moving nodes from the codes to this value, each with the DequantizeLinear of the codes; None where there is
    anything else, or where codes of several scales meet."""
    node = graph.producers.get(value)
    if node is None or node.op_type not in _MOVING or (node.op_type == "Pad" and not _moves(graph, node)):
        return None
    found, sources = [], set()
    for name in node.input if node.op_type == "Concat" else node.input[:1]:
        source = graph.producer(name, "DequantizeLinear")
        before = [] if source is not None else _between(graph, name)
        if before is None:
            return None
        source = before[-1][1] if source is None else source
        sources.add(tuple(source.input[1:]))
        found += before
    return [*found, (node, source)] if len(sources) == 1 else None


def _moves(graph: Graph, pad: Any) -> bool:
    return attribute(pad, "mode", b"constant") != b"constant" or _pads_zeros(graph, pad)


def fold_batch_norm(graph: Graph, rounded: bool = False) -> None:
    """BatchNormalization after a convolution goes into its weight (for integers: its scale and signs) and its bias. Where it
    changes the sign of -128 it stays, or with `rounded` 127 is taken for 128, which is no int8."""
    gone = []
    for norm in graph.nodes("BatchNormalization"):
        conv = graph.producer(norm.input[0], "Conv")
        if conv is None or graph.only_consumer(norm.input[0]) is None:
            continue
        gamma, beta, mean, variance = (graph.values(name).astype(np.float64) for name in norm.input[1:5])
        factor = gamma / np.sqrt(variance + attribute(norm, "epsilon", 1e-5))
        bias = graph.values(conv.input[2]) if has_bias(conv) else np.zeros_like(factor)
        if not _scale_weight(graph, conv, factor, rounded):
            continue
        set_bias(graph, conv, graph.add(f"{conv.name}.bias", ((bias - mean) * factor + beta).astype(np.float32)))
        conv.output[0] = norm.output[0]
        gone.append(norm)
    graph.remove(gone)


def _scale_weight(graph: Graph, conv: Any, factor: Array, rounded: bool) -> bool:
    weight = graph.constant(conv.input[1])
    if weight is not None:
        scaled = (weight * factor.reshape(-1, *(1,) * (weight.ndim - 1))).astype(np.float32)
        conv.input[1] = graph.add(f"{conv.name}.weight", scaled)
        return True
    node = weight_node(graph, conv)
    if node is None:
        return False
    codes, scale = graph.values(node.input[0]), graph.values(node.input[1]) * factor
    per_channel = (-1, *(1,) * (codes.ndim - 1))
    offset = note(node, "hf_daq_offset") is not None
    if not offset and (codes[scale < 0] == -128).any():
        if not rounded:
            return False
        codes = np.maximum(codes, -LARGEST)
    # With an offset the weight is scale * (code + 1/2), whose negative is scale * (~code + 1/2).
    codes = np.where((scale < 0).reshape(per_channel), ~codes if offset else -codes, codes)
    dead = scale == 0
    codes[dead] = 0
    scale = np.abs(scale).astype(np.float32)
    if not offset:
        scale[dead] = 1
    node.input[0] = graph.add(f"{node.output[0]}.codes", codes.astype(np.int8))
    node.input[1] = graph.add(f"{node.output[0]}.scale", scale)
    return True


def drop_activations(graph: Graph) -> None:
    """Relu and Clip(0, c) in front of quantizers with zero point 0, which clip at 0 themselves. Where c lies below the
    largest code, the codes are clipped there."""
    gone = []
    for node in graph.nodes("Relu", "Clip"):
        users = graph.consumers[node.output[0]]
        if not users or any(user is None or user.op_type != "QuantizeLinear" for user in users):
            continue
        limit = _upper_limit(graph, node)
        if limit is None or any(graph.values(user.input[2]) != 0 for user in users):
            continue
        if all(_limit_codes(graph, user, limit) for user in users):
            graph.redirect(node.output[0], node.input[0])
            gone.append(node)
    graph.remove(gone)


def _upper_limit(graph: Graph, node: Any) -> float | None:
    """Infinity for Relu, c for Clip(0, c), else None."""
    if node.op_type == "Relu":
        return float("inf")
    names = [*node.input[1:], "", ""][:2]
    low, high = (graph.constant(name) if name else None for name in names)
    if low is None or low.dtype != np.float32 or low != 0 or (names[1] and high is None):
        return None
    return float("inf") if high is None else float(high)


def _limit_codes(graph: Graph, quantize: Any, limit: float) -> bool:
    clip = graph.only_consumer(quantize.output[0])
    scale = float(graph.values(quantize.input[1]))
    largest = limit if limit == float("inf") else float(np.rint(np.float32(limit) / np.float32(scale)))
    if clip is not None and clip.op_type == "Clip":
        if largest < graph.values(clip.input[2]):
            clip.input[2] = graph.add(f"{clip.output[0]}.largest", np.array(int(largest), np.uint8))
        return True
    return largest >= 255


def add_offsets(graph: Graph) -> None:
    """The missing half step of 8-bit weights, `scale * (code + 1/2)`: scale / 2 times the sum of the inputs under the
    kernel, from a convolution with ones."""
    corrected = {id(conv) for conv in offset_convolutions(graph)}
    graph.rewrite(lambda node: _with_offset(graph, node) if id(node) in corrected else (node,))


def _with_offset(graph: Graph, conv: Any) -> list[Any]:
    weight, name, output = weight_node(graph, conv), f"{conv.name}.offset", conv.output[0]
    codes, half = graph.values(weight.input[0]), graph.values(weight.input[1]) / 2
    one_sum = attribute(conv, "group", 1) == 1
    ones, scale = np.ones_like(codes), half
    if one_sum:
        ones, scale = ones[:1], np.ones(1, np.float32)
    tensors = [graph.add(f"{name}.ones", ones), graph.add(f"{name}.scale", scale.astype(np.float32))]
    tensors.append(graph.add(f"{name}.zero_point", np.zeros(len(ones), np.int8)))
    sums = helper.make_node("Conv", [conv.input[0], f"{name}.weight"], [f"{name}.sums"], f"{name}.sums")
    sums.attribute.extend(conv.attribute)
    new = [helper.make_node("DequantizeLinear", tensors, [f"{name}.weight"], f"{name}.weight", axis=0), sums]
    added = sums.output[0]
    if one_sum:
        factor = graph.add(f"{name}.factor", half.astype(np.float32).reshape(1, -1, *(1,) * (codes.ndim - 2)))
        added = f"{name}.product"
        new.append(helper.make_node("Mul", [sums.output[0], factor], [added], added))
    conv.output[0] = f"{output}.half"
    return [*new, conv, helper.make_node("Add", [conv.output[0], added], [output], f"{name}.add")]


def round_offsets(graph: Graph) -> None:
    """8-bit weights of convolutions rounded to integers of +-127 instead."""
    for conv in offset_convolutions(graph):
        node = weight_node(graph, conv)
        weight = graph.values(node.input[0]).astype(np.float64) + 0.5
        flat = np.abs(weight.reshape(len(weight), -1)).max(1)
        factor = (LARGEST / flat).reshape(-1, *(1,) * (weight.ndim - 1))
        scale = graph.values(node.input[1]) * (flat / LARGEST)
        dead = scale == 0
        codes = np.rint(weight * factor).astype(np.int8)
        codes[dead], scale[dead] = 0, 1
        node.input[0] = graph.add(f"{node.output[0]}.codes", codes)
        node.input[1] = graph.add(f"{node.output[0]}.scale", scale.astype(np.float32))


def float_outputs(graph: Graph) -> dict[str, Any]:
    """Values computed by a quantized convolution, after its Relu or Clip(0, c) if one follows alone, that something
    else than quantizers uses -> the convolution."""
    found = {}
    for conv in quantized_convolutions(graph):
        name = conv.output[0]
        following = graph.only_consumer(name)
        if following is not None and following.op_type in ("Relu", "Clip") and _upper_limit(graph, following):
            name = following.output[0]
        if any(user is None or user.op_type != "QuantizeLinear" for user in graph.consumers[name]):
            found[name] = conv
    return found


def quantize_outputs(graph: Graph, ranges: Mapping[str, tuple[float, float]]) -> None:
    """Eight bits for these values, `ranges[name]` from the lowest to the highest, which includes 0."""

    def change(node: Any) -> list[Any]:
        old = node.output[0]
        if old not in ranges:
            return [node]
        low, high = ranges[old]
        scale = np.float32(max(high - low, 1e-12) / 255)
        constants = [
            graph.add(f"{old}.scale", np.array(scale)),
            graph.add(f"{old}.zero_point", np.array(np.clip(np.rint(-low / scale), 0, 255), np.uint8)),
        ]
        node.output[0], codes = f"{old}.unrounded", f"{old}.codes"
        return [
            node,
            helper.make_node("QuantizeLinear", [node.output[0], *constants], [codes], codes),
            helper.make_node("DequantizeLinear", [codes, *constants], [old], f"{old}.dequantized"),
        ]

    graph.rewrite(change)


def separate_bias(graph: Graph) -> None:
    """The bias of a quantized convolution as a sum of its own: ONNX Runtime would round one inside to an integer."""
    biased = {id(conv) for conv in quantized_convolutions(graph) if has_bias(conv)}

    def change(conv: Any) -> list[Any]:
        if id(conv) not in biased:
            return [conv]
        output, name = conv.output[0], f"{conv.name}.added_bias"
        dims = graph.values(weight_node(graph, conv).input[0]).ndim - 2
        bias = graph.add(name, graph.values(conv.input[2]).reshape(1, -1, *(1,) * dims))
        del conv.input[2]
        conv.output[0] = f"{output}.unbiased"
        return [conv, helper.make_node("Add", [conv.output[0], bias], [output], f"{conv.name}.biased")]

    graph.rewrite(change)


def subtract_bias(graph: Graph) -> None:
    """The bias behind a product of two matrices as a difference: ONNX Runtime would take a sum into the product, and round the bias
    to an integer where the output is quantized."""
    dims = {info.name: len(info.type.tensor_type.shape.dim) for info in graph.graph.value_info}
    for product in graph.nodes("MatMul"):
        output = product.output[0]
        after = graph.only_consumer(output)
        if not graph.producer(product.input[1], "DequantizeLinear") or dims.get(output, 2) != 2:
            continue
        if after is not None and after.op_type == "Add":
            (bias,) = (name for name in after.input if name != output)
            if (values := graph.constant(bias)) is not None:
                after.op_type = "Sub"
                after.input[:] = [output, graph.add(f"{bias}.negative", -values)]
    graph.index()


def integer_bias(graph: Graph) -> None:
    """The bias of convolutions whose output is quantized as int32, in units of input scale times weight scale: what
    runtimes need to compute the convolution in integers."""
    for conv in quantized_convolutions(graph):
        if all(user is not None and user.op_type == "QuantizeLinear" for user in graph.consumers[conv.output[0]]):
            _make_bias_integer(graph, conv)


def _make_bias_integer(graph: Graph, conv: Any) -> None:
    weight, name = weight_node(graph, conv), f"{conv.name}.bias"
    step = graph.values(input_node(graph, conv).input[1]).astype(np.float64)
    codes, scale = graph.values(weight.input[0]), graph.values(weight.input[1]).astype(np.float64)
    bias = graph.values(conv.input[2]).astype(np.float64) if has_bias(conv) else np.zeros(len(scale))
    # Channels whose weight is nothing, or next to nothing, beside the bias take a scale that their bias fits.
    small = ~codes.reshape(len(codes), -1).any(1) | (np.abs(bias) > step * scale * 2**_MOST_BIAS_BITS)
    if small.any():
        fitting = np.maximum(np.abs(bias), 1e-12) / (step * 2**_BIAS_BITS)
        factor = np.where(small, scale / fitting, 1).reshape(-1, *(1,) * (codes.ndim - 1))
        scale = np.where(small, fitting, scale).astype(np.float32)
        weight.input[0] = graph.add(f"{weight.output[0]}.codes", np.rint(codes * factor).astype(np.int8))
        weight.input[1] = graph.add(f"{weight.output[0]}.scale", scale)
    unit = step * scale.astype(np.float64)
    constants = [
        graph.add(f"{name}.codes", np.rint(bias / unit).astype(np.int32)),
        graph.add(f"{name}.scale", unit.astype(np.float32)),
        graph.add(f"{name}.zero_point", np.zeros(len(unit), np.int32)),
    ]
    node = helper.make_node("DequantizeLinear", constants, [f"{name}.dequantized"], f"{name}.dequantized", axis=0)
    set_bias(graph, conv, node.output[0])
    graph.graph.node.insert(0, node)
    graph.index()


def drop_traces(graph: Graph) -> None:
    """Leave out where in the Python code each node comes from, paths of this machine among it."""
    for part in (graph.graph, *graph.graph.node, *graph.graph.value_info, *graph.graph.initializer):
        del part.metadata_props[:]
        part.doc_string = ""


def share_constants(graph: Graph) -> None:
    """Equal constants once, and none that nothing uses."""
    first: dict[bytes, str] = {}
    for tensor in graph.graph.initializer:
        known = first.setdefault(_digest(tensor), tensor.name)
        if known != tensor.name:
            graph.redirect(tensor.name, known)
    graph.index()
    kept = [tensor for tensor in graph.graph.initializer if graph.consumers[tensor.name]]
    del graph.graph.initializer[:]
    graph.graph.initializer.extend(kept)
    names = {tensor.name for tensor in kept}
    stale = [info for info in graph.graph.value_info if info.name not in graph.producers or info.name in names]
    for info in stale:
        graph.graph.value_info.remove(info)


def separate_zero_points(graph: Graph) -> None:
    """One for each int8 weight: ONNX Runtime, told to compute exactly on processors without VNNI, makes weights uint8 and adds
    their zero points under a name that they may have once."""
    used: set[str] = set()
    for node in graph.nodes("DequantizeLinear"):
        codes = graph.constant(node.input[0])
        if codes is not None and codes.dtype == np.int8 and len(node.input) > 2:
            if node.input[2] in used:
                node.input[2] = graph.add(node.input[2], graph.values(node.input[2]))
            used.add(node.input[2])
    graph.index()


def _digest(tensor: Any) -> bytes:
    values = onnx.TensorProto()
    values.CopyFrom(tensor)
    values.ClearField("name")
    return hashlib.sha256(values.SerializeToString(deterministic=True)).digest()
