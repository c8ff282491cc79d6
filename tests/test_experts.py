"""Fused experts of transformers: quantized layers of all experts, against a copy whose experts are linear layers."""

import copy
import pickle
import threading

import pytest
import safetensors
import tiny
import torch
import torch.nn.functional as F
import transformers as tf
from scan_transformers import quiet
from torch import nn
from transformers import AutoModelForCausalLM

import hf_daq
from hf_daq import DaqConfig
from hf_daq.errors import ExportError, ModelError
from hf_daq.model.walk import Chunk
from hf_daq.nn.experts import ExpertsLinear, OneExpert, Routing
from hf_daq.nn.fitting import whole_or_not
from hf_daq.nn.layers import quantized_layers
from hf_daq.nn.paths import bit_for_bit
from hf_daq.nn.split_experts import SplitExperts, expert_layers

CONFIG = DaqConfig(weight_bits=3, activation_bits=8, bias_correction=False)
CONFIGS = [CONFIG, CONFIG.replace(weight_granularity="channel"), CONFIG.replace(group_size=20)]


@pytest.fixture(autouse=True)
def no_reports():
    with quiet():
        yield


def calibrated(name, config=CONFIG):
    return calibrate(hf_daq.apply_daq(tiny.build(name), config), name)


def calibrate(model, name):
    with hf_daq.calibrate(model):
        for seed in (1, 2):
            model(**tiny.inputs(name, seed))
    return model


def experts_of(model):
    return [module for module in model.modules() if isinstance(module, SplitExperts)]


class Unfused(nn.Module):
    """The same experts, each with two linear layers."""

    def __init__(self, fused):
        super().__init__()
        self.gate = (fused._apply_gate,)
        for name, parameter in (("first", fused.gate_up_proj), ("second", fused.down_proj)):
            biases = getattr(fused, "gate_up_proj_bias" if name == "first" else "down_proj_bias", None)
            weights = parameter.transpose(1, 2) if fused.is_transposed else parameter
            layers = nn.ModuleList(nn.Linear(*weight.shape[::-1], bias=biases is not None) for weight in weights)
            for number, layer in enumerate(layers):
                layer.weight.data = weights[number].detach().clone()
                if biases is not None:
                    layer.bias.data = biases[number].detach().clone()
            setattr(self, name, layers)

    def forward(self, hidden_states, top_k_index, top_k_weights):
        output = torch.zeros_like(hidden_states)
        for number, (first, second) in enumerate(zip(self.first, self.second, strict=True)):
            token, place = (top_k_index == number).nonzero(as_tuple=True)
            if len(token):
                y = second(self.gate[0](first(hidden_states[token])))
                output = output.index_add(0, token, y * top_k_weights[token, place, None])
        return output


def unfused(name, config, like):
    """A quantized model with the values of `like`, whose experts are linear layers."""
    model = tiny.build(name)
    for path, module in list(model.named_modules()):
        if hasattr(module, "has_gate"):
            model.set_submodule(path, Unfused(module))
    hf_daq.apply_daq(model, config)
    own = quantized_layers(like)
    if config.activation_bits is None:
        calibrate(model, name)
    for path, layer in quantized_layers(model).items():
        parts = path.split(".")
        if "first" in parts or "second" in parts:
            number, prefix = int(parts[-1]), ".".join(parts[:-2])
            source = own[f"{prefix}.{'gate_up' if 'first' in parts else 'down'}"]
            values = {
                key: value.view(len(source.weight), -1)[number] for key, value in source.w_quant.state_dict().items()
            }
            if config.activation_bits is None:  # the same weights and inputs
                for key, value in layer.w_quant.state_dict().items():
                    torch.testing.assert_close(value, values[key])
            layer.w_quant.load_state_dict(values)
        else:
            source = own[path]
            layer.w_quant.load_state_dict(source.w_quant.state_dict())
        if source.a_quant is not None:
            layer.a_quant.load_state_dict(source.a_quant.state_dict())
    return model


def loss_of(model, name):
    predicted = tiny.prediction(model(**tiny.inputs(name)))
    return (predicted * torch.randn(predicted.shape, generator=torch.Generator().manual_seed(0))).sum()


def gradients(layers, key, like):
    """Of one parameter of the layers of all experts, as the layer of all has it."""
    found = [layer.get_parameter(key) for layer in layers]
    grads = [torch.zeros_like(p) if p.grad is None else p.grad for p in found]
    return (
        torch.stack(grads).sum(0)
        if key.startswith("a_quant")
        else torch.cat([g[None] for g in grads]).reshape(like.shape)
    )


WEIGHTS = CONFIG.replace(activation_bits=None)
PAIRS = [(name, config) for name in ("mixtral", "gpt_oss") for config in (*CONFIGS, WEIGHTS)]


@pytest.mark.parametrize(
    ("name", "config"),
    [
        *PAIRS[2:5],
        ("deepseek_v3", CONFIG),
        *(pytest.param(*case, marks=pytest.mark.slow) for case in [*PAIRS[:2], *PAIRS[5:], ("qwen3_moe", CONFIG)]),
    ],
)
def test_loss_and_gradients_are_those_of_linear_layers(name, config):
    fused = calibrated(name, config).train()
    # In float64, or sums in another order would move an input of 8 bits across a threshold now and then.
    other = unfused(name, config, fused).train().double()
    fused.double()
    losses = [loss_of(model, name) for model in (fused, other)]
    torch.testing.assert_close(*losses, rtol=1e-5, atol=1e-5)
    for loss in losses:
        loss.backward()
    compared = 0
    for path, module in fused.named_modules():
        if not isinstance(module, SplitExperts):
            continue
        linears = other.get_submodule(path)
        for layer, parts in zip(expert_layers(module).values(), (linears.first, linears.second), strict=True):
            weight = layer.weight.grad.transpose(1, 2) if module.is_transposed else layer.weight.grad
            pairs = [(weight, gradients(parts, "weight", weight))]
            if layer.bias is not None:
                pairs.append((layer.bias.grad, gradients(parts, "bias", layer.bias)))
            for key, parameter in layer.named_parameters():
                if parameter.requires_grad:
                    pairs.append((parameter.grad, gradients(parts, key, parameter)))
            for one, wanted in pairs:
                assert wanted.abs().max() > 0
                torch.testing.assert_close(one, wanted, rtol=1e-4, atol=1e-5 * float(wanted.abs().max()))
                compared += 1
    assert compared >= 8 * len(experts_of(fused))
    own = dict(other.named_parameters())
    for key, parameter in fused.named_parameters():
        # Calibration has joined input quantizers of sibling layers of the one model.
        if "experts" not in key and "a_quant" not in key and parameter.grad is not None:
            scale = float(own[key].grad.abs().max())
            torch.testing.assert_close(parameter.grad, own[key].grad, rtol=1e-4, atol=1e-5 * max(scale, 1e-3))


@pytest.mark.parametrize("config", [CONFIG, WEIGHTS.replace(group_size=20)])
def test_outputs_and_gradients_of_llama_4_are_those_of_its_own_products(config):
    model = calibrated("llama4", config).double().train()
    (fused,) = experts_of(model)
    first, down = expert_layers(fused).values()
    x = torch.randn(4, 5, 32, generator=torch.Generator().manual_seed(0)).double()
    x[torch.rand(4, 5, generator=torch.Generator().manual_seed(1)) < 0.6] = 0  # tokens of other experts
    x.requires_grad_()

    def product(layer, x, seen):
        weight = layer.stored(layer.w_quant(layer.float_weight()))
        rows = x[seen] if layer.a_quant is None else layer.a_quant(x[seen])
        return torch.bmm(torch.zeros_like(x).index_put((seen,), rows), weight)

    def own(hidden_states):
        x = hidden_states.view(4, -1, 32)
        seen = x.detach().ne(0).any(2)
        seen[0] |= ~seen.any(0)  # a token of zeros
        gate, up = product(first, x, seen).chunk(2, dim=-1)
        return product(down, up * fused.act_fn(gate), seen).view(-1, 32)

    seed, found = torch.randn(20, 32).double(), []
    learning = [fused.gate_up_proj, fused.down_proj, *(p for p in fused.parameters() if p.requires_grad)]
    for forward in (fused, own):
        output = forward(x.view(-1, 32))
        found.append([output, *torch.autograd.grad(output, [x, *learning], seed)])
    assert all(gradient.any() for gradient in found[0])
    torch.testing.assert_close(*found, rtol=1e-9, atol=1e-11)


@pytest.mark.slow
def test_a_graph_of_llama_4_gives_the_same():
    model = calibrated("llama4").eval()
    expected = logits(model, "llama4")
    torch.testing.assert_close(logits(torch.compile(model, backend="eager"), "llama4"), expected)


def logits(model, name="mixtral"):
    with torch.no_grad(), bit_for_bit():
        return tiny.outputs(model, tiny.inputs(name))


def test_split_experts_are_of_their_class_keep_their_parameters_and_give_them_back():
    model = tiny.build("mixtral")
    fused = model.model.layers[0].mlp.experts
    kind, before, keys = type(fused), dict(fused.named_parameters()), list(model.state_dict())
    hf_daq.apply_daq(model, CONFIG)
    assert isinstance(fused, kind)
    assert isinstance(fused, SplitExperts)
    assert all(fused.get_parameter(key) is value for key, value in before.items())
    assert list(expert_layers(fused)) == ["gate_up", "down"]
    hf_daq.remove_daq(model)
    assert type(fused) is kind
    assert list(model.state_dict()) == keys


def test_an_expert_that_never_sees_a_token_starts_from_its_weight():
    model = hf_daq.apply_daq(tiny.build("mixtral"), CONFIG)
    start = [layer.w_quant.lower.clone() for fused in experts_of(model) for layer in expert_layers(fused).values()]
    for block in model.model.layers:  # the router knows two of four experts
        block.mlp.gate.weight.data[2:] = 0
        block.mlp.gate.weight.data[:2] = block.mlp.gate.weight.data[:2].abs() * 9
        block.post_attention_layernorm.weight.data.fill_(1.0)
        block.mlp.gate.register_forward_hook(lambda _, args, out: (*out[:2], out[2] % 2) if len(out) == 3 else out)
    seen = []
    for fused in experts_of(model):
        fused.register_forward_pre_hook(lambda _, args: seen.append(args[1]))
    with hf_daq.calibrate(model):
        model(**tiny.inputs("mixtral"))
    assert torch.cat(seen).max() == 1
    layers = [layer for fused in experts_of(model) for layer in expert_layers(fused).values()]
    assert all(layer.calibrated for layer in layers)
    for layer, lower in zip(layers, start, strict=True):
        torch.testing.assert_close(layer.w_quant.lower, lower)
        assert (layer.w_quant.scale > 0).all()
    loss_of(model.train(), "mixtral").backward()
    for layer in layers:
        assert not layer.weight.grad[2:].any()
        assert layer.weight.grad[:2].any()
        assert all(p.grad is not None for p in layer.parameters() if p.requires_grad)


def test_padding_tokens_do_not_count_in_calibration():
    found = []
    for padded in (False, True):
        model = hf_daq.apply_daq(tiny.build("mixtral"), CONFIG)
        ids = torch.randint(3, tiny.VOCABULARY, (2, 9), generator=torch.Generator().manual_seed(0))
        mask = torch.ones_like(ids)
        if padded:
            ids, mask = F.pad(ids, (0, 5), value=7), F.pad(mask, (0, 5))
        with hf_daq.calibrate(model, check=False):
            model(input_ids=ids, attention_mask=mask)
        found.append({key: value for key, value in model.state_dict().items() if "experts" in key and "_quant" in key})
    for key, value in found[0].items():
        torch.testing.assert_close(found[1][key], value, rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize("name", ["mixtral", "gpt_oss"])
@pytest.mark.parametrize("config", CONFIGS, ids=["tensor", "channel", "group"])
def test_packed_experts_compute_as_before_also_where_codes_end_inside_of_bytes(name, config):
    model = calibrated(name, config)
    expected = logits(model, name)
    hf_daq.pack(model)
    assert not any("gate_up_proj" in key and "bias" not in key for key in model.state_dict())
    assert torch.equal(logits(model, name), expected)
    fused = experts_of(model)[0]
    assert fused.gate_up_proj.shape == fused.gate_up.weight.shape
    fused.gate_up.shape = (*fused.gate_up.shape[:-1], fused.gate_up.shape[-1])
    with pytest.raises(ModelError, match="nothing can be written to it"):
        fused.gate_up_proj.data = torch.zeros(1)
    assert torch.equal(logits(pickle.loads(pickle.dumps(model)), name), expected)
    hf_daq.unpack(model)
    assert torch.equal(logits(model, name), expected)
    assert torch.equal(logits(copy.deepcopy(model), name), expected)


@pytest.mark.parametrize("packed", [False, True])
def test_a_forward_in_another_thread_disturbs_no_routing(packed):
    model = calibrated("mixtral").eval()
    if packed:
        hf_daq.pack(model)
    longer, shorter = (tiny.inputs("mixtral", seed) for seed in (3, 4))
    shorter = {name: value[:, :3] for name, value in shorter.items()}
    with torch.no_grad():
        want, want_there = model(**longer).logits, model(**shorter).logits
        there, inside = [], threading.local()

        def forward_there():
            inside.other = True
            with torch.no_grad():
                there.append(model(**shorter).logits)

        def wait(*_):
            if not hasattr(inside, "other"):
                thread = threading.Thread(target=forward_there)
                thread.start()
                thread.join()

        for layer in expert_layers(experts_of(model)[0]).values():
            layer.register_forward_pre_hook(wait)
        assert torch.equal(model(**longer).logits, want)
    assert len(there) == 2
    assert all(torch.equal(found, want_there) for found in there)


def test_bits_for_one_of_the_two_layers():
    config = CONFIG.replace(rules=[{"pattern": "*.experts.down", "skip": True}])
    model = calibrated("mixtral", config)
    fused = experts_of(model)[0]
    assert type(fused.down) is ExpertsLinear
    assert [name for name in quantized_layers(model) if "experts" in name] == [
        f"model.layers.{number}.mlp.experts.gate_up" for number in (0, 1)
    ]
    expected = logits(model)
    hf_daq.pack(model)
    assert torch.equal(logits(model), expected)
    kept = hf_daq.apply_daq(tiny.build("mixtral"), CONFIG.replace(modules_to_not_convert=["*.experts"]))
    assert not experts_of(kept)


def test_experts_whose_forward_is_their_own_are_reported(caplog):
    model = tiny.build("mixtral")
    fused = model.model.layers[0].mlp.experts

    class Other(type(fused)):
        def forward(self, *args):
            return super().forward(*args)

    fused.__class__ = Other
    rows = hf_daq.plan(model, CONFIG).unsupported
    assert [(row.kind, row.reason) for row in rows.values()] == [("Other", "no quantized form of Other")]


def test_summary_health_and_inspect_know_experts(tmp_path):
    model = calibrated("mixtral")
    rows = {row.name: row for row in hf_daq.summary(model, tiny.inputs("mixtral")).layers}
    first, down = (rows[f"model.layers.0.mlp.experts.{name}"] for name in ("gate_up", "down"))
    assert first.output_sqnr > 10
    assert first.macs == 2 * down.macs
    assert not hf_daq.health(model, tiny.inputs("mixtral")).alarms
    hf_daq.save_pretrained(model, tmp_path / "trainable")
    hf_daq.save_pretrained(model, tmp_path / "packed", packed=True)
    trainable, packed = (hf_daq.inspect(tmp_path / folder) for folder in ("trainable", "packed"))
    assert trainable.packed_bytes == packed.tensor_bytes
    assert trainable.float_bytes == packed.float_bytes
    assert not any("experts" in tensor.name for tensor in trainable.kept)
    shapes = [{layer.name: layer.shape for layer in found.layers} for found in (trainable, packed)]
    assert shapes[0] == shapes[1]


def test_onnx_files_hold_no_experts(tmp_path):
    model = calibrated("mixtral")
    with pytest.raises(
        ExportError, match=r"all experts of a mixture.*modules_to_not_convert=\['model.layers.0.mlp.experts'\]"
    ):
        hf_daq.export_onnx(model, tmp_path / "out.onnx", tiny.inputs("mixtral"))


@pytest.mark.parametrize(
    ("name", "packed", "config"),
    [
        ("mixtral", False, {"weight_bits": 4, "weight_granularity": "channel"}),
        ("qwen3_moe", True, {"weight_bits": 2}),
        ("qwen2_moe", True, {"weight_bits": 3, "group_size": 16}),
        ("deepseek_v3", False, {"weight_bits": 8, "weight_grid": "integer", "group_size": 16}),
        ("mixtral", True, {"weight_bits": 2, "weight_grid": "ternary"}),
        (
            "mixtral",
            True,
            {"weight_bits": 4, "activation_bits": 8, "rules": [{"pattern": "*.experts", "activation_bits": None}]},
        ),
    ],
    ids=lambda value: value if isinstance(value, str) else None,
)
def test_plain_transformers_opens_experts_of_compressed_tensors(name, packed, config, tmp_path):
    pytest.importorskip("compressed_tensors")
    model = calibrated(name, DaqConfig(**config)).eval()
    model = hf_daq.pack(model) if packed else model
    expected = logits(model, name)
    report = hf_daq.export_compressed_tensors(model, tmp_path, tiny.inputs(name))
    assert report.layer_error < 1e-6
    assert report.relative_error < 1e-5
    opened = AutoModelForCausalLM.from_pretrained(tmp_path).eval()
    assert not experts_of(opened)
    assert (logits(opened, name) - expected).abs().max() <= 1e-5 * expected.abs().max()
    names = safetensors.safe_open(tmp_path / "model.safetensors", "pt").keys()
    assert sum(key.endswith("weight_packed") and ".experts.3." in key for key in names) == 3 * len(experts_of(model))


@pytest.mark.parametrize(
    ("name", "config", "words"),
    [
        (
            "mixtral",
            {"activation_bits": 8},
            r'rules=\[{"pattern": \'model.layers.0.mlp.experts\', "activation_bits": None}',
        ),
        ("mixtral", {"weight_bits": 8, "weight_grid": "odd"}, 'weight_grid="integer"'),
        ("gpt_oss", {}, "in one tensor on the disk"),
        ("mixtral", {"rules": [{"pattern": "*.0.mlp.experts.*", "weight_bits": 3}]}, "differ in bits, grid or groups"),
        ("mixtral", {"rules": [{"pattern": "*.0.mlp.experts", "skip": True}]}, "quantize all of them, or none"),
        ("mixtral", {"rules": [{"pattern": "*.0.mlp.experts.down", "skip": True}]}, "quantize all of them, or none"),
    ],
)
def test_experts_that_transformers_would_not_open_as_they_are(name, config, words, tmp_path):
    pytest.importorskip("compressed_tensors")
    model = calibrated(name, DaqConfig(**{"weight_bits": 4} | config))
    with pytest.raises(ExportError, match=words):
        hf_daq.export_compressed_tensors(model, tmp_path / "out")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("config", CONFIGS, ids=["expert", "channel", "group"])
@pytest.mark.parametrize("name", ["mixtral", "gpt_oss"])
def test_the_layer_of_one_expert_is_a_part_of_those_of_all(name, config):
    model = calibrated(name, config)
    for module in experts_of(model):
        for layer in expert_layers(module).values():
            codes = layer.codes().view(module.num_experts, -1, layer.weight_shape()[-1])
            values = layer.quantized_weight().view(codes.shape)
            parts = [OneExpert(layer, expert) for expert in range(module.num_experts)]
            assert torch.equal(torch.stack([part.codes() for part in parts]), codes)
            torch.testing.assert_close(torch.stack([part.w_quant(part.float_weight()) for part in parts]), values)
            parts[1].weight.mul_(0)
            parts[1].w_quant.scale.mul_(2)
            assert not layer.weight[1].any()
            assert layer.weight[0].any()
            torch.testing.assert_close(layer.quantized_weight().view(codes.shape)[2:], values[2:])


@pytest.mark.parametrize(
    ("name", "config"), [("mixtral", CONFIG), ("gpt_oss", WEIGHTS), ("qwen3_moe", CONFIG.replace(group_size=20))]
)
def test_reconstruct_brings_experts_nearer_to_the_float_network(name, config):
    generator = torch.Generator().manual_seed(0)
    batches = [{"input_ids": torch.randint(3, tiny.VOCABULARY, (64, 24), generator=generator)} for _ in range(3)]
    batches[0]["attention_mask"] = (torch.arange(24) < 20).long().expand(64, 24).contiguous()
    model = hf_daq.apply_daq(tiny.build(name), config.replace(modules_to_not_convert=["*.self_attn"]))
    assert all(isinstance(layer, ExpertsLinear) for layer in quantized_layers(model).values())
    with hf_daq.calibrate(model), torch.no_grad():
        model(**batches[0])
    biases = [layer.bias for layer in quantized_layers(model).values() if layer.bias is not None]
    biases = [(bias, bias.clone()) for bias in biases]
    wanted = tiny.outputs(tiny.build(name), batches[2])
    start = (tiny.outputs(model, batches[2]) - wanted).norm()
    hf_daq.reconstruct(model, batches[:2])
    assert (tiny.outputs(model, batches[2]) - wanted).norm() < 0.85 * start
    assert all(torch.equal(*pair) for pair in biases)


def test_experts_without_tokens_stay_and_an_interruption_changes_nothing():
    model = calibrated("mixtral")
    module = experts_of(model)[0]
    module.register_forward_pre_hook(lambda _, args: (args[0], args[1].clamp(max=2), args[2]))
    before = module.gate_up_proj.detach().clone()
    hf_daq.reconstruct(model, [tiny.inputs("mixtral", seed) for seed in range(20)])
    changed = [not torch.equal(*pair) for pair in zip(module.gate_up_proj, before, strict=True)]
    assert changed == [True, True, True, False]
    whole = {key: value.clone() for key, value in model.state_dict().items()}
    first = expert_layers(module)["gate_up"]
    with torch.no_grad(), pytest.raises(KeyboardInterrupt), whole_or_not(first):
        first.weight.zero_()
        first.w_quant.scale.zero_()
        raise KeyboardInterrupt
    assert all(torch.equal(value, whole[key]) for key, value in model.state_dict().items())


def test_inputs_of_an_expert_are_those_of_the_same_tokens_in_the_float_network():
    tokens, width = 6, 3
    chunk = Chunk(lambda: None)
    layer = object()

    def stand(walk, chosen, offset):
        experts, order = torch.tensor(chosen).sort(stable=True)
        ends = torch.searchsorted(experts, torch.arange(2), right=True)
        walk.layer, walk.routing = layer, Routing(order, experts, ends, by_token=False)
        walk.x = (order + offset)[:, None] * torch.ones(1, width)

    stand(chunk.quantized, [0, 1, 1, 0, 1, 0], 0.0)
    stand(chunk.in_float, [0, 0, 1, 0, 1, 1], 100.0)
    chunk.quantized.kept = torch.tensor([True, True, True, True, False, True])
    (early, late) = chunk.of_expert(0)(0)
    assert (early[0], early[1][:, 0].tolist(), early[2][:, 0].tolist()) == (0, [0.0], [100.0])
    assert (late[0], late[1][:, 0].tolist(), late[2][:, 0].tolist()) == (1, [3.0, 5.0], [103.0, 5.0])
    ((half, x, exact, weights),) = chunk.of_expert(1)(0)
    assert weights is None
    assert (half, x[:, 0].tolist(), exact[:, 0].tolist()) == (0, [1.0, 2.0], [1.0, 102.0])
    assert tokens == chunk.quantized.routing.token_count


def test_biases_of_experts_do_not_decay():
    model = hf_daq.apply_daq(tiny.build("gpt_oss"), WEIGHTS)
    groups = {group["name"]: group["params"] for group in hf_daq.param_groups(model, lr=1e-3, weight_decay=0.1)}
    bias = experts_of(model)[0].gate_up_proj_bias
    assert any(parameter is bias for parameter in groups["no_decay"])


def wide(model_class, **config):
    sizes = {"vocab_size": 99, "hidden_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4, "head_dim": 32}
    with torch.device("meta"):
        return model_class(model_class.config_class(**sizes, num_experts_per_tok=2, **config))


@pytest.mark.parametrize(
    "model",
    [
        wide(tf.Qwen3MoeForCausalLM, num_experts=16, moe_intermediate_size=128),
        wide(tf.MixtralForCausalLM, num_local_experts=16, intermediate_size=128),
        wide(tf.DeepseekV3ForCausalLM, n_routed_experts=16, moe_intermediate_size=128, first_k_dense_replace=1),
        wide(tf.GptOssForCausalLM, num_local_experts=16, intermediate_size=128),
    ],
    ids=lambda model: type(model).__name__,
)
def test_nearly_all_parameters_are_quantized(model):
    for least, config in ((0.9, CONFIG), (0.98, CONFIG.replace(embedding_bits=4))):
        totals = hf_daq.plan(model, config).totals
        assert totals["weights_quantized"] > least * totals["parameters"]
