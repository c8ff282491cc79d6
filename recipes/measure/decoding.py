"""Text generation from packed weights on the CPU: speed, memory, opening time and exactness beside the float model.

    python recipes/measure/decoding.py FOLDER --bits 1 2 3 4 8 --dtypes bfloat16 float32 --threads 1
    python recipes/measure/decoding.py  # a model of the sizes of Qwen2-0.5B with random weights

FOLDER: a causal language model of transformers. Its weights are quantized in groups of `--group_size` and saved packed, with
embeddings (and an output embedding that shares their weight) in full precision, and at each of `--embedding_bits`; then
each model is opened in a process of its own, and the table has

    open, s              CPU time of from_pretrained
    prefill, s           CPU time of the prompt of `--prompt` tokens, the shortest of three
    tokens/s             of generate, batch 1, for `--tokens` tokens after the prompt
    MiB                  resident after that, over what the process took before it opened the model
    error, float32       relative, of the logits of the first tokens in float32, to those of the quantized model bit for bit
"""

import argparse
import itertools
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import psutil
import torch
import transformers
from transformers import AutoModelForCausalLM, Qwen2Config

import hf_daq
from hf_daq.nn.paths import bit_for_bit


def parse(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("folder", nargs="?", type=Path)
    add("--bits", nargs="*", type=int, default=[1, 2, 3, 4, 8])
    add(
        "--embedding_bits",
        nargs="*",
        type=int,
        default=[],
        help="of embeddings and a tied head, for models of their own",
    )
    add("--vocabulary", type=int, default=32000, help="of the model with random weights")
    add("--group_size", type=int, default=128)
    add("--dtypes", nargs="+", default=["bfloat16", "float32"])
    add("--prompt", type=int, default=128)
    add("--tokens", type=int, default=32)
    add("--threads", type=int, default=1)
    add(
        "--packed", type=Path, help="where packed models are, or are written as W1, W2, ...; else in a temporary folder"
    )
    add("--one", help=argparse.SUPPRESS)  # the dtype, in the process that measures the model in `folder`
    add("--output", type=Path, help="JSON file for the table")
    return parser.parse_args(argv)


def write_random(folder: Path, vocabulary: int, layers: int = 24) -> None:
    torch.manual_seed(0)
    sizes = {"hidden_size": 896, "num_hidden_layers": layers, "intermediate_size": 4864}
    heads = {"num_attention_heads": 14, "num_key_value_heads": 2}
    config = Qwen2Config(vocab_size=vocabulary, tie_word_embeddings=True, dtype=torch.bfloat16, **sizes, **heads)
    AutoModelForCausalLM.from_config(config).save_pretrained(folder)


def write_packed(source: Path, folder: Path, bits: int, embedding_bits: int | None, group_size: int) -> None:
    config = hf_daq.DaqConfig(weight_bits=bits, embedding_bits=embedding_bits, group_size=group_size)
    model = AutoModelForCausalLM.from_pretrained(source, quantization_config=config)
    hf_daq.save_pretrained(model, folder, packed=True)


def measure(folder: Path, dtype: str, args: argparse.Namespace) -> dict[str, Any]:
    """The figures of one model, in this process."""
    memory, before = psutil.Process().memory_info, psutil.Process().memory_info().rss
    model, opening = timed(lambda: AutoModelForCausalLM.from_pretrained(folder, dtype=getattr(torch, dtype)))
    model.generation_config.eos_token_id = None
    generator = torch.Generator().manual_seed(1)
    prompt = torch.randint(model.config.get_text_config().vocab_size, (1, args.prompt), generator=generator)
    with torch.inference_mode():
        model(prompt)  # the first call compiles
        prefill = min(timed(lambda: model(prompt, logits_to_keep=1))[1] for _ in range(3))
        options = {"max_new_tokens": args.tokens, "min_new_tokens": args.tokens, "do_sample": False}
        generate = min(timed(lambda: model.generate(prompt, **options))[1] for _ in range(3))
        row = {"open, s": opening, "prefill, s": prefill, "tokens/s": (args.tokens - 1) / (generate - prefill)}
        row["MiB"] = (memory().rss - before) / 2**20
        if dtype == "float32" and hasattr(model, "daq_config"):
            few = prompt[:, :8]  # more rows meet the same weights in float
            found = model(few).logits
            with bit_for_bit():
                expected = model(few).logits
            row["error, float32"] = ((found - expected).norm() / expected.norm()).item()
    return row


def timed(function: Callable[[], Any]) -> tuple[Any, float]:
    """Its result and CPU seconds: other work on the machine counts little."""
    start = time.process_time()
    result = function()
    return result, time.process_time() - start


def measured(folder: Path, dtype: str, args: argparse.Namespace) -> dict[str, Any]:
    """The same, in a process of its own."""
    sizes = [f"--{name}={getattr(args, name)}" for name in ("prompt", "tokens", "threads")]
    return row_of(__file__, str(folder), "--one", dtype, *sizes, OMP_NUM_THREADS=str(args.threads))


def row_of(script: str, *argv: str, **environment: str) -> dict[str, Any]:
    """What a script prints as its last line, in JSON, run in a process of its own."""
    command = [sys.executable, script, *argv]
    done = subprocess.run(command, env=os.environ | environment, check=True, stdout=subprocess.PIPE, text=True)
    row: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return row


def main(argv: list[str] | None = None) -> list[dict[str, Any]]:
    args = parse(argv)
    torch.set_num_threads(args.threads)
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    if args.one:
        row = measure(args.folder, args.one, args)
        print(json.dumps(row))
        return [row]
    rows: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory() as temporary:
        source, packed = args.folder or Path(temporary, "float"), args.packed or Path(temporary)
        if args.folder is None:
            write_random(source, args.vocabulary)
        folders = {"float": source}
        for bits, embedding_bits in itertools.product(args.bits, [None, *args.embedding_bits]):
            name = f"W{bits}" if embedding_bits is None else f"W{bits}, embeddings {embedding_bits}"
            folders[name] = packed / name
            if not folders[name].exists():
                write_packed(source, folders[name], bits, embedding_bits, args.group_size)
        for dtype in args.dtypes:
            for name, folder in folders.items():
                rows.append({"model": name, "dtype": dtype, **measured(folder, dtype, args)})
                show(rows[-1])
    if args.output:
        args.output.write_text(json.dumps({"rows": rows, "settings": vars(args)}, indent=2, default=str) + "\n")
    return rows


def show(row: dict[str, Any]) -> None:
    print("| " + " | ".join(f"{name} {number(value)}" for name, value in row.items()) + " |", flush=True)


def number(value: Any) -> str:
    return value if isinstance(value, str) else f"{value:.1e}" if value < 1e-3 else f"{value:.3g}"


if __name__ == "__main__":
    main()
