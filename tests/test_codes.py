"""Layers that compute from their codes: the same weights bit for bit, the same products up to rounding."""

import copy
import itertools
import os
import subprocess

import pytest
import torch
import torch.nn.functional as F
from packed_layers import USUAL, load
from safetensors.torch import load_file
from text_models import tiny_llama, tokens
from torch import nn
from transformers.pytorch_utils import Conv1D

import hf_daq
from hf_daq import DaqConfig
from hf_daq.nn import codes as computing
from hf_daq.nn import native
from hf_daq.nn.bitpack import pack_bits, unpack_bits
from hf_daq.nn.codes import Coded, encode, packed_linear, works
from hf_daq.nn.functional import dequantize_weight
from hf_daq.nn.kernels import compiler
from hf_daq.nn.packed import packed_layers
from hf_daq.nn.paths import bit_for_bit
from measure import decoding

pytestmark = pytest.mark.skipif(compiler() is None or os.name == "nt", reason="no compiler of C++")


@pytest.fixture(autouse=True)
def _kernel(request, folder, monkeypatch):
    """For weights of any size; in the build that a test asks for."""
    build = getattr(request, "param", "native")
    try:
        functions = native._declared(load(folder, build))
    except subprocess.CalledProcessError as error:
        pytest.skip(f"the compiler does not know this build: {native._reason(error)}")
    monkeypatch.setattr(computing, "library", lambda: functions)
    monkeypatch.setattr(computing, "_SMALL", 0)
    monkeypatch.setattr("hf_daq.nn.trust._agreed", {})
    works.cache_clear()
    yield
    works.cache_clear()


SHAPES = [(1, 5, None), (3, 7, 3), (3, 100, None), (2, 129, 16), (5, 129, 5), (3, 192, 64), (2, 320, 128), (4, 72, 32)]


def coded(bits, grid, granularity, shape, group_size, seed=0):
    generator = torch.Generator().manual_seed(seed)
    rows, columns = shape
    codes = torch.randint(2**bits, shape, dtype=torch.uint8, generator=generator)
    groups = -(-columns // (group_size or columns))
    scale = torch.rand({"tensor": 1, "channel": rows, "group": rows * groups}[granularity], generator=generator) - 0.3
    return codes, Coded(
        pack_bits(codes, bits), scale, bits, grid, group_size if granularity == "group" else None, shape
    )


def plain(codes, coded, dtype):
    options = {"bits": coded.bits, "grid": coded.grid, "group_size": coded.group_size}
    return dequantize_weight(codes, coded.scale, dtype=dtype, **options)


@pytest.mark.parametrize("_kernel", USUAL, indirect=True)
@pytest.mark.parametrize("bits", range(1, 9))
def test_codes_weights_and_products_of_every_build(bits):
    for (rows, columns, size), granularity in itertools.product(SHAPES, ("tensor", "channel", "group")):
        grid = "odd" if columns % 2 else "integer"
        codes, weight = coded(bits, grid, granularity, (rows, columns), size)
        what = f"{granularity} {grid} {rows} {columns} {size}"
        assert works(bits, grid, weight.granularity(), torch.float32), what
        assert torch.equal(weight.codes(), codes), what
        assert torch.equal(encode(codes, bits), weight.stream), what
        for dtype in (torch.float32, torch.bfloat16, torch.float16):
            assert torch.equal(weight.weight(dtype), plain(codes, weight, dtype)), what
        exact = plain(codes, weight, torch.float64)
        for count, dtype in (
            (0, torch.float32),
            (1, torch.float32),
            (7, torch.float32),
            (40, torch.float32),
            (3, torch.bfloat16),
        ):
            x, bias = torch.randn(count, columns).to(dtype), torch.randn(rows).to(dtype)
            found = packed_linear(x, *weight[:2], bias, *weight[2:5], rows)
            expected = F.linear(x.double(), exact, bias.double())
            terms = F.linear(x.double().abs(), exact.abs(), bias.double().abs())
            assert found.dtype == dtype
            assert ((found.double() - expected).abs() <= terms * (1e-6 if dtype == torch.float32 else 2**-8)).all(), (
                what
            )


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_any_number_of_rows_and_any_input_a_linear_layer_takes(dtype):
    codes, weight = coded(3, "odd", "group", (24, 130), 32)
    exact = plain(codes, weight, torch.float64)
    wide = torch.randn(40, 260).to(dtype)
    inputs = [wide[:rows, :130] for rows in range(1, 41)]
    inputs += [
        wide[0, :130],
        wide[:, ::2],
        wide[:12, :130].view(3, 4, 130).transpose(0, 1),
        wide[:0, :130],
        wide[:6, :130].expand(2, 6, 130),
    ]
    for x in inputs:
        found = packed_linear(x, *weight[:2], None, *weight[2:5], 24)
        expected = F.linear(x.double(), exact)
        assert found.shape == expected.shape
        assert found.dtype == dtype
        tolerance = {torch.float32: 1e-6, torch.bfloat16: 2**-7, torch.float16: 2**-9}[dtype]
        torch.testing.assert_close(
            found.double(), expected, rtol=tolerance, atol=tolerance * exact.abs().max().item() * 30
        )


def packed(layer, **config):
    model = nn.Sequential(layer)
    config = {"weight_bits": 4, "group_size": 16, **config}
    return hf_daq.pack(hf_daq.apply_daq(model, first_last_bits=config["weight_bits"], **config))


def test_which_layers_compute_from_codes_with_which_inputs(monkeypatch):
    model = packed(nn.Linear(40, 24))
    layer, x = model[0], torch.randn(3, 40)
    assert layer.path(x) == layer.path(x[0]) == layer.path(x[:0]) == "codes"
    assert layer.path(x.double()) == layer.path(x.bfloat16()) == layer.path(x[:, :3]) == "unpacked"
    assert layer.path(torch.tensor(1.0)) == "unpacked"
    with torch.autocast("cpu", torch.bfloat16):
        assert layer.path(x.bfloat16()) == "codes"
    assert model.bfloat16()[0].path(x.bfloat16()) == "codes"
    assert packed(Conv1D(24, 40))[0].path(x) == "codes"
    assert packed(nn.Conv2d(4, 8, 1), group_size=None)[0].path(torch.randn(1, 4, 5, 5)) == "unpacked"
    monkeypatch.setattr(computing, "_SMALL", 24 * 40)
    assert layer.path(x.bfloat16()) == "unpacked"
    monkeypatch.setattr(computing, "_SMALL", 0)
    monkeypatch.setattr(computing, "library", lambda: None)
    assert layer.path(x.bfloat16()) == "unpacked"
    with pytest.raises(RuntimeError, match="shapes cannot be multiplied"):
        model(x[:, :3].bfloat16())


@pytest.mark.parametrize(
    "make", [lambda: nn.Linear(40, 24), lambda: nn.Linear(40, 24, bias=False), lambda: Conv1D(24, 40)]
)
@pytest.mark.parametrize("count", [1, 40])
def test_gradients_of_inputs_and_bias(make, count):
    model = packed(make())
    x = torch.randn(count, 40, requires_grad=True)
    found = []
    for way in (lambda: model(x), lambda: torch.func.vmap(model)(x), lambda: exactly(model, x)):
        if model[0].bias is not None:
            model[0].bias.requires_grad_().grad = None
        x.grad = None
        y = way()
        y.square().sum().backward()
        found.append([y.detach(), x.grad] + ([] if model[0].bias is None else [model[0].bias.grad]))
    for values in found[:2]:
        for one, other in zip(values, found[2], strict=True):
            torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-4)


def exactly(model, *inputs):
    with bit_for_bit():
        return model(*inputs)


def test_under_autocast_as_a_linear_layer():
    model, x = packed(nn.Linear(40, 24)), torch.randn(3, 40)
    with torch.autocast("cpu", torch.bfloat16):
        found, expected = model(x), exactly(model, x)
        raw = packed_linear(x, *model[0].coded()[:2], None, *model[0].coded()[2:5], 24)
    assert found.dtype == expected.dtype == torch.bfloat16
    assert raw.dtype == torch.float32
    torch.testing.assert_close(found, expected, rtol=2e-2, atol=2e-2)


def test_a_graph_has_one_node_for_a_layer():
    model, x = packed(nn.Linear(40, 24)), torch.randn(3, 40)
    want = model(x)
    assert torch.equal(torch.compile(model, backend="aot_eager", fullgraph=True)(x), want)
    program = torch.export.export(model, (x,), dynamic_shapes=({0: torch.export.Dim("batch")},))
    assert [node.target for node in program.graph.nodes if "hf_daq" in str(node.target)] == [
        torch.ops.hf_daq.packed_linear.default
    ]
    assert torch.equal(program.module()(x[:2]), model(x[:2]))
    traced = torch.fx.experimental.proxy_tensor.make_fx(model)(x)
    assert torch.equal(traced(x), want)
    torch.library.opcheck(packed_linear, (x, *model[0].coded()[:2], model[0].bias.detach(), *model[0].coded()[2:5], 24))


@pytest.mark.filterwarnings("ignore:.*torch.jit.*:FutureWarning", "ignore::torch.jit.TracerWarning")
def test_a_graph_of_torch_jit_has_operators_of_torch_alone():
    model, x = packed(nn.Linear(40, 24)), torch.randn(3, 40)
    traced = torch.jit.trace(model, x)
    assert "packed_linear" not in str(traced.inlined_graph)
    torch.testing.assert_close(traced(x), model(x))


def test_arguments_that_do_not_fit_are_refused():
    _, weight = coded(3, "odd", "group", (24, 130), 32)
    x = torch.randn(2, 130)
    with pytest.raises(ValueError, match="are not those of a weight of 3 bits, of the shape"):
        packed_linear(x, weight.stream[:-1], weight.scale, None, *weight[2:5], 24)
    with pytest.raises(ValueError, match="are not those of a weight of 3 bits, of the shape"):
        packed_linear(x, weight.stream, weight.scale[:-1], None, *weight[2:5], 24)
    with pytest.raises(ValueError, match="are not those of a weight of 3 bits, of the shape"):
        weight._replace(stream=weight.stream[:9]).codes()
    with pytest.raises(ValueError, match="a bias of torch.float64 and shape"):
        packed_linear(x, *weight[:2], torch.zeros(24).double(), *weight[2:5], 24)
    with pytest.raises(NotImplementedError, match=r"hf_daq.unpack\(model\)"):
        torch.func.vmap(lambda scale: packed_linear(x, weight.stream, scale, None, *weight[2:5], 24))(
            weight.scale[None]
        )


def test_a_kernel_that_computes_something_else_is_not_used(monkeypatch, caplog):
    model, x = packed(nn.Linear(40, 24)), torch.randn(3, 40)
    want = exactly(model, x)
    call = computing._call

    def wrong(name, *arguments):
        call(name, *arguments[:3], arguments[3] + 1 if name == "daq_linear" else arguments[3], *arguments[4:])

    monkeypatch.setattr("hf_daq.nn.trust._agreed", {})
    works.cache_clear()
    monkeypatch.setattr(computing, "_call", wrong)
    assert torch.equal(model(x), want)
    (message,) = caplog.messages
    assert message.startswith("a kernel of codes gives other values on this machine")


def test_a_decoder_generates_the_same_and_is_saved_again_bit_for_bit(tmp_path):
    model = hf_daq.apply_daq(tiny_llama(), DaqConfig(weight_bits=3, group_size=16))
    model.generation_config.pad_token_id = 0
    inputs = tokens(2)
    want = model(input_ids=inputs).logits
    hf_daq.save_pretrained(model, tmp_path / "one", packed=True, probe={"input_ids": inputs})
    loaded = hf_daq.from_pretrained(tmp_path / "one")
    layers = packed_layers(loaded)
    assert {layer.path(torch.randn(1, layer.shape[1])) for layer in layers.values()} == {"codes"}
    for other in (loaded, copy.deepcopy(loaded)):
        torch.testing.assert_close(other(input_ids=inputs).logits, want, rtol=1e-5, atol=1e-5)
        assert torch.equal(exactly(other, inputs).logits, want)
        assert torch.equal(other.generate(inputs, max_new_tokens=8), model.generate(inputs, max_new_tokens=8))
    hf_daq.save_pretrained(loaded, tmp_path / "two")
    one, other = (load_file(tmp_path / name / "model.safetensors") for name in ("one", "two"))
    assert one.keys() == other.keys()
    assert all(torch.equal(one[name], other[name]) for name in one)
    hf_daq.unpack(loaded)
    assert torch.equal(loaded(input_ids=inputs).logits, want)


def test_generation_is_measured(tmp_path, monkeypatch):
    tiny_llama(max_position_embeddings=64).save_pretrained(tmp_path / "float")
    monkeypatch.setattr(decoding, "measured", decoding.measure)
    sizes = ["--bits", "3", "--group_size", "16", "--prompt", "8", "--tokens", "4"]
    rows = decoding.main([str(tmp_path / "float"), *sizes, "--output", str(tmp_path / "table.json")])
    assert [(row["model"], row["dtype"]) for row in rows] == [
        ("float", "bfloat16"),
        ("W3", "bfloat16"),
        ("float", "float32"),
        ("W3", "float32"),
    ]
    assert all(row["tokens/s"] > 0 for row in rows)
    assert 0 < rows[-1]["error, float32"] < 1e-5


def test_threads_and_a_process_that_forks(monkeypatch):
    model, x = packed(nn.Linear(64, 48)), torch.randn(3, 64)
    want = model(x)
    before = torch.get_num_threads()
    monkeypatch.setattr(computing, "_PER_THREAD", 1)
    try:
        torch.set_num_threads(3)
        assert torch.equal(model(x), want)
        child = os.fork()
        if child == 0:
            os._exit(0 if torch.equal(computing.forward(model[0], x), want) else 1)
        assert os.waitpid(child, 0)[1] == 0
    finally:
        torch.set_num_threads(before)


@pytest.mark.parametrize("bits", range(1, 9))
def test_streams_that_others_wrote_are_read(bits):
    stream = torch.randint(256, (bits * 21,), dtype=torch.uint8)
    assert torch.equal(
        Coded(stream, torch.ones(1), bits, "odd", None, (168, 1)).codes().flatten(), unpack_bits(stream, bits, 168)
    )


@pytest.mark.parametrize("rows", [1, 2, 3])
def test_few_rows_of_conv1d_are_exact_where_bits_count(rows):
    torch.manual_seed(0)
    model, x = nn.Sequential(Conv1D(192, 64), nn.Linear(192, 8)).eval(), torch.randn(rows, 64)
    hf_daq.apply_daq(model, weight_bits=4, first_last_bits=4)
    packed = hf_daq.pack(copy.deepcopy(model))
    with bit_for_bit():
        assert torch.equal(packed(x), model(x))
