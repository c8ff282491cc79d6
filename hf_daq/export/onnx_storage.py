"""How an ONNX file holds weights of few bits. Runtimes compute what depends on constants alone once, when they load it."""

from __future__ import annotations

from typing import Any

import numpy as np
from onnx import TensorProto, helper

from ..nn.formula import levels
from .onnx_graph import Array, Graph, note


def store_int4(graph: Graph) -> None:
    """Constants of weights that fit -7 to 7 become int4. A Cast to int8, which runtimes compute once when they load the
    file, keeps their arithmetic what it is for int8."""
    casts: dict[str, Any] = {}
    for node in graph.nodes("DequantizeLinear"):
        codes = graph.constant(node.input[0])
        if codes is None or codes.dtype != np.int8 or codes.size < 2 or np.abs(codes.astype(np.int16)).max() > 7:
            continue
        name = node.input[0]
        if name not in casts:
            stored = graph.add_tensor(_int4_tensor(f"{name}.int4", codes))
            casts[name] = helper.make_node("Cast", [stored], [f"{name}.int8"], f"{name}.int8", to=TensorProto.INT8)
        node.input[0] = casts[name].output[0]
    for cast in casts.values():
        graph.graph.node.insert(0, cast)
    graph.index()


def _int4_tensor(name: str, codes: Array) -> Any:
    nibbles = codes.ravel().view(np.uint8) & 15
    nibbles = np.pad(nibbles, (0, len(nibbles) % 2))
    packed = nibbles[::2] | (nibbles[1::2] << 4)
    return helper.make_tensor(name, TensorProto.INT4, codes.shape, packed.tobytes(), raw=True)


def store_few_bits(graph: Graph) -> None:
    """Weights of 1 to 3 bits take these bits in the file."""
    for node in graph.nodes("MatMulNBits"):
        bits, step = (int(note(node, key) or 0) for key in ("hf_daq_bits", "hf_daq_step"))
        if bits <= 3:
            new, name = _from_planes(graph, f"{node.name}.codes", graph.values(node.input[1]), bits, step)
            node.input[1] = name
            for position, other in enumerate(new):
                graph.graph.node.insert(position, other)
    graph.index()


def store_scales_once(graph: Graph) -> None:
    """Half steps are computed from scales; a scale of all blocks of a row, or of all rows, is in the file once."""
    scales = {node.name: node.input[2] for node in graph.nodes("MatMulNBits")}
    half = graph.add("half", np.array(0.5, np.float32))
    for node in graph.nodes("MatMul"):
        scale = scales.get(note(node, "hf_daq_product") or "")
        if scale is not None:
            turned, node.input[1] = f"{node.name}.transposed", f"{node.name}.values"
            graph.graph.node.insert(0, helper.make_node("Mul", [turned, half], [node.input[1]], node.input[1]))
            graph.graph.node.insert(0, helper.make_node("Transpose", [scale], [turned], turned, perm=[1, 0]))
    graph.index()
    for name in dict.fromkeys(node.input[2] for node in graph.nodes("MatMulNBits")):
        scale = graph.values(name)
        part = scale[:, :1] if (scale == scale[:, :1]).all() else scale
        part = part[:1] if (part == part[:1]).all() else part
        if part.size < scale.size:
            constants = [graph.add(f"{name}.each", part), graph.add(f"{name}.shape", np.array(scale.shape))]
            graph.redirect(name, f"{name}.all")
            graph.graph.node.insert(0, helper.make_node("Expand", constants, [f"{name}.all"], f"{name}.all"))
            graph.index()


def _from_planes(graph: Graph, name: str, stored: Array, bits: int, step: int) -> tuple[list[Any], str]:
    """Nodes that compute the stored codes, `first + step q` and two in a byte, and what they compute: from a plane of the two
    lowest bits of q, one of the third, or of the only one, each byte of which stands for the bytes in a table."""
    first = 8 - levels(bits) if step == 2 else 8 - 2 ** (bits - 1)
    q = (np.stack([stored & 15, stored >> 4], -1).astype(np.int8) - first) // step
    shape = graph.add(f"{name}.shape", np.array(stored.shape))
    nodes, parts = [], []
    for width, shift in [(min(bits, 2), 0), (1, 2)][: 2 if bits == 3 else 1]:
        role, count = f"{name}.plane{shift}", 8 // width
        places = np.arange(count) * width
        plane = ((q >> shift & levels(width)).reshape(-1, count) << places).sum(1)
        table = ((np.arange(256)[:, None] >> places & levels(width)) << shift) * step
        table += first if shift + width == bits else 0  # disjoint bits of both planes
        values = graph.add(f"{role}.table", (table[:, ::2] | table[:, 1::2] << 4).astype(np.uint8))
        index = graph.add(role, plane.astype(np.uint8))
        nodes += [
            helper.make_node("Cast", [index], [f"{role}.index"], f"{role}.index", to=TensorProto.INT32),
            helper.make_node("Gather", [values, f"{role}.index"], [f"{role}.bytes"], f"{role}.bytes"),
            helper.make_node("Reshape", [f"{role}.bytes", shape], [f"{role}.codes"], f"{role}.codes"),
        ]
        parts.append(nodes[-1].output[0])
    if len(parts) == 2:
        nodes.append(helper.make_node("BitwiseOr", parts, [f"{name}.both"], f"{name}.both"))
    return nodes, str(nodes[-1].output[0])


def dequantize_at_load(graph: Graph) -> None:
    """Weights of layers with float inputs, as a Cast and a Mul: a DequantizeLinear would be computed in each forward. Where
    inputs are quantized it stays, because ONNX Runtime rounds float weights between codes to 8 bits."""

    def change(node: Any) -> list[Any]:
        if note(node, "hf_daq_float") is None:
            return [node]
        name, scale = node.output[0], graph.add(f"{node.name}.column", graph.values(node.input[1])[:, None])
        cast = helper.make_node("Cast", node.input[:1], [f"{name}.float"], f"{name}.float", to=TensorProto.FLOAT)
        return [cast, helper.make_node("Mul", [cast.output[0], scale], [name], name)]

    graph.rewrite(change)
