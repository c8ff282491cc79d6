"""Perplexity of a language model with few-bit weights: calibrated, reconstructed, and by GPTQ as published.

    python recipes/measure/weights_only.py runs/llama/float --text train.txt --eval_text test.txt

Weights are quantized in groups of columns, inputs stay in float, and so do embeddings and the head. `--blocks` blocks of the text
calibrate and reconstruct. Perplexity is that of a token of the other text, of which each block is predicted without what
precedes it. "GPTQ" is the method of Frantar et al. (2023) as their code has it with groups: an asymmetric grid from the smallest to
the largest weight of a group, columns in their order, 1 % damping, layer by layer in the quantized network.
"""

import argparse
import copy
import math
import os
import time
from pathlib import Path

os.environ.setdefault("OMP_NUM_THREADS", "1")

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from tqdm.auto import tqdm
from transformers import AutoModelForCausalLM, AutoTokenizer

import hf_daq


def parse(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("model", help="folder or Hub id of a causal language model")
    add("--text", type=Path, required=True, help="file to calibrate and reconstruct with")
    add("--eval_text", type=Path, required=True, help="file to measure")
    add("--bits", type=int, nargs="+", default=[4, 3, 2])
    add("--group_size", type=int, default=64)
    add("--block_size", type=int, default=256, help="tokens")
    add("--blocks", type=int, default=64, help="of the first text")
    add("--eval_blocks", type=int, help="of the other text; all by default")
    return parser.parse_args(argv)


def read(file: Path, tokenizer, size: int, count: int | None) -> list[Tensor]:
    """Batches of blocks."""
    ids = torch.tensor(tokenizer(file.read_text(), add_special_tokens=False, verbose=False)["input_ids"])
    blocks = ids[: len(ids) // size * size].view(-1, size)
    return list(blocks[:count].split(16))


@torch.no_grad()
def perplexity(model: nn.Module, batches: list[Tensor]) -> float:
    total = count = 0
    for blocks in tqdm(batches, "perplexity", leave=False):
        logits = model(input_ids=blocks[:, :-1], use_cache=False).logits.float()
        total += F.cross_entropy(logits.transpose(1, 2), blocks[:, 1:], reduction="sum").item()
        count += blocks[:, 1:].numel()
    return math.exp(total / count)


# ----------------------------------------------------------------------------------------------------------- GPTQ


@torch.no_grad()
def gptq(model: nn.Module, names: list[str], batches: list[Tensor], bits: int, group_size: int) -> None:
    """Replace the weights of these layers, which are in the order in which they run."""
    for name in tqdm(names, "GPTQ", leave=False):
        layer = model.get_submodule(name)
        products = torch.zeros(layer.in_features, layer.in_features, dtype=torch.float64)

        def add(_: nn.Module, args: tuple[Tensor, ...], products: Tensor = products) -> None:
            x = args[0].flatten(0, -2)
            products += x.mT @ x

        hook = layer.register_forward_pre_hook(add)
        for batch in batches:
            model(input_ids=batch, use_cache=False)
        hook.remove()
        layer.weight.copy_(gptq_weight(layer.weight.double(), products, bits, group_size))


def gptq_weight(weight: Tensor, products: Tensor, bits: int, group_size: int) -> Tensor:
    """Args: weight: shape (out, in). products: of inputs with one another, summed over positions, shape (in, in)."""
    weight, result, last = weight.clone(), torch.empty_like(weight), 2**bits - 1
    dead = products.diagonal() == 0
    products = products + torch.diag(0.01 * products.diagonal().mean() + dead)
    push = torch.linalg.cholesky(torch.cholesky_inverse(torch.linalg.cholesky(products)), upper=True)
    for j in range(weight.shape[1]):
        if j % group_size == 0:
            group = weight[:, j : j + group_size]
            low, high = group.amin(1).clamp_max(0), group.amax(1).clamp_min(0)
            step = ((high - low) / last).clamp_min(1e-12)
            zero = (-low / step).round()
        code = (weight[:, j] / step + zero).round().clamp(0, last)
        result[:, j] = (code - zero) * step
        error = (weight[:, j] - result[:, j]) / push[j, j]
        weight[:, j:] -= error[:, None] * push[j, j:]
    return result


def in_order(model: nn.Module, layers: list[str], batch: Tensor) -> list[str]:
    order: list[str] = []
    hooks = [
        model.get_submodule(name).register_forward_pre_hook(lambda *_, name=name: order.append(name)) for name in layers
    ]
    with torch.no_grad():
        model(input_ids=batch, use_cache=False)
    for hook in hooks:
        hook.remove()
    return order


# ----------------------------------------------------------------------------------------------------------- main


def main(argv: list[str] | None = None) -> list[dict]:
    args = parse(argv)
    torch.manual_seed(0)
    exact = AutoModelForCausalLM.from_pretrained(args.model, dtype=torch.float32).eval()
    tokenizer = AutoTokenizer.from_pretrained(args.model)
    batches = read(args.text, tokenizer, args.block_size, args.blocks)
    test = read(args.eval_text, tokenizer, args.block_size, args.eval_blocks)
    table = [{"weights": "float", "perplexity": perplexity(exact, test)}]
    print(f"float: {table[0]['perplexity']:.2f}", flush=True)

    for bits in args.bits:

        def add(state: str, model: nn.Module, started: float, bits: int = bits) -> None:
            seconds = time.process_time() - started
            table.append(
                {"weights": f"W{bits}", "state": state, "seconds": seconds, "perplexity": perplexity(model, test)}
            )
            print(f"W{bits} {state:<14} {table[-1]['perplexity']:8.2f} {seconds:8.1f} s", flush=True)

        started, model = time.process_time(), copy.deepcopy(exact)
        hf_daq.apply_daq(model, weight_bits=bits, group_size=args.group_size)
        names = list(model.daq_config.layers)
        with hf_daq.calibrate(model, check=False):
            for batch in batches:
                model(input_ids=batch, use_cache=False)
        add("calibrated", model, started)
        started = time.process_time()
        hf_daq.reconstruct(model, [{"input_ids": batch} for batch in batches])
        add("reconstructed", model, started)

        started, model = time.process_time(), copy.deepcopy(exact)
        gptq(model, in_order(model, names, batches[0]), batches, bits, args.group_size)
        add("GPTQ", model, started)
    return table


if __name__ == "__main__":
    main()
