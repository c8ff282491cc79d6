"""PEFT's other adapters on quantized and packed models: the model stays quantized, or an error says what to write."""

import peft
import pytest
import torch
from text_models import tiny_llama, tokens
from torch import nn
from transformers import LlamaForSequenceClassification

import hf_daq
from hf_daq.errors import ModelError

pytestmark = [
    pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning"),  # in peft
    pytest.mark.filterwarnings("ignore:Model has `tie_word_embeddings=True`:UserWarning"),
]
TEXT = tokens(2)


def quantized(packed=False, **llama):
    model = hf_daq.apply_daq(
        tiny_llama(**llama), weight_bits=3, weight_granularity="channel", embedding_bits=3, first_last_bits=8
    )
    return hf_daq.pack(model) if packed else model.eval()


@torch.no_grad()
def outputs(model):
    return model(TEXT).logits


@torch.no_grad()
def changed(adapted):
    for parameter in adapted.parameters():
        if parameter.requires_grad:
            parameter.add_(torch.randn(parameter.shape, generator=torch.Generator().manual_seed(5)), alpha=0.01)
    return adapted


def trained_tokens(alone):
    if alone:
        return peft.TrainableTokensConfig(target_modules=["embed_tokens"], token_indices=TEXT[0, :3].tolist())
    return peft.LoraConfig(
        r=2, target_modules=["q_proj"], trainable_token_indices={"embed_tokens": TEXT[0, :3].tolist()}
    )


@pytest.mark.parametrize("alone", [True, False])
@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("packed", [True, False])
def test_tokens_are_trained_in_a_quantized_table(alone, tied, packed, tmp_path):
    model = quantized(packed, tie_word_embeddings=tied)
    wanted = outputs(model)
    adapted = peft.get_peft_model(model, trained_tokens(alone)).eval()
    torch.testing.assert_close(outputs(adapted), wanted)
    adapted.train()(TEXT, labels=TEXT).loss.backward()
    assert all(parameter.grad is not None for parameter in adapted.parameters() if parameter.requires_grad)
    found = outputs(changed(adapted.eval()))
    assert not torch.equal(found, wanted)
    adapted.save_pretrained(tmp_path)
    again = peft.PeftModel.from_pretrained(quantized(packed, tie_word_embeddings=tied), tmp_path).eval()
    assert torch.equal(outputs(again), found)
    with adapted.disable_adapter():
        torch.testing.assert_close(outputs(adapted), wanted)
    if alone and not packed:
        assert torch.equal(outputs(adapted.merge_and_unload()), found)


@pytest.mark.parametrize(
    "config",
    [
        lambda target: peft.HRAConfig(r=2, target_modules=target),
        lambda target: peft.ShiraConfig(r=1, target_modules=target),
        lambda target: peft.MissConfig(r=2, init_weights="bat", target_modules=target),
    ],
)
def test_adapters_that_read_the_weight_are_refused(config, tmp_path):
    model = quantized()
    wanted = outputs(model)
    problem = r"reads the weight of layer '.*q_proj' and does not call it.*take adapters that"
    with pytest.raises(ModelError, match=problem):
        peft.get_peft_model(model, config(["q_proj"]))
    assert torch.equal(outputs(model), wanted)
    peft.get_peft_model(tiny_llama(), config(["q_proj"])).save_pretrained(tmp_path)
    with pytest.raises(ModelError, match=problem):
        peft.PeftModel.from_pretrained(model, tmp_path, low_cpu_mem_usage=True)
    convolutions = hf_daq.apply_daq(
        nn.Sequential(nn.Conv2d(3, 4, 3), nn.Conv2d(4, 4, 3), nn.Conv2d(4, 4, 1)), weight_bits=3
    )
    if isinstance(config([]), peft.HRAConfig):
        with pytest.raises(ModelError, match=r"HRAConv2d reads the weight of layer '1'"):
            peft.get_peft_model(convolutions, config(["1"]))


@pytest.mark.parametrize("packed", [True, False])
@pytest.mark.parametrize(
    "config",
    [
        lambda target: peft.OFTConfig(r=0, oft_block_size=4, target_modules=target),
        lambda target: peft.IA3Config(feedforward_modules=[], target_modules=target),
        lambda target: peft.VeraConfig(r=2, target_modules=target),
        lambda target: peft.HiraConfig(r=2, target_modules=target),
    ],
)
def test_adapters_that_call_the_layer_start_from_the_quantized_model(config, packed):
    model = quantized(packed)
    wanted = outputs(model)
    adapted = peft.get_peft_model(model, config(["q_proj", "down_proj"])).eval()
    torch.testing.assert_close(outputs(adapted), wanted)
    found = outputs(changed(adapted))
    if packed:
        with pytest.raises(ModelError, match=r"nothing can be written to it; first write hf_daq.unpack\(model\)"):
            adapted.merge_and_unload()
    else:
        assert (outputs(adapted.merge_and_unload()) - found).norm() < 0.3 * (
            found - wanted
        ).norm() + 0.3 * wanted.norm()


@pytest.mark.parametrize("layer", ["lm_head", "embed_tokens"])
def test_modules_that_are_saved_whole_learn(layer, tmp_path):
    config = peft.LoraConfig(r=2, target_modules=["q_proj"], modules_to_save=[layer])
    adapted = changed(peft.get_peft_model(quantized(), config)).eval()
    adapted.save_pretrained(tmp_path)
    again = peft.PeftModel.from_pretrained(quantized(), tmp_path).eval()
    assert torch.equal(outputs(again), outputs(adapted))
    with pytest.raises(ModelError, match=rf"{layer}' is packed, and modules_to_save .*hf_daq.unpack\(model\)"):
        peft.get_peft_model(quantized(packed=True), config)


def test_prompts_need_a_table_that_is_not_packed():
    config = peft.PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=3)
    model = quantized()
    assert torch.equal(
        peft.get_peft_model(model, config).get_prompt(1)[:, :0], torch.empty(1, 0, model.config.hidden_size)
    )
    with pytest.raises(ModelError, match=r"'model.embed_tokens' is packed, and PROMPT_TUNING looks for its weight"):
        peft.get_peft_model(quantized(packed=True), config)
    peft.get_peft_model(quantized(packed=True), peft.PrefixTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=3))


def test_a_head_that_the_task_adds_is_packed_as_well():
    model = LlamaForSequenceClassification(tiny_llama().config)
    hf_daq.pack(hf_daq.apply_daq(model, weight_bits=4, first_last_bits=8))
    with pytest.raises(ModelError, match="'score' is packed, and modules_to_save"):
        peft.get_peft_model(model, peft.LoraConfig(r=2, target_modules=["q_proj"], task_type="SEQ_CLS"))


def test_adapters_of_a_parameter_learn_and_are_switched():
    model, ids = hf_daq.apply_daq(tiny_llama(), weight_bits=8), tokens()

    def config():
        return peft.LoraConfig(r=2, target_modules=["v_proj"], target_parameters=["q_proj.weight"])

    model = peft.get_peft_model(model, config())
    model.add_adapter("other", config())
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            nn.init.normal_(parameter, std=2.0 if ".other." in name else 0.0)
    model(input_ids=ids, labels=ids).loss.backward()
    learning = {name: p.grad for name, p in model.named_parameters() if p.requires_grad and "lora_B" in name}
    assert any("q_proj" in name for name in learning)
    assert all(gradient is not None for gradient in learning.values())
    model.eval()
    with torch.no_grad():
        before = [model(input_ids=ids).logits for _ in range(2)][1]
        model.set_adapter("other")
        found = model(input_ids=ids).logits
        assert not torch.equal(found, before)
        assert torch.equal(found, model.eval()(input_ids=ids).logits)
