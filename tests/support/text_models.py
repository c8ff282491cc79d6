"""Small transformers models for the tests, and what is done with them."""

import torch
from transformers import BertConfig, BertForSequenceClassification, LlamaConfig, LlamaForCausalLM

import hf_daq
from hf_daq import DaqConfig
from hf_daq.nn.paths import bit_for_bit

CONFIG = DaqConfig(weight_bits=3, activation_bits=8)


def tiny_bert(**kwargs):
    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 48}
    return BertForSequenceClassification(BertConfig(vocab_size=64, **sizes, **kwargs)).eval()


def tiny_llama(**kwargs):
    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 48}
    return LlamaForCausalLM(LlamaConfig(vocab_size=64, num_key_value_heads=1, **sizes, **kwargs)).eval()


def tokens(count=4, length=7, seed=1):
    return torch.randint(1, 64, (count, length), generator=torch.Generator().manual_seed(seed))


def calibrated(model, config=CONFIG):
    hf_daq.apply_daq(model, config)
    with hf_daq.calibrate(model):
        model(input_ids=tokens())
    return model


def logits(model):
    with torch.no_grad(), bit_for_bit():
        return model.eval()(input_ids=tokens(seed=2)).logits


def same_state(one, other):
    one, other = one.state_dict(), other.state_dict()
    assert one.keys() == other.keys()
    for name in one:
        torch.testing.assert_close(one[name], other[name], rtol=0, atol=0, equal_nan=True)
