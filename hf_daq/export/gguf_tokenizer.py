"""The tokenizer of a GGUF file, from a `tokenizer.json`: byte-level BPE, and BPE that sentencepiece trained."""

from __future__ import annotations

import json
import tempfile
from pathlib import Path
from typing import Any

from ..errors import ExportError

_WORDS = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|"
_REST = r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
_UPPER, _LOWER = r"[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]", r"[\p{Ll}\p{Lm}\p{Lo}\p{M}]"
_TEKKEN = (
    rf"[^\r\n\p{{L}}\p{{N}}]?{_UPPER}*{_LOWER}+|[^\r\n\p{{L}}\p{{N}}]?{_UPPER}+{_LOWER}*|\p{{N}}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
SPLITS = {
    rf"{_WORDS}\p{{N}}{{1,3}}{_REST}": ("llama-bpe", True),
    rf"{_WORDS}\p{{N}}{_REST}": ("qwen2", False),
    _TEKKEN: ("tekken", True),
    None: ("gpt-2", False),
}
"""How text is cut before pairs are merged, by the pattern in tokenizer.json (None: that of GPT-2): the name in llama.cpp, and
whether it takes a piece that is a token without merging."""


def add_tokenizer(writer: Any, gguf: Any, tokenizer: Any, vocabulary: int) -> None:
    """Write a tokenizer with `vocabulary` tokens.

    Args:
        tokenizer: a folder with a tokenizer.json, or a tokenizer of transformers; None for a file without one.

    Raises:
        ExportError: no tokenizer.json, or one that llama.cpp has no form of.
    """
    if tokenizer is None:
        writer.add_tokenizer_model("none")
        return
    if isinstance(tokenizer, (str, Path)):
        _add_folder(writer, gguf, Path(tokenizer), vocabulary)
        return
    if not hasattr(tokenizer, "save_pretrained"):
        raise ExportError(
            f"tokenizer={tokenizer!r} is neither a folder nor a tokenizer of transformers; write "
            "tokenizer=AutoTokenizer.from_pretrained(...)"
        )
    with tempfile.TemporaryDirectory() as folder:
        tokenizer.save_pretrained(folder)
        _add_folder(writer, gguf, Path(folder), vocabulary)


def _add_folder(writer: Any, gguf: Any, folder: Path, vocabulary: int) -> None:
    from transformers import AutoTokenizer

    path = folder / "tokenizer.json"
    if not path.is_file():
        raise ExportError(f"{folder} has no tokenizer.json; pass tokenizer=AutoTokenizer.from_pretrained(...)")
    try:
        described = json.loads(path.read_text(encoding="utf-8"))
        tokenizer = AutoTokenizer.from_pretrained(folder, local_files_only=True)
        model = described["model"]
        kind = model["type"]
    except Exception as error:
        raise ExportError(f"{path} is no tokenizer that transformers opens: {type(error).__name__}: {error}") from error
    if kind != "BPE":
        raise ExportError(f"{path} holds a tokenizer {kind!r}; GGUF files of decoders have BPE")
    if len(tokenizer) > vocabulary:
        raise ExportError(
            f"the tokenizer has {len(tokenizer)} tokens, the model {vocabulary}; write "
            "model.resize_token_embeddings(len(tokenizer)) before training"
        )
    by_bytes = not model.get("byte_fallback")
    if by_bytes:
        writer.add_tokenizer_model("gpt2")
        writer.add_tokenizer_pre(_split(described, path))
    else:
        writer.add_tokenizer_model("llama")
        writer.add_tokenizer_pre("default")
        writer.add_add_space_prefix(_has_space_prefix(described))
    tokens, types = _tokens(gguf, tokenizer, model, vocabulary)
    writer.add_token_list(tokens)
    writer.add_token_types(types)
    if not by_bytes:
        writer.add_token_scores(_scores(model, tokens))
    special = gguf.SpecialVocab(folder, load_merges=by_bytes, n_vocab=vocabulary)
    ids = tokenizer("a")["input_ids"]
    special.add_special_token = {"bos": ids[0] == tokenizer.bos_token_id, "eos": ids[-1] == tokenizer.eos_token_id}
    special.add_to_gguf(writer, quiet=True)


def _tokens(gguf: Any, tokenizer: Any, model: Any, vocabulary: int) -> tuple[list[str], list[int]]:
    kinds = gguf.TokenType
    texts = {index: text for text, index in tokenizer.get_vocab().items()}
    added = tokenizer.added_tokens_decoder
    tokens, types = [], []
    for index in range(vocabulary):
        text = texts.get(index, f"[PAD{index}]")
        if index not in texts:
            kind = kinds.UNUSED
        elif model.get("byte_fallback") and len(text) == 6 and text.startswith("<0x"):
            kind = kinds.BYTE
        elif index in added and text == model.get("unk_token"):
            kind = kinds.UNKNOWN
        elif index in added:
            kind = kinds.CONTROL if added[index].special else kinds.USER_DEFINED
        else:
            kind = kinds.NORMAL
        tokens.append(text.replace("\u2581", " ") if kind == kinds.USER_DEFINED else text)
        types.append(int(kind))
    return tokens, types


def _split(described: Any, path: Path) -> str:
    """The name that llama.cpp has for what is done before pairs are merged."""
    before = described.get("pre_tokenizer") or {}
    steps = before.get("pretokenizers", [before])
    patterns = [step["pattern"].get("Regex") for step in steps if step.get("type") == "Split"]
    levels = [step for step in steps if step.get("type") == "ByteLevel"]
    known = len(levels) == 1 and len(patterns) + 1 == len(steps) and not levels[0].get("add_prefix_space")
    own = bool(levels) and levels[0].get("use_regex", True)
    pattern = None if own and not patterns else patterns[0] if len(patterns) == 1 and not own else ""
    name, ignores_merges = SPLITS.get(pattern, ("", False))
    normalizer = (described.get("normalizer") or {"type": "NFC"})["type"]
    if not known or not name or normalizer != "NFC" or bool(described["model"].get("ignore_merges")) != ignores_merges:
        names = ", ".join(sorted({known_name for known_name, _ in SPLITS.values()}))
        raise ExportError(
            f"{path} cuts text in a way that is not known here, so that llama.cpp would give other tokens; known are those of "
            f"{names}. Leave tokenizer out, and give llama.cpp ids of tokens"
        )
    return name


def _has_space_prefix(described: Any) -> bool:
    """Whether a space is put before the text."""
    parts: list[Any] = []
    for key, inner in (("normalizer", "normalizers"), ("pre_tokenizer", "pretokenizers")):
        step = described.get(key) or {}
        parts += step.get(inner, [step])
    return any(
        part.get("type") == "Prepend"
        or (part.get("type") == "Metaspace" and part.get("prepend_scheme", "always") != "never")
        for part in parts
    )


def _scores(model: Any, tokens: list[str]) -> list[float]:
    """What is merged first has the highest score."""
    ranks: dict[str, int] = {}
    for rank, pair in enumerate(model["merges"]):
        ranks.setdefault("".join(pair.split(" ") if isinstance(pair, str) else pair), rank)
    return [-float(ranks.get(token, len(ranks))) for token in tokens]
