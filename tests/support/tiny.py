"""Transformers models of many architectures, tiny and with random weights, and what a plan for them should say."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import torch
import transformers as tf
from torch import Tensor, nn

VOCABULARY = 61
TEXT = {"vocab_size": VOCABULARY, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
BERT = {
    **TEXT,
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "intermediate_size": 44,
    "max_position_embeddings": 40,
}
LLAMA = {**BERT, "num_key_value_heads": 2}
MARIAN = {
    **TEXT,
    "d_model": 32,
    "encoder_layers": 2,
    "decoder_layers": 2,
    "encoder_attention_heads": 4,
    "decoder_attention_heads": 4,
    "encoder_ffn_dim": 44,
    "decoder_ffn_dim": 44,
    "max_position_embeddings": 40,
    "decoder_start_token_id": 2,
    "forced_eos_token_id": None,
}
T5 = {
    **TEXT,
    "d_model": 32,
    "d_kv": 8,
    "d_ff": 44,
    "num_layers": 2,
    "num_heads": 4,
    "eos_token_id": 2,
    "decoder_start_token_id": 0,
}
VIT = {
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "intermediate_size": 44,
    "image_size": 16,
    "patch_size": 4,
}
CLIP_TEXT = {**BERT, "projection_dim": 32}


@dataclasses.dataclass
class Tiny:
    """One architecture.

    Args:
        build: makes the model.
        inputs: "text", "decoder", "seq2seq", "image", "image+text", "speech" or "audio".
        quantized: how many layers a plan quantizes.
        kept: how many modules a plan keeps, by reason.
        base: the class of the base model, opened from the folder of the model and the other way; None if there is none.
        size: of the image.
    """

    build: Callable[[], Any]
    inputs: str
    quantized: int
    kept: dict[str, int]
    base: Any = None
    size: int = 16


def of(model_class: Any, config_class: Any, **config: Any) -> Callable[[], Any]:
    return lambda: model_class(config_class(**config))


def _timm_wrapper() -> Any:
    config = tf.TimmWrapperConfig(
        architecture="test_vit", num_labels=5, model_args={"img_size": 32}, initializer_range=0.02
    )
    return tf.TimmWrapperForImageClassification(config)


ARCHITECTURES: dict[str, Tiny] = {
    "bert": Tiny(
        of(tf.BertForSequenceClassification, tf.BertConfig, **BERT, num_labels=5),
        "text",
        13,
        {"embedding": 3, "head": 1},
        tf.BertModel,
    ),
    "bert_qa": Tiny(
        of(tf.BertForQuestionAnswering, tf.BertConfig, **BERT), "text", 12, {"embedding": 3, "head": 1}, tf.BertModel
    ),
    "bert_mlm": Tiny(
        of(tf.BertForMaskedLM, tf.BertConfig, **BERT),
        "text",
        12,
        {"embedding": 3, "head": 1, "shares its weight with bert.embeddings.word_embeddings": 1},
        tf.BertModel,
    ),
    "distilbert": Tiny(
        of(
            tf.DistilBertForSequenceClassification,
            tf.DistilBertConfig,
            **TEXT,
            dim=32,
            n_layers=2,
            n_heads=4,
            hidden_dim=44,
            max_position_embeddings=40,
            num_labels=5,
        ),
        "text",
        12,
        {"embedding": 2, "head": 2},
        tf.DistilBertModel,
    ),
    "roberta": Tiny(
        of(tf.RobertaForSequenceClassification, tf.RobertaConfig, **BERT, num_labels=5),
        "text",
        12,
        {"embedding": 3, "head": 2},
        tf.RobertaModel,
    ),
    "xlm_roberta": Tiny(
        of(tf.XLMRobertaForTokenClassification, tf.XLMRobertaConfig, **BERT, num_labels=5),
        "text",
        12,
        {"head": 1, "embedding": 3},
        tf.XLMRobertaModel,
    ),
    "deberta_v2": Tiny(
        of(
            tf.DebertaV2ForSequenceClassification,
            tf.DebertaV2Config,
            **BERT,
            num_labels=5,
            relative_attention=True,
            pos_att_type=["p2c", "c2p"],
            position_buckets=8,
            norm_rel_ebd="layer_norm",
            share_att_key=True,
            position_biased_input=False,
            type_vocab_size=0,
        ),
        "text",
        12,
        {"embedding": 2, "head": 2},
        tf.DebertaV2Model,
    ),
    "electra": Tiny(
        of(tf.ElectraForSequenceClassification, tf.ElectraConfig, **BERT, embedding_size=24, num_labels=5),
        "text",
        13,
        {"embedding": 3, "head": 2},
        tf.ElectraModel,
    ),
    "albert": Tiny(
        of(tf.AlbertForMaskedLM, tf.AlbertConfig, **BERT, embedding_size=24),
        "text",
        7,
        {"embedding": 3, "head": 1, "shares its weight with albert.embeddings.word_embeddings": 1},
        tf.AlbertModel,
    ),
    "t5": Tiny(
        of(tf.T5ForConditionalGeneration, tf.T5Config, **T5),
        "seq2seq",
        32,
        {"embedding": 1, "table of biases": 2, "shares its weight with shared": 3},
        tf.T5Model,
    ),
    "t5_gated": Tiny(
        of(tf.T5ForConditionalGeneration, tf.T5Config, **T5, feed_forward_proj="gated-gelu"),
        "seq2seq",
        36,
        {"embedding": 1, "table of biases": 2, "shares its weight with shared": 3},
        tf.T5Model,
    ),
    "bart": Tiny(
        of(tf.BartForConditionalGeneration, tf.BartConfig, **MARIAN),
        "seq2seq",
        32,
        {"embedding": 3, "shares its weight with model.shared": 3},
        tf.BartModel,
    ),
    "bart_classifier": Tiny(
        of(tf.BartForSequenceClassification, tf.BartConfig, **MARIAN, num_labels=5),
        "text",
        32,
        {"embedding": 3, "shares its weight with model.shared": 2, "head": 2},
        tf.BartModel,
    ),
    "marian": Tiny(
        of(tf.MarianMTModel, tf.MarianConfig, **MARIAN),
        "seq2seq",
        32,
        {"embedding": 3, "shares its weight with model.shared": 3},
        tf.MarianModel,
    ),
    "m2m_100": Tiny(
        of(tf.M2M100ForConditionalGeneration, tf.M2M100Config, **MARIAN),
        "seq2seq",
        32,
        {"embedding": 1, "shares its weight with model.shared": 3},
        tf.M2M100Model,
    ),
    "gpt2": Tiny(
        of(tf.GPT2LMHeadModel, tf.GPT2Config, **TEXT, n_embd=32, n_layer=2, n_head=4, n_inner=44, n_positions=40),
        "decoder",
        8,
        {"embedding": 2, "shares its weight with transformer.wte": 1},
        tf.GPT2Model,
    ),
    "llama": Tiny(
        of(tf.LlamaForCausalLM, tf.LlamaConfig, **LLAMA), "decoder", 14, {"embedding": 1, "head": 1}, tf.LlamaModel
    ),
    "llama_tied": Tiny(
        of(tf.LlamaForCausalLM, tf.LlamaConfig, **LLAMA, tie_word_embeddings=True),
        "decoder",
        14,
        {"embedding": 1, "shares its weight with model.embed_tokens": 1},
        tf.LlamaModel,
    ),
    "llama_classifier": Tiny(
        of(tf.LlamaForSequenceClassification, tf.LlamaConfig, **LLAMA, num_labels=5),
        "text",
        14,
        {"embedding": 1, "head": 1},
        tf.LlamaModel,
    ),
    "mistral": Tiny(
        of(tf.MistralForCausalLM, tf.MistralConfig, **LLAMA, sliding_window=6),
        "decoder",
        14,
        {"embedding": 1, "head": 1},
        tf.MistralModel,
    ),
    "qwen2": Tiny(
        of(tf.Qwen2ForCausalLM, tf.Qwen2Config, **LLAMA, tie_word_embeddings=True),
        "decoder",
        14,
        {"embedding": 1, "shares its weight with model.embed_tokens": 1},
        tf.Qwen2Model,
    ),
    "qwen3": Tiny(
        of(tf.Qwen3ForCausalLM, tf.Qwen3Config, **LLAMA, head_dim=10),
        "decoder",
        14,
        {"embedding": 1, "head": 1},
        tf.Qwen3Model,
    ),
    "gemma2": Tiny(
        of(tf.Gemma2ForCausalLM, tf.Gemma2Config, **LLAMA, head_dim=10, sliding_window=6, query_pre_attn_scalar=10),
        "decoder",
        14,
        {"embedding": 1, "shares its weight with model.embed_tokens": 1},
        tf.Gemma2Model,
    ),
    "gemma3": Tiny(
        of(tf.Gemma3ForCausalLM, tf.Gemma3TextConfig, **LLAMA, head_dim=10, sliding_window=6, query_pre_attn_scalar=10),
        "decoder",
        14,
        {"embedding": 1, "shares its weight with model.embed_tokens": 1},
        tf.Gemma3TextModel,
    ),
    "phi3": Tiny(
        of(tf.Phi3ForCausalLM, tf.Phi3Config, **LLAMA), "decoder", 8, {"embedding": 1, "head": 1}, tf.Phi3Model
    ),
    "opt": Tiny(
        of(
            tf.OPTForCausalLM,
            tf.OPTConfig,
            **TEXT,
            hidden_size=32,
            num_hidden_layers=2,
            num_attention_heads=4,
            ffn_dim=44,
            max_position_embeddings=40,
            word_embed_proj_dim=24,
        ),
        "decoder",
        14,
        {"embedding": 2, "shares its weight with model.decoder.embed_tokens": 1},
        tf.OPTModel,
    ),
    "bloom": Tiny(
        of(tf.BloomForCausalLM, tf.BloomConfig, **TEXT, hidden_size=32, n_layer=2, n_head=4),
        "decoder",
        8,
        {"embedding": 1, "shares its weight with transformer.word_embeddings": 1},
        tf.BloomModel,
    ),
    "mixtral": Tiny(
        of(
            tf.MixtralForCausalLM,
            tf.MixtralConfig,
            **{**LLAMA, "intermediate_size": 48},
            num_local_experts=4,
            num_experts_per_tok=2,
        ),
        "decoder",
        12,
        {"embedding": 1, "router": 2, "head": 1},
        tf.MixtralModel,
    ),
    "qwen2_moe": Tiny(
        of(
            tf.Qwen2MoeForCausalLM,
            tf.Qwen2MoeConfig,
            **LLAMA,
            num_experts=4,
            num_experts_per_tok=2,
            moe_intermediate_size=24,
            shared_expert_intermediate_size=28,
        ),
        "decoder",
        18,
        {"embedding": 1, "router": 4, "head": 1},
        tf.Qwen2MoeModel,
    ),
    "qwen3_moe": Tiny(
        of(
            tf.Qwen3MoeForCausalLM,
            tf.Qwen3MoeConfig,
            **LLAMA,
            head_dim=8,
            num_experts=8,
            num_experts_per_tok=2,
            moe_intermediate_size=48,
        ),
        "decoder",
        12,
        {"embedding": 1, "router": 2, "head": 1},
        tf.Qwen3MoeModel,
    ),
    "deepseek_v3": Tiny(
        of(
            tf.DeepseekV3ForCausalLM,
            tf.DeepseekV3Config,
            **LLAMA | {"num_key_value_heads": 4},
            moe_intermediate_size=48,
            n_routed_experts=8,
            num_experts_per_tok=2,
            n_group=2,
            topk_group=1,
            first_k_dense_replace=1,
            kv_lora_rank=16,
            q_lora_rank=16,
            qk_rope_head_dim=8,
            qk_nope_head_dim=8,
            v_head_dim=8,
        ),
        "decoder",
        18,
        {"embedding": 1, "router": 1, "head": 1},
        tf.DeepseekV3Model,
    ),
    "llama4": Tiny(
        of(
            tf.Llama4ForCausalLM,
            tf.Llama4TextConfig,
            **LLAMA | {"intermediate_size": 48},
            head_dim=8,
            intermediate_size_mlp=44,
            num_local_experts=4,
            num_experts_per_tok=1,
            interleave_moe_layer_step=2,
            attn_temperature_tuning=False,
        ),
        "decoder",
        16,
        {"embedding": 1, "router": 1, "head": 1},  # no base: its class names another prefix than it has
    ),
    "gpt_oss": Tiny(
        of(
            tf.GptOssForCausalLM,
            tf.GptOssConfig,
            **LLAMA | {"intermediate_size": 48},
            head_dim=8,
            num_local_experts=8,
            num_experts_per_tok=2,
            rope_parameters={"rope_type": "default", "rope_theta": 10000.0},
        ),
        "decoder",
        12,
        {"embedding": 1, "router": 2, "head": 1},
        tf.GptOssModel,
    ),
    "switch": Tiny(
        of(
            tf.SwitchTransformersForConditionalGeneration,
            tf.SwitchTransformersConfig,
            **T5,
            num_sparse_encoder_layers=1,
            num_sparse_decoder_layers=1,
            num_decoder_layers=2,
            num_experts=2,
            expert_capacity=32,
            router_jitter_noise=0.0,
        ),
        "seq2seq",
        36,
        {"embedding": 1, "table of biases": 2, "router": 2, "shares its weight with shared": 3},
        tf.SwitchTransformersModel,
    ),
    "mamba": Tiny(
        of(
            tf.MambaForCausalLM,
            tf.MambaConfig,
            **TEXT,
            hidden_size=32,
            num_hidden_layers=2,
            state_size=4,
            expand=2,
            conv_kernel=4,
            time_step_rank=4,
        ),
        "decoder",
        2,
        {
            "embedding": 1,
            "MambaMixer reads its weight directly": 8,
            "shares its weight with backbone.embeddings": 1,
        },
        tf.MambaModel,
    ),
    "falcon_mamba": Tiny(
        of(
            tf.FalconMambaForCausalLM,
            tf.FalconMambaConfig,
            **TEXT,
            hidden_size=32,
            num_hidden_layers=2,
            state_size=4,
            expand=2,
            conv_kernel=4,
            time_step_rank=4,
        ),
        "decoder",
        2,
        {
            "embedding": 1,
            "FalconMambaMixer reads its weight directly": 8,
            "shares its weight with backbone.embeddings": 1,
        },
        tf.FalconMambaModel,
    ),
    "vit": Tiny(
        of(tf.ViTForImageClassification, tf.ViTConfig, **VIT, num_labels=5),
        "image",
        12,
        {"first layer": 1, "head": 1},
        tf.ViTModel,
    ),
    "dinov2": Tiny(
        of(tf.Dinov2ForImageClassification, tf.Dinov2Config, **VIT, num_labels=5),
        "image",
        12,
        {"first layer": 1, "head": 1},
        tf.Dinov2Model,
    ),
    "swin": Tiny(
        of(
            tf.SwinForImageClassification,
            tf.SwinConfig,
            image_size=16,
            patch_size=2,
            embed_dim=16,
            depths=[1, 2],
            num_heads=[2, 4],
            window_size=4,
            num_labels=5,
        ),
        "image",
        19,
        {"first layer": 1, "head": 1},
        tf.SwinModel,
    ),
    "convnext": Tiny(
        of(
            tf.ConvNextForImageClassification,
            tf.ConvNextConfig,
            hidden_sizes=[16, 24],
            depths=[1, 1],
            num_stages=2,
            num_labels=5,
        ),
        "image",
        7,
        {"first layer": 1, "head": 1},
        tf.ConvNextModel,
    ),
    "resnet": Tiny(
        of(
            tf.ResNetForImageClassification,
            tf.ResNetConfig,
            embedding_size=8,
            hidden_sizes=[16, 24],
            depths=[1, 2],
            layer_type="bottleneck",
            num_labels=5,
        ),
        "image",
        11,
        {"first layer": 1, "head": 1},
        tf.ResNetModel,
    ),
    "timm": Tiny(_timm_wrapper, "image", 24, {"first layer": 1, "classifier": 1}, tf.TimmWrapperModel, size=32),
    "clip": Tiny(
        lambda: tf.CLIPModel(
            tf.CLIPConfig(text_config=CLIP_TEXT, vision_config={**VIT, "projection_dim": 32}, projection_dim=32)
        ),
        "image+text",
        24,
        {"embedding": 3, "first layer": 1, "head": 2},
    ),
    "siglip": Tiny(
        lambda: tf.SiglipModel(tf.SiglipConfig(text_config={**CLIP_TEXT, "projection_size": 32}, vision_config=VIT)),
        "image+text",
        31,
        {"embedding": 3, "first layer": 1},
    ),
    "whisper": Tiny(
        of(
            tf.WhisperForConditionalGeneration,
            tf.WhisperConfig,
            **{**MARIAN, "max_position_embeddings": 40},
            num_mel_bins=8,
            max_source_positions=20,
            max_target_positions=40,
            suppress_tokens=None,
            begin_suppress_tokens=None,
        ),
        "speech",
        33,
        {"first layer": 1, "embedding": 3, "shares its weight with model.decoder.embed_tokens": 1},
        tf.WhisperModel,
    ),
    "wav2vec2": Tiny(
        of(
            tf.Wav2Vec2ForCTC,
            tf.Wav2Vec2Config,
            **BERT,
            conv_dim=[16, 16],
            conv_kernel=[5, 3],
            conv_stride=[4, 2],
            num_feat_extract_layers=2,
            num_conv_pos_embeddings=4,
            num_conv_pos_embedding_groups=2,
            mask_time_prob=0.0,
            layerdrop=0.0,
            ctc_zero_infinity=True,
        ),
        "audio",
        15,
        {"first layer": 1, "head": 1},
        tf.Wav2Vec2Model,
    ),
}


def build(name: str) -> Any:
    """The model in evaluation mode. Weights are large enough that each of them matters; what starts at zero is moved."""
    torch.manual_seed(0)
    model = ARCHITECTURES[name].build()
    with torch.no_grad():
        for key, parameter in model.named_parameters():
            if not parameter.requires_grad:  # sinusoids, which are not saved
                continue
            if parameter.ndim >= 2 and ("weight" in key or "proj" in key) and "A_log" not in key:
                fan_in = parameter.shape[1] if parameter.ndim == 3 else parameter[0].numel()
                parameter.normal_(0.0, fan_in**-0.5)
            elif not parameter.any():
                parameter.normal_(0.0, 0.1)
        for key, parameter in model.named_parameters():
            if "layer_scale" in key or "lambda1" in key or "gamma" in key:
                parameter.normal_(1.0, 0.1)
    norms = [module for module in model.modules() if isinstance(module, nn.modules.batchnorm._BatchNorm)]
    for norm in norms:
        norm.momentum = 1.0
    if norms:
        model.train()
        with torch.no_grad():
            model(**inputs(name))
    return model.eval()


def inputs(name: str, seed: int = 1, dtype: torch.dtype = torch.float32) -> dict[str, Tensor]:
    """What `model(**inputs)` takes."""
    found = _inputs(name, seed)
    return {key: value.to(dtype) if value.is_floating_point() else value for key, value in found.items()}


def base_inputs(name: str) -> dict[str, Tensor]:
    """What the base model takes."""
    found = inputs(name)
    if name == "bart_classifier":  # makes them itself, with its head
        found["decoder_input_ids"] = found["input_ids"]
    return found


def _inputs(name: str, seed: int) -> dict[str, Tensor]:
    tiny = ARCHITECTURES[name]
    generator = torch.Generator().manual_seed(seed)

    def tokens(length: int) -> Tensor:
        return torch.randint(3, VOCABULARY, (2, length), generator=generator)

    def text(length: int) -> dict[str, Tensor]:
        ids, mask = tokens(length), torch.ones(2, length, dtype=torch.long)
        if tiny.inputs == "text" and "llama" not in name and "bart" not in name:
            mask[1, -3:] = 0
        return {"input_ids": ids, "attention_mask": mask}

    images = torch.randn(2, 3, tiny.size, tiny.size, generator=generator)
    match tiny.inputs:
        case "text" | "decoder":
            found = text(9)
            if name == "bart_classifier":
                found["input_ids"][:, -1] = 2
            return found
        case "seq2seq":
            return {**text(9), "decoder_input_ids": tokens(7)}
        case "image":
            return {"pixel_values": images}
        case "image+text":
            return {**text(9), "pixel_values": images}
        case "speech":
            return {"input_features": torch.randn(2, 8, 40, generator=generator), "decoder_input_ids": tokens(7)}
        case "audio":
            return {"input_values": torch.randn(2, 320, generator=generator)}
    raise ValueError(tiny.inputs)


def outputs(model: nn.Module, batch: dict[str, Tensor]) -> Tensor:
    """All that the model predicts, as one vector."""
    with torch.no_grad():
        return prediction(model.eval()(**batch)).flatten()


def prediction(output: Any) -> Tensor:
    """Logits, or what stands for them."""
    for names in (("logits",), ("start_logits", "end_logits"), ("logits_per_text", "text_embeds", "image_embeds")):
        if all(getattr(output, name, None) is not None for name in names):
            return torch.cat([getattr(output, name).flatten().float() for name in names])
    return output.last_hidden_state.flatten().float()
