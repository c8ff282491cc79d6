"""Packed layers and networks on a GPU in bfloat16: time beside float, and error beside the quantized ones.

    python recipes/measure/gpu.py [--compiled]

A linear layer of 4096 x 4096, a ViT-small (batch 64), and the blocks of a decoder of 0.5 billion parameters (8 of 24, one token):
microseconds of a forward with what Python and launches take, and of one replayed from a CUDA graph, kernels alone. "unpacked"
is what every packed layer can do, "exact" what it does, "fast" what `pack(model, fast=True)` allows. Medians by CUDA events. What
fails says why, and the rest goes on.
"""

import argparse
import copy
import statistics
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from typing import Any

import timm
import torch
from torch import Tensor, nn
from transformers import Qwen2Config, Qwen2ForCausalLM

import hf_daq
from hf_daq.nn.packed import packed_layers
from hf_daq.nn.paths import bit_for_bit

BITS = {
    "W4": {"weight_bits": 4, "group_size": 128},
    "W3": {"weight_bits": 3, "group_size": 128},
    "W4A8": {"weight_bits": 4, "activation_bits": 8, "weight_granularity": "channel"},
    "W8A8": {"weight_bits": 8, "activation_bits": 8, "weight_granularity": "channel"},
}


def packed(model: nn.Module, name: str, x: Tensor) -> nn.Module:
    options = BITS[name]
    model = hf_daq.apply_daq(copy.deepcopy(model), **options, first_last_bits=options["weight_bits"])
    with hf_daq.calibrate(model, check=False):
        model(x)
    return hf_daq.pack(model)


def microseconds(call: Callable[[], Any], rounds: int = 21) -> float:
    times = []
    for _ in range(rounds + 3):
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        call()
        end.record()
        end.synchronize()
        times.append(1000 * start.elapsed_time(end))
    return statistics.median(times[3:])


def replayed(call: Callable[[], Any], calls: int) -> float:
    """One of several calls in a CUDA graph, which went before."""
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for _ in range(calls):
            call()
    return microseconds(graph.replay) / calls


def measured(model: nn.Module, x: Tensor, how: str, calls: int) -> Iterator[tuple[str, Any]]:
    if how != "float":
        hf_daq.pack(model, fast=how == "fast")
    with bit_for_bit() if how == "unpacked" else nullcontext():
        yield "us", microseconds(lambda: model(x))
        if how not in ("float", "compiled"):
            found = logits(model(x)).double()
            with bit_for_bit():
                expected = logits(model(x)).double()
            yield "error", ((found - expected).norm() / expected.norm()).item()
        layers = packed_layers(model)
        if len(layers) == 1:
            yield "path", next(iter(layers.values())).path(x)
        yield "graph, us", replayed(lambda: model(x), calls)


def logits(output: Any) -> Tensor:
    return output if isinstance(output, Tensor) else output.logits


def show(name: str, parts: Callable[[], Iterator[tuple[str, Any]]]) -> None:
    print(f"| {name} |", end="", flush=True)
    try:
        for key, value in parts():
            print(f" {key} {value if isinstance(value, str) else f'{value:.3g}'} |", end="", flush=True)
    except Exception as failure:
        print(f" failed: {' '.join(str(failure).split())[:300] or failure!r} |", end="")
    print(flush=True)


def compare(name: str, model: nn.Module, inputs: list[Tensor], ways: list[str], compiled: bool, calls: int) -> None:
    for way in ways:
        bits, _, how = way.partition(" ")
        try:
            found = model if bits == "float" else packed(model, bits, inputs[-1])
        except Exception as failure:
            print(f"| {name}, {way} | failed: {failure!r} |", flush=True)
            continue
        for x in inputs:
            about = f"{name}, {len(x)} rows, {way}"
            show(about, lambda found=found, x=x, how=how: measured(found, x, how or "float", calls))
            if compiled:
                run = torch.compile(found, mode="reduce-overhead")
                show(f"{about}, compiled", lambda run=run, x=x: [("us", microseconds(lambda: run(x)))])


@torch.no_grad()
def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--compiled", action="store_true", help="networks with torch.compile too: minutes")
    parser.add_argument("--rows", type=int, nargs="*", default=[1, 16, 256, 2048])
    args = parser.parse_args(argv)
    torch.manual_seed(0)
    print(torch.cuda.get_device_name(), torch.__version__, flush=True)
    linear = nn.Sequential(nn.Linear(4096, 4096, bias=False)).cuda().bfloat16()
    rows = [torch.randn(count, 4096, device="cuda").bfloat16() for count in args.rows]
    ways = ["float", "W4 unpacked", "W4 exact", "W4 fast", "W3 exact", "W4A8 exact", "W8A8 exact"]
    compare("linear", linear, rows, ways, False, 10)
    sizes = {"hidden_size": 896, "num_hidden_layers": 8, "intermediate_size": 4864, "vocab_size": 1024}
    heads = {"num_attention_heads": 14, "num_key_value_heads": 2}
    decoder = Qwen2ForCausalLM(Qwen2Config(**sizes, **heads, use_cache=False)).cuda().bfloat16().eval()
    token = torch.zeros(1, 1, dtype=torch.long, device="cuda")
    compare("decoder", decoder, [token], ["float", "W4 unpacked", "W4 exact", "W4 fast"], args.compiled, 1)
    vit = timm.create_model("vit_small_patch16_224").cuda().bfloat16().eval()
    images = torch.randn(64, 3, 224, 224, device="cuda").bfloat16()
    compare("ViT-small", vit, [images], ["float", "W8A8 unpacked", "W8A8 exact"], args.compiled, 1)


if __name__ == "__main__":
    main()
