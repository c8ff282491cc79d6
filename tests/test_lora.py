"""LoRA inside the quantizer: what is trained is what is merged."""

import copy
import json
import warnings

import peft
import pytest
import timm
import torch
import transformers
from safetensors.torch import load_file
from text_models import tiny_bert, tiny_llama, tokens
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from transformers import GPT2Config, GPT2LMHeadModel, LlamaForCausalLM, Qwen2MoeConfig, Qwen2MoeForCausalLM

import hf_daq
from hf_daq.errors import ModelError
from hf_daq.nn.adapted import add_adapters_
from hf_daq.nn.layers import quantized_layers
from hf_daq.nn.paths import bit_for_bit

pytestmark = pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")  # in peft

TEXT, IMAGES = tokens(2), torch.randn(2, 3, 16, 16, generator=torch.Generator().manual_seed(3))
QKV = ["q_proj", "v_proj", "down_proj"]


def tiny_moe():
    torch.manual_seed(0)
    sizes = {"vocab_size": 64, "hidden_size": 32, "num_hidden_layers": 1, "intermediate_size": 32, "num_experts": 2}
    heads = {"num_attention_heads": 2, "num_key_value_heads": 1, "num_experts_per_tok": 1}
    experts = {"moe_intermediate_size": 16, "shared_expert_intermediate_size": 16}
    return Qwen2MoeForCausalLM(Qwen2MoeConfig(**sizes, **heads, **experts)).eval()


def tiny_gpt2():
    torch.manual_seed(0)
    return GPT2LMHeadModel(
        GPT2Config(vocab_size=64, n_embd=32, n_layer=1, n_head=2, n_positions=16, bos_token_id=0, eos_token_id=0)
    ).eval()


def tiny_vit():
    torch.manual_seed(0)
    sizes = {"img_size": 16, "patch_size": 8, "embed_dim": 24, "depth": 2, "num_heads": 2, "num_classes": 5}
    return timm.models.VisionTransformer(**sizes).eval()


def tiny_cnn():
    """Whose last layer but one is a linear one of timm."""
    torch.manual_seed(0)
    convolutions = nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Conv2d(8, 8, 3, 2, 1), nn.ReLU(), nn.Conv2d(8, 8, 1), nn.ReLU()
    end = nn.AdaptiveAvgPool2d(1), nn.Flatten(), timm.layers.Linear(8, 8), nn.Linear(8, 5)
    return nn.Sequential(*convolutions, *end).eval()


NETWORKS = {
    "llama": (tiny_llama, QKV, {"group_size": 8}),
    "moe": (tiny_moe, ["q_proj", "v_proj", "o_proj"], {"group_size": 8, "activation_bits": 8}),
    "bert": (tiny_bert, ["query", "dense", "classifier"], {"activation_bits": 8}),
    "gpt2": (tiny_gpt2, ["c_attn", "c_proj"], {"weight_granularity": "channel"}),
    "vit": (tiny_vit, ["qkv", "fc2", "head"], {"activation_bits": 8, "bias_correction": True}),
    "cnn": (tiny_cnn, ["2", "4", "8"], {"activation_bits": 4}),
}


def outputs(model, x):
    with torch.no_grad(), bit_for_bit():
        out = model.eval()(x)
    return out if isinstance(out, torch.Tensor) else out.logits


def quantized(kind="llama", **config):
    build, _, options = NETWORKS[kind]
    model = hf_daq.apply_daq(build(), **({"weight_bits": 2} | options | config))
    with hf_daq.calibrate(model, check=False):
        model(IMAGES if kind in ("vit", "cnn") else TEXT)
    return model.eval()


def lora(targets=("q_proj", "v_proj", "down_proj"), **options):
    settings = {"r": 2, "lora_alpha": 4, "init_lora_weights": "daq"} | options
    return peft.LoraConfig(target_modules=list(targets), **settings)


def randomized(model, seed=0, std=0.2):
    """Adapters as training may leave them."""
    generator = torch.Generator().manual_seed(seed)
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            parameter.data.normal_(std=std, generator=generator)
        elif "lora_w_quant" in name:
            parameter.data.mul_(1 + 0.2 * torch.rand(parameter.shape, generator=generator))
    return model


@pytest.mark.parametrize("bits", [1, 2, 3, 4, 8])
@pytest.mark.parametrize("kind", NETWORKS)
def test_merged_outputs_are_those_that_were_trained(kind, bits):
    model = quantized(kind, weight_bits=bits)
    x = IMAGES if kind in ("vit", "cnn") else TEXT
    before = outputs(model, x)
    adapted = peft.get_peft_model(model, lora(NETWORKS[kind][1], init_lora_weights="daq_bounds"))
    assert torch.equal(outputs(adapted, x), before)
    trained = outputs(randomized(adapted), x)
    assert not torch.equal(trained, before)
    merged = adapted.merge_and_unload(safe_merge=True)
    assert torch.equal(outputs(merged, x), trained)
    assert all(type(layer) is not peft.tuners.lora.Linear for layer in merged.modules())


def test_the_merged_model_packs_saves_and_opens(tmp_path):
    merged = randomized(peft.get_peft_model(quantized(), lora())).merge_and_unload()
    expected = outputs(merged, TEXT)
    hf_daq.save_pretrained(merged, tmp_path / "float")
    assert torch.equal(outputs(hf_daq.from_pretrained(tmp_path / "float"), TEXT), expected)
    hf_daq.save_pretrained(merged, tmp_path / "packed", packed=True)
    assert torch.equal(outputs(hf_daq.from_pretrained(tmp_path / "packed"), TEXT), expected)


@pytest.mark.parametrize(("bits", "how"), [(1, "daq_bounds"), (2, "daq"), (4, "daq_bounds")])
@pytest.mark.parametrize("kind", NETWORKS)
def test_adapters_on_codes_are_those_on_the_weights_they_mean(kind, bits, how):
    packed = hf_daq.pack(quantized(kind, weight_bits=bits))
    x = IMAGES if kind in ("vit", "cnn") else TEXT
    before, codes = outputs(packed, x), {key: value.clone() for key, value in packed.state_dict().items()}
    both = [packed, hf_daq.unpack(copy.deepcopy(packed))]
    both = [peft.get_peft_model(model, lora(NETWORKS[kind][1], init_lora_weights=how)) for model in both]
    assert torch.equal(outputs(both[0], x), before)
    for name, parameter in randomized(both[0]).named_parameters():
        if "lora_" in name:
            both[1].get_parameter(name).data.copy_(parameter)
    found = []
    for model in both:
        torch.manual_seed(0)  # of dropout
        with bit_for_bit():
            found.append(model.train()(x) if kind in ("vit", "cnn") else model.train()(x).logits)
        found[-1].square().mean().backward()
    assert torch.equal(*found)
    for name, parameter in both[0].named_parameters():
        if "lora_" in name:
            torch.testing.assert_close(parameter.grad, both[1].get_parameter(name).grad)
    trained = outputs(both[0], x)
    assert torch.equal(outputs(both[1], x), trained)
    assert not torch.equal(trained, before)
    both[0].merge_adapter()
    assert torch.equal(outputs(both[0], x), trained)
    both[0].unmerge_adapter()
    now = {key.replace("base_layer.", ""): value for key, value in both[0].get_base_model().state_dict().items()}
    assert all(torch.equal(now[key], value) for key, value in codes.items())
    merged = both[0].merge_and_unload(safe_merge=True)
    assert torch.equal(outputs(merged, x), trained)
    assert not any(isinstance(layer, peft.tuners.lora.LoraLayer) for layer in merged.modules())


def test_a_packed_folder_is_trained_merged_and_saved(tmp_path):
    hf_daq.save_pretrained(quantized(), tmp_path / "packed", packed=True)
    model = peft.get_peft_model(LlamaForCausalLM.from_pretrained(tmp_path / "packed"), lora()).train()
    learning = [parameter for parameter in model.parameters() if parameter.requires_grad]
    assert sum(map(torch.numel, learning)) < 5000
    optimizer = torch.optim.AdamW(learning, lr=3e-2)
    losses = []
    for _ in range(8):
        losses.append(model(TEXT, labels=TEXT).loss)
        losses[-1].backward()
        optimizer.step()
        optimizer.zero_grad()
    assert losses[-1] < 0.97 * losses[0]
    trained = outputs(model, TEXT)
    model.save_pretrained(tmp_path / "adapter")
    keys = load_file(tmp_path / "adapter" / "adapter_model.safetensors").keys()
    assert all("lora_A" in key or "lora_B" in key for key in keys)
    again = LlamaForCausalLM.from_pretrained(tmp_path / "packed")
    again = peft.PeftModel.from_pretrained(again, tmp_path / "adapter")
    assert torch.equal(outputs(again, TEXT), trained)
    merged = again.merge_and_unload()
    hf_daq.save_pretrained(merged, tmp_path / "merged")
    assert torch.equal(outputs(LlamaForCausalLM.from_pretrained(tmp_path / "merged"), TEXT), trained)
    assert torch.equal(outputs(hf_daq.unpack(merged), TEXT), trained)


def test_adapters_on_codes_are_merged_one_by_one_as_together():
    adapted = peft.get_peft_model(hf_daq.pack(quantized()), lora())
    adapted.add_adapter("other", lora(r=4))
    adapted.base_model.set_adapter(["default", "other"])
    together = outputs(randomized(adapted), TEXT)
    adapted.merge_adapter(["default"])
    with pytest.warns(UserWarning, match="You are now additionally merging other"):
        adapted.merge_adapter(["other"])
    assert torch.equal(outputs(adapted, TEXT), together)
    with adapted.disable_adapter():
        assert not torch.equal(outputs(adapted, TEXT), together)
    layer = adapted.get_base_model().model.layers[0].self_attn.q_proj
    layer.lora_B["default"].weight.data.fill_(torch.nan)
    with pytest.raises(ModelError, match="a merged value is not finite"):
        adapted.merge_adapter(safe_merge=True, adapter_names=["default"])


@pytest.mark.parametrize("kind", ["packed", "quantized", "float"])
def test_no_weight_is_kept_for_the_backward(kind):
    model = tiny_llama() if kind == "float" else quantized()
    weights = {p.untyped_storage().data_ptr() for p in model.parameters()}
    shapes = {
        model.get_submodule(f"model.layers.0.{name}").weight.shape for name in ("self_attn.q_proj", "mlp.down_proj")
    }
    kept = []

    def pack(saved):
        if saved.untyped_storage().data_ptr() not in weights:
            kept.append(saved.shape)
        return saved

    every = [*QKV, "k_proj", "o_proj", "gate_proj", "up_proj"]
    adapted = peft.get_peft_model(hf_daq.pack(model) if kind == "packed" else model, lora(every)).train()
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x):
        adapted(TEXT, labels=TEXT)
    assert kept
    assert not (shapes | {shape[::-1] for shape in shapes}) & set(kept)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_adapters_are_added_in_parts(monkeypatch, dtype):
    monkeypatch.setattr("hf_daq.nn.adapted._TILE", 96)
    generator = torch.Generator().manual_seed(0)
    factors = [
        torch.randn(shape, generator=generator) for shape in ((2, 6, 3, 3), (8, 2, 1, 1), (4, 6, 3, 3), (8, 4, 1, 1))
    ]
    factors = [factor.requires_grad_() for factor in factors]
    weight = torch.randn(8, 6, 3, 3, generator=generator).to(dtype)
    expected = weight
    for scaling, a, b in ((0.5, *factors[:2]), (3.0, *factors[2:])):
        expected = (expected + (b.flatten(1) @ a.flatten(1)).view_as(weight) * scaling).to(dtype)
    found = add_adapters_(weight.clone(), (0.5, 3.0), *factors)
    torch.testing.assert_close(found, expected)
    of_output = torch.randn(weight.shape, generator=generator).to(dtype)
    wanted, grads = (torch.autograd.grad(output, factors, of_output) for output in (expected, found))
    torch.testing.assert_close(grads, wanted)


@pytest.mark.parametrize("how", ["daq", "daq_bounds"])
def test_training_and_a_file_of_the_adapter_alone(how, tmp_path):
    base = quantized("bert", weight_bits=2)
    fresh = copy.deepcopy(base)
    model = peft.get_peft_model(base, lora(["query", "dense"], init_lora_weights=how)).train()
    names = [name for name, parameter in model.named_parameters() if parameter.requires_grad]
    assert all("lora_" in name for name in names)
    assert any("w_quant" in name for name in names) is (how == "daq_bounds")
    groups = hf_daq.param_groups(model, lr=3e-2, quantizer_lr=1e-2)
    assert any(group["name"] == "quantizer" for group in groups) is (how == "daq_bounds")
    optimizer = torch.optim.AdamW(groups)
    untouched = {key: value.clone() for key, value in fresh.state_dict().items()}
    losses, target = [], torch.tensor([0, 1])
    for _ in range(12):
        loss = nn.functional.cross_entropy(model(TEXT).logits, target)
        loss.backward()
        assert all(model.get_parameter(name).grad.isfinite().all() for name in names)
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    assert losses[-1] < 0.9 * losses[0]
    trained = outputs(model, TEXT)
    now = {key.replace("base_layer.", ""): value for key, value in model.get_base_model().state_dict().items()}
    assert all(torch.equal(now[key], value) for key, value in untouched.items())
    model.save_pretrained(tmp_path)
    assert json.loads((tmp_path / "adapter_config.json").read_text())["init_lora_weights"] == how
    for low in (False, True):
        again = peft.PeftModel.from_pretrained(copy.deepcopy(fresh), tmp_path, low_cpu_mem_usage=low)
        assert torch.equal(outputs(again, TEXT), trained)
    assert torch.equal(outputs(again.merge_and_unload(), TEXT), trained)


def test_adapters_have_the_gradient_of_the_weight():
    model = quantized("gpt2")
    adapted = randomized(peft.get_peft_model(copy.deepcopy(model), lora(["c_attn"]))).train()
    layer = adapted.get_base_model().transformer.h[0].attn.c_attn
    plain = copy.deepcopy(adapted).merge_and_unload().train()
    reference = plain.transformer.h[0].attn.c_attn.weight.requires_grad_(True)
    for each in (adapted, plain):
        torch.manual_seed(0)
        each(TEXT, labels=TEXT).loss.backward()
    a, b = layer.lora_A["default"].weight, layer.lora_B["default"].weight
    torch.testing.assert_close(b.grad, 2 * reference.grad.T @ a.T)
    torch.testing.assert_close(a.grad, 2 * b.T @ reference.grad.T)
    assert layer.base_layer.weight.grad is None


def test_merging_and_leaving_out_are_exact_and_come_back():
    model = quantized()
    before, weight = outputs(model, TEXT), model.model.layers[0].self_attn.q_proj.weight
    kept = weight.clone()
    adapted = randomized(peft.get_peft_model(model, lora(init_lora_weights="daq_bounds")))
    with_adapter = outputs(adapted, TEXT)
    adapted.merge_adapter()
    assert not torch.equal(weight, kept)
    assert torch.equal(outputs(adapted, TEXT), with_adapter)
    adapted.unmerge_adapter()
    assert torch.equal(weight, kept)
    assert torch.equal(outputs(adapted, TEXT), with_adapter)
    adapted.merge_adapter()
    with adapted.disable_adapter():
        assert torch.equal(outputs(adapted, TEXT), before)
    assert torch.equal(outputs(adapted, TEXT), with_adapter)
    with pytest.warns(UserWarning, match="Already unmerged"):
        adapted.unmerge_adapter()
    assert torch.equal(outputs(adapted.unload(), TEXT), before)


def test_what_is_kept_for_evaluation_follows_every_change():
    adapted = randomized(peft.get_peft_model(quantized(), lora()))
    layer = adapted.get_base_model().model.layers[0].self_attn.q_proj
    for change in (
        lambda: layer.lora_B["default"].weight.data.mul_(3),
        lambda: layer.set_scale("default", 3.0),
        lambda: layer.base_layer.weight.data.neg_(),
        lambda: layer.base_layer.w_quant.scale.data.mul_(2),
    ):
        known = outputs(adapted, TEXT)
        assert torch.equal(outputs(adapted, TEXT), known)
        change()
        assert not torch.equal(outputs(adapted, TEXT), known)
        assert torch.equal(outputs(copy.deepcopy(adapted).merge_and_unload(), TEXT), outputs(adapted, TEXT))


def test_several_adapters_are_added_up():
    adapted = peft.get_peft_model(quantized(), lora())
    adapted.add_adapter("other", lora(r=4, use_rslora=True))
    adapted.base_model.set_adapter(["default", "other"])
    trained = outputs(randomized(adapted), TEXT)
    assert torch.equal(outputs(copy.deepcopy(adapted).merge_and_unload(), TEXT), trained)
    adapted.set_adapter("other")
    other = outputs(adapted, TEXT)
    assert not torch.equal(other, trained)
    assert torch.equal(outputs(adapted.merge_and_unload(), TEXT), other)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_bfloat16_and_autocast_merge_exactly(dtype):
    model = quantized(weight_bits=4).to(dtype)
    adapted = randomized(peft.get_peft_model(model, lora(init_lora_weights="daq_bounds"))).train()
    assert {p.dtype for name, p in adapted.named_parameters() if "lora_" in name} == {torch.float32}
    with torch.autocast("cpu", torch.bfloat16):
        adapted(TEXT, labels=TEXT).loss.backward()
        trained = outputs(adapted, TEXT)
    assert all(p.grad.isfinite().all() for p in adapted.parameters() if p.requires_grad)
    plain = outputs(adapted, TEXT)
    merged = adapted.merge_and_unload()
    assert torch.equal(outputs(merged, TEXT), plain)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(outputs(merged, TEXT), trained)


@pytest.mark.parametrize("kind", ["packed", "quantized", "low_memory"])
def test_gradient_checkpointing_changes_no_gradient(kind):
    grads = []
    for checkpointing in (False, True):
        model = quantized(activation_bits=8, low_memory=kind == "low_memory")
        model = hf_daq.pack(model) if kind == "packed" else model
        model = randomized(peft.get_peft_model(model, lora(init_lora_weights="daq_bounds")))
        if checkpointing:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore", FutureWarning)
                model.gradient_checkpointing_enable({"use_reentrant": False})
            model.enable_input_require_grads()
        model.train()(TEXT, labels=TEXT).loss.backward()
        grads.append([parameter.grad for parameter in model.parameters() if parameter.requires_grad])
    assert len(grads[0]) == len(grads[1]) > 0
    for one, other in zip(*grads, strict=True):
        torch.testing.assert_close(one, other, rtol=0, atol=0)


def test_biases_and_layers_in_float():
    model = quantized("bert", modules_to_not_convert=["*query"])
    assert not any("query" in name for name in quantized_layers(model))
    adapted = peft.get_peft_model(model, lora(["query", "key"], bias="lora_only"))
    biases = [name for name, parameter in adapted.named_parameters() if parameter.requires_grad and "bias" in name]
    assert len(biases) == 4
    trained = outputs(randomized(adapted), TEXT)
    assert torch.equal(outputs(adapted.merge_and_unload(), TEXT), trained)


def test_transformers_adds_it_too(monkeypatch):
    monkeypatch.setattr(transformers.integrations.peft, "MIN_PEFT_VERSION", "0.10.0")
    model = quantized()
    before = outputs(model, TEXT)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model.add_adapter(lora())
    assert torch.equal(outputs(model, TEXT), before)
    assert not torch.equal(outputs(randomized(model), TEXT), before)


def test_adapters_beside_the_quantizer_stay_what_they_were():
    model = quantized()
    adapted = randomized(peft.get_peft_model(model, lora(init_lora_weights=True, lora_dropout=0.1)))
    assert type(adapted.get_base_model().model.layers[0].self_attn.q_proj) is peft.tuners.lora.Linear
    beside = outputs(adapted, TEXT)
    assert not torch.equal(outputs(adapted.merge_and_unload(), TEXT), beside)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"lora_dropout": 0.1}, r"lora_dropout=0.1 .*write lora_dropout=0.0"),
        ({"use_dora": True}, "use_dora=True does not go with"),
        ({"targets": ["embed_tokens"]}, r"'model.embed_tokens' is a DaqEmbedding.*exclude_modules=\['model.embed"),
    ],
)
def test_refused_options(options, message):
    with pytest.raises(ModelError, match=message):
        peft.get_peft_model(quantized(embedding_bits=8), lora(**options))


def test_refused_layers():
    model = tiny_llama(tie_word_embeddings=True)
    hf_daq.apply_daq(model, weight_bits=4, embedding_bits=4)
    with hf_daq.calibrate(model, check=False):
        model(TEXT)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        with pytest.raises(ModelError, match="'lm_head' computes with the weight of layer 'model.embed_tokens'"):
            peft.get_peft_model(model, lora(["lm_head"]))
    layers = nn.Sequential(nn.Conv2d(4, 4, 3), timm.layers.StdConv2d(4, 4, 3), nn.Conv2d(4, 4, 3, groups=4))
    hf_daq.apply_daq(layers, weight_bits=4, first_last_bits=8)
    for name, problem in (("1", "standardizes its weight"), ("2", "a convolution with groups")):
        with pytest.raises(ModelError, match=problem):
            peft.get_peft_model(layers, lora([name]))


def test_peft_alone_refuses_the_file(monkeypatch, tmp_path):
    peft.get_peft_model(quantized(), lora()).save_pretrained(tmp_path)
    alone = staticmethod(peft.LoraModel._create_new_module.__wrapped__)
    monkeypatch.setattr(peft.LoraModel, "_create_new_module", alone)
    with pytest.raises(ValueError, match="Unknown initialization"):
        peft.PeftModel.from_pretrained(tiny_llama(), tmp_path)


def test_bounds_of_an_adapter_need_a_quantized_layer(tmp_path):
    peft.get_peft_model(quantized(), lora(init_lora_weights="daq_bounds")).save_pretrained(tmp_path)
    with pytest.raises(ModelError, match=r"bounds for layer .*q_proj', which is not quantized here"):
        peft.PeftModel.from_pretrained(tiny_llama(), tmp_path)


def test_refused_uses():
    adapted = peft.get_peft_model(quantized(), lora(init_lora_weights="daq_bounds"))
    with pytest.raises(ModelError, match="rows of one adapter at a time"):
        copy.deepcopy(adapted).eval()(TEXT, adapter_names=["default", "default"])
    with pytest.raises(ModelError, match=r"init_lora_weights=True, and the layers.*of its own"):
        copy.deepcopy(adapted).add_adapter("beside", lora(init_lora_weights=True))
    adapted.add_adapter("other", lora(init_lora_weights="daq_bounds"))
    adapted.base_model.set_adapter(["default", "other"])
    with pytest.raises(ModelError, match=r"activate one of them: model.set_adapter"):
        adapted(TEXT)
    adapted.set_adapter("default")
    layer = adapted.get_base_model().model.layers[0].self_attn.q_proj
    kept = layer.base_layer.weight.clone()
    layer.lora_B["default"].weight.data.fill_(torch.nan)
    with pytest.raises(ModelError, match="a merged value is not finite"):
        adapted.merge_adapter(safe_merge=True)
    assert torch.equal(layer.base_layer.weight, kept)


def test_shards_are_not_merged(group):
    model = peft.get_peft_model(quantized(), lora(init_lora_weights="daq"))
    model.merge_adapter()
    fully_shard(model, mesh=init_device_mesh("cpu", (1,)))
    with pytest.raises(ModelError, match=r"model is sharded: write model.save_pretrained\(folder, state_dict=accel"):
        model.unmerge_adapter()
    model = peft.get_peft_model(quantized(), lora(init_lora_weights="daq"))
    fully_shard(model, mesh=init_device_mesh("cpu", (1,)))
    outputs(model.eval(), TEXT)  # the outermost module keeps its whole weights now
    assert all(getattr(module, "_known", None) is None for module in model.modules())  # but no adapted ones
    with pytest.raises(ModelError, match="merging writes whole weights, and the model is sharded"):
        model.merge_and_unload()


def test_parameters_of_experts_are_adapted_inside_their_quantizers():
    torch.manual_seed(0)
    model = tiny_moe().eval()
    hf_daq.apply_daq(model, weight_bits=4, activation_bits=None)
    before = model(TEXT).logits
    names = ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"]
    adapted = peft.get_peft_model(model, peft.LoraConfig(r=4, target_parameters=names))
    for name, parameter in adapted.named_parameters():
        if "lora_B" in name:
            nn.init.normal_(parameter, std=0.1)
    adapted(TEXT).logits.square().sum().backward()
    assert all(value.grad is not None for value in adapted.parameters() if value.requires_grad)
    with torch.no_grad():
        found = adapted.eval()(TEXT).logits
        assert not torch.allclose(found, before, atol=1e-3)
        assert torch.equal(adapted.merge_and_unload()(TEXT).logits, found)


def test_what_would_look_past_the_adapter_is_refused(tmp_path):
    adapted = peft.get_peft_model(quantized(), lora())
    model = adapted.get_base_model()
    uses = {
        "measured": lambda: hf_daq.summary(adapted, TEXT),
        "monitored": lambda: hf_daq.Monitor(adapted),
        "computed in integers": lambda: hf_daq.integer_arithmetic(adapted).__enter__(),
        "exported": lambda: hf_daq.export_onnx(adapted, tmp_path / "x.onnx", TEXT),
        "reconstructed": lambda: hf_daq.reconstruct(adapted, [TEXT]),
        "calibrated": lambda: hf_daq.calibrate(adapted).__enter__(),
    }
    for what, use in uses.items():
        with pytest.raises(ModelError, match=rf"cannot be {what} as it is.*merge_and_unload"):
            use()
    for use in (hf_daq.pack, lambda m: hf_daq.save_pretrained(m, tmp_path / "whole", packed=True)):
        with pytest.raises(ModelError, match="has an adapter"):
            use(model)
    adapted.merge_adapter()
    assert hf_daq.summary(model, TEXT).layers
