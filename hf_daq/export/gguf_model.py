"""The decoders that `export_gguf` knows: names, hyper-parameters, and how llama.cpp wants their tensors."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ..errors import ExportError


@dataclass(frozen=True)
class Family:
    """Decoders of one class of transformers.

    architecture: its name in the package gguf.
    activation: the one that llama.cpp computes with.
    interleaves: whether rotary embedding goes over neighboring rows of query and key in llama.cpp, and not over rows half a
        head apart as in transformers.
    norm_shift: what transformers adds to the weight of a norm.
    ties: whether llama.cpp has no output embedding but the embedding.
    biases: whether it reads those of attention.
    """

    architecture: str
    activation: str = "silu"
    interleaves: bool = False
    norm_shift: float = 0.0
    ties: bool = False
    biases: bool = False

    def order(self, name: str, rows: int, config: Any) -> Tensor | None:
        """Which row of a tensor of the model each row in the file is; None for all as they are."""
        if not self.interleaves or not name.endswith(("q_proj.weight", "q_proj.bias", "k_proj.weight", "k_proj.bias")):
            return None
        return torch.arange(rows).view(-1, 2, _head_size(config) // 2).transpose(1, 2).flatten()

    def arranged(self, name: str, value: Tensor, config: Any) -> Tensor:
        """A tensor of the model as it is in the file."""
        if self.norm_shift and name.endswith("norm.weight"):
            return value + self.norm_shift
        rows = self.order(name, len(value), config)
        return value if rows is None else value[rows]

    def extra_tensors(self, model: Any) -> dict[str, Tensor]:
        """What transformers computes from the config: by how much the scaling of Llama 3 slows each rotary frequency."""
        rope = _rope(model.config)
        if rope.get("rope_type") != "llama3":
            return {}
        slowed = model.model.rotary_emb.inv_freq.float().cpu()
        steps = torch.arange(0, 2 * len(slowed), 2, dtype=torch.float32) / (2 * len(slowed))
        return {"rope_freqs.weight": 1 / rope["rope_theta"] ** steps / slowed}


_LLAMA = Family("LLAMA", interleaves=True, biases=True)
_TANH = "gelu_pytorch_tanh"
FAMILIES = {
    "LlamaForCausalLM": _LLAMA,
    "MistralForCausalLM": _LLAMA,
    "Qwen2ForCausalLM": Family("QWEN2", biases=True),
    "Qwen3ForCausalLM": Family("QWEN3"),
    "GemmaForCausalLM": Family("GEMMA", _TANH, norm_shift=1.0, ties=True),
    "Gemma2ForCausalLM": Family("GEMMA2", _TANH, norm_shift=1.0, ties=True),
    "Gemma3ForCausalLM": Family("GEMMA3", _TANH, norm_shift=1.0),
}
_FULL_ATTENTION = {"GEMMA2": 2, "GEMMA3": 6}  # in every layer of this number
_SCALED_BY_WIDTH = {"GEMMA2": 46, "GEMMA3": 62}  # models of 27B, which llama.cpp knows by their number of layers


def family_of(model: nn.Module) -> Family:
    name = type(model).__name__
    if name not in FAMILIES or not type(model).__module__.startswith("transformers."):
        raise ExportError(
            f"{name} is not a decoder that this export knows: {', '.join(FAMILIES)}; of a model with adapters merge them first, "
            "model = model.merge_and_unload()"
        )
    return FAMILIES[name]


def _head_size(config: Any) -> int:
    size: int = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    return size


def _rope(config: Any) -> dict[str, Any]:
    """Rotary parameters, those of layers with full attention where there are two kinds."""
    parameters: dict[str, Any] = config.rope_parameters
    full: dict[str, Any] = parameters.get("full_attention", parameters)
    return full


def check_config(config: Any, family: Family) -> None:
    """Refuse what llama.cpp would compute in another way."""
    activation = getattr(config, "hidden_activation", None) or config.hidden_act
    if activation != family.activation:
        raise ExportError(
            f"llama.cpp computes {family.architecture} with {family.activation}, the model with {activation!r}"
        )
    kind = _rope(config).get("rope_type", "default")
    if kind not in ("default", "linear", "llama3") or _rope(config).get("partial_rotary_factor", 1.0) != 1.0:
        raise ExportError(
            f"rotary embedding of the kind {kind!r}, {_rope(config)}, is not written here; default, linear and llama3 are"
        )
    if getattr(config, "use_bidirectional_attention", False):
        raise ExportError("llama.cpp computes a decoder, and this model attends in both directions")
    if family.ties and not config.tie_word_embeddings:
        raise ExportError(
            f"llama.cpp has no output embedding of its own for {family.architecture}; tie_word_embeddings must be True"
        )
    if getattr(config, "attention_bias", False) and not family.biases:
        raise ExportError(f"llama.cpp reads no biases of attention for {family.architecture}, and the model has them")
    if family.architecture in _FULL_ATTENTION:
        every = _FULL_ATTENTION[family.architecture]
        if any(
            (kind == "full_attention") != (number % every == 0) for number, kind in enumerate(config.layer_types, 1)
        ):
            raise ExportError(
                f"layer_types={config.layer_types} where llama.cpp has full attention in every layer of number {every} for "
                f"{family.architecture}"
            )
    if family.architecture in _SCALED_BY_WIDTH:
        by_width = config.num_hidden_layers == _SCALED_BY_WIDTH[family.architecture]
        known = config.hidden_size // config.num_attention_heads if by_width else _head_size(config)
        if config.query_pre_attn_scalar != known:
            raise ExportError(
                f"query_pre_attn_scalar={config.query_pre_attn_scalar} where llama.cpp computes with {known} for "
                f"{family.architecture} with {config.num_hidden_layers} layers"
            )


def write_config(writer: Any, gguf: Any, config: Any, family: Family) -> None:
    """The hyper-parameters."""
    rope, head = _rope(config), _head_size(config)
    length, window = config.max_position_embeddings, getattr(config, "sliding_window", None)
    sliding = [kind == "sliding_attention" for kind in getattr(config, "layer_types", None) or ()]
    if window and family.architecture in _SCALED_BY_WIDTH:
        writer.add_sliding_window(window)
        writer.add_sliding_window_pattern(sliding)
    elif window and (any(sliding) or not sliding):
        length = min(length, window)  # llama.cpp has no window here, and up to its length there is no difference
    writer.add_vocab_size(config.vocab_size)
    writer.add_context_length(length)
    writer.add_embedding_length(config.hidden_size)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_key_length(head)
    writer.add_value_length(head)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_rope_dimension_count(head)
    writer.add_rope_freq_base(rope["rope_theta"])
    if rope.get("rope_type") == "linear":
        writer.add_rope_scaling_type(gguf.RopeScalingType.LINEAR)
        writer.add_rope_scaling_factor(rope["factor"])
    local = config.rope_parameters.get("sliding_attention")
    if local:
        writer.add_rope_freq_base_swa(local["rope_theta"])
    for name in ("attn_logit_softcapping", "final_logit_softcapping"):
        value = getattr(config, name, None)
        if value:
            getattr(writer, f"add_{name}")(value)
