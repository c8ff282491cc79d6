"""How fast quantized training is, and how much memory it takes, beside float and beside other libraries.

    quantizer  one quantizer alone, forward and forward + backward, on the tensors of a layer; ratios to torch.clamp.
               kept MiB: what the forward keeps for the backward besides its input and output. GB/s: of 2 passes over
               the tensor in a forward and 3 in a backward; of a copy it is what the memory gives
    step       a whole training step (forward, loss, backward, SGD with momentum); ratios to float. peak MiB: of the
               memory in use during a step, beyond the network and the optimizer at rest
    eval       a forward in evaluation; ratios to float

Weights and inputs are random: nothing is downloaded. Every variant starts from the same float network. In each round every
variant is timed once, in reversed order every other round; a ratio is the median over the rounds of the ratio within the
round, and stands with the lowest and the highest. Variants:

    float, daq, ste  the float network; hf_daq with the gradient of DAQ, and with a straight-through one
    daq_low_memory   daq with `low_memory=True`
    daq_monitor      daq with all the work of a window of `hf_daq.Monitor` in every step
    fake_quantize    torch's own operator with a learned scale and zero point on inputs and weights of the same layers
    torchao          linear layers only: dynamic ranges, inputs per token, weights per channel
    brevitas         a learned scale for inputs, the largest value for weights, both per tensor, same layers
    nncf             its default: 8 bits whatever --bits says, layers of its own choice

Those of other libraries are measured where the library is installed. `first call s` of --compile is the time of the first
step or forward: less where torch's cache on disk has the kernels, unless TORCHINDUCTOR_FORCE_DISABLE_CACHES=1 is set.
"""

import argparse
import contextlib
import copy
import ctypes
import difflib
import gc
import importlib.util
import json
import math
import os
import platform
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

os.environ.setdefault("KINETO_LOG_LEVEL", "99")  # the profiler's notes on every start; read when torch is imported

import timm
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils.parametrize import register_parametrization
from tqdm.auto import tqdm
from transformers import BertConfig, BertForSequenceClassification

import hf_daq

sys.path.insert(0, str(Path(__file__).parents[1]))

from measure.brevitas_layers import brevitas_layer

MIB = 2**20
PARTS = ("quantizer", "step", "eval")
DAQ = ("daq", "ste", "daq_low_memory", "daq_monitor")
PEERS = ("torchao", "brevitas", "nncf")
VARIANTS = ("float", *DAQ, "fake_quantize", *PEERS)
BERTS = {"bert-tiny": (128, 2), "bert-mini": (256, 4), "bert-small": (512, 4)}  # hidden size, layers

# ---------------------------------------------------------------------------------------------------------- knobs


def parse(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--parts", nargs="+", choices=PARTS, default=list(PARTS))
    add("--models", nargs="+", default=["resnet18", "vit_tiny_patch16_224", "bert-mini"], metavar="MODEL")
    add(
        "--variants",
        nargs="+",
        choices=VARIANTS,
        metavar="VARIANT",
        help="default: all but daq_low_memory, daq_monitor",
    )
    add("--bits", type=bits, default=(4, 4), metavar="W/A", help="weight bits / activation bits (default 4/4)")
    add("--batch_size", type=int, help="images or texts (default 16, 8 for a vit)")
    add("--image_size", type=int, help="pixels (default 224)")
    add("--sequence_length", type=int, help="tokens (default 128)")
    add("--rounds", type=int, help="timings of each variant (default 7)")
    add("--device", type=torch.device, default="cuda" if torch.cuda.is_available() else "cpu")
    add("--dtype", choices=("float32", "bfloat16"), default="float32", help="bfloat16: of autocast, and in `quantizer`")
    add("--compile", action="store_true", help="torch.compile whole models (step, eval); shows the seconds it takes")
    add("--threads", type=int, help="of torch on the CPU")
    add("--memory", action=argparse.BooleanOptionalAction, default=True, help="peak memory of a step, in MiB")
    add("--profile", choices=VARIANTS, metavar="VARIANT", help="only list the slowest operators of a training step")
    add("--quick", action="store_true", help="tiny sizes and 2 rounds, to see that everything runs")
    add("--seed", type=int, default=0)
    add("--output", type=Path, help="JSON file for the tables and all timings, in seconds")
    add("--memory_of", help=argparse.SUPPRESS)  # a process of its own that measures one variant
    args = parser.parse_args(argv)
    args.argv = sys.argv[1:] if argv is None else argv
    args.rounds = args.rounds or (2 if args.quick else 7)
    args.image_size = args.image_size or (64 if args.quick else 224)
    args.sequence_length = args.sequence_length or (16 if args.quick else 128)
    for name in args.models:
        if name not in BERTS and not timm.is_model(name):
            close = difflib.get_close_matches(name, [*BERTS, *timm.list_models()], n=3)
            hint = f"did you mean {', '.join(close)}?" if close else "see timm.list_models()"
            raise SystemExit(f"unknown model {name!r}: {hint}")
    there = [name for name in PEERS if importlib.util.find_spec(name)]
    asked = args.variants or ["daq", "ste", "fake_quantize", *there]
    for name in [*asked, args.profile]:
        if name in PEERS and name not in there:
            raise SystemExit(f"variant {name!r} needs another library: pip install {name}")
    args.variants = ["float", *(name for name in dict.fromkeys(asked) if name != "float")]
    return args


def bits(text: str) -> tuple[int, int]:
    weight_bits, activation_bits = text.split("/")
    return int(weight_bits), int(activation_bits)


# ------------------------------------------------------------------------------------------------------- networks


@dataclass
class Workload:
    """A float network and one batch for it, as `model(*inputs)`."""

    title: str
    model: nn.Module
    inputs: tuple[Tensor, ...]
    labels: Tensor


def workload(name: str, args: argparse.Namespace) -> Workload:
    torch.manual_seed(args.seed)
    count = args.batch_size or (2 if args.quick else 8 if name.startswith("vit") else 16)
    model: Any
    if name in BERTS:
        hidden, layers = BERTS[name]
        sizes = {"hidden_size": hidden, "intermediate_size": 4 * hidden, "num_attention_heads": hidden // 64}
        config = BertConfig(num_hidden_layers=layers, **sizes)
        model, classes = BertForSequenceClassification(config), config.num_labels
        inputs = torch.randint(config.vocab_size, (count, args.sequence_length))
        title = f"{name}, {count} x {args.sequence_length}"
    else:
        cfg = timm.get_pretrained_cfg(name)
        sizes = {"img_size": args.image_size} if cfg and cfg.fixed_input_size else {}
        model = timm.create_model(name, **sizes)
        classes, inputs = model.num_classes, torch.randn(count, 3, args.image_size, args.image_size)
        title = f"{name}, {count} x {args.image_size} px"
    model, inputs = model.to(args.device).train(), inputs.to(args.device)
    with torch.no_grad():
        for _ in range(2):  # statistics for batch norm, which calibration uses
            model(inputs)
    return Workload(title, model, (inputs,), torch.randint(classes, (count,), device=args.device))


def daq_config(variant: str, args: argparse.Namespace) -> hf_daq.DaqConfig:
    options: dict[str, Any] = {"low_memory": True} if variant == "daq_low_memory" else {}
    rounding = "ste" if variant == "ste" else "daq"
    return hf_daq.DaqConfig(weight_bits=args.bits[0], activation_bits=args.bits[1], rounding=rounding, **options)


def build(variant: str, work: Workload, args: argparse.Namespace) -> nn.Module:
    """The variant of a copy of the float network, calibrated."""
    model = copy.deepcopy(work.model)
    names = list(hf_daq.plan(model, daq_config("daq", args)).quantized)
    if variant in DAQ:
        hf_daq.apply_daq(model, daq_config(variant, args))
        with hf_daq.calibrate(model):
            model(*work.inputs)
    elif variant == "fake_quantize":
        fake_quantize(model, names, work, args)
    elif variant == "torchao":
        torchao(model, names, args.bits)
    elif variant == "brevitas":
        brevitas(model, names, args)
    elif variant == "nncf":
        model = nncf(model, work.inputs[0])
    return model


class Run:
    """A variant of a network in training: `step` and `evaluate` are what is timed."""

    def __init__(self, variant: str, work: Workload, args: argparse.Namespace):
        torch.manual_seed(args.seed)
        self.work = work
        self.model = build(variant, work, args)
        lr = 1e-3  # the same for all: only their speed matters, and that all numbers stay finite
        params = hf_daq.param_groups(self.model, lr) if variant in DAQ else self.model.parameters()
        self.optimizer = torch.optim.SGD(params, lr, momentum=0.9)
        self.forward = torch.compile(self.model) if args.compile else self.model
        self.monitor = hf_daq.Monitor(self.model, every=3) if variant == "daq_monitor" else None
        self.autocast = torch.autocast(args.device.type, torch.bfloat16, enabled=args.dtype == "bfloat16")

    def logits(self) -> Tensor:
        output: Any = self.forward(*self.work.inputs)
        return output if isinstance(output, Tensor) else output.logits

    def step(self) -> Tensor:
        if self.monitor:  # the first two of the three steps it takes
            self.monitor.step()
            self.monitor.step()
        with self.autocast:
            loss = F.cross_entropy(self.logits(), self.work.labels)
        loss.backward()
        self.optimizer.step()
        if self.monitor:
            self.monitor.step()
        self.optimizer.zero_grad()
        return loss.detach()

    @torch.no_grad()
    def evaluate(self) -> Tensor:
        with self.autocast:
            return self.logits()


# ------------------------------------------------------------------------------------------------ other quantizers


class FakeQuantize(nn.Module):
    """torch's fused operator with a learned scale and zero point, started from the range of a tensor."""

    def __init__(self, tensor: Tensor, bit_count: int):
        super().__init__()
        self.levels = 2**bit_count - 1
        low, high = (bound.detach().float().view(1) for bound in tensor.aminmax())
        self.scale = nn.Parameter((high - low) / self.levels)
        self.zero_point = nn.Parameter(-low / self.scale.detach())

    def forward(self, x: Tensor) -> Tensor:
        return torch._fake_quantize_learnable_per_tensor_affine(
            x, self.scale, self.zero_point, 0, self.levels, grad_factor=1.0
        )


def quantize_input(layer: Any, inputs: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    return (layer.input_quantizer(inputs[0]), *inputs[1:])


@torch.no_grad()
def fake_quantize(model: nn.Module, names: list[str], work: Workload, args: argparse.Namespace) -> None:
    def start_input(layer: nn.Module, inputs: tuple[Tensor, ...]) -> None:
        layer.input_quantizer = FakeQuantize(inputs[0], args.bits[1])

    layers = [model.get_submodule(name) for name in names]
    hooks = [layer.register_forward_pre_hook(start_input) for layer in layers]
    model(*work.inputs)
    for layer, hook in zip(layers, hooks, strict=True):
        hook.remove()
        layer.register_forward_pre_hook(quantize_input)
        register_parametrization(layer, "weight", FakeQuantize(layer.weight, args.bits[0]))


def torchao_configs(bits: tuple[int, int | None], group_size: int | None = None) -> tuple[Any, Any]:
    from torchao.quantization.qat import IntxFakeQuantizeConfig

    weight_type = getattr(torch, f"int{bits[0]}")
    scales: dict[str, Any] = {"group_size": group_size} if group_size else {"granularity": "per_channel"}
    inputs = bits[1] and IntxFakeQuantizeConfig(getattr(torch, f"int{bits[1]}"), "per_token", is_symmetric=False)
    return IntxFakeQuantizeConfig(weight_type, **scales, is_symmetric=True), inputs


def torchao(model: nn.Module, names: list[str], bits: tuple[int, int | None], group_size: int | None = None) -> None:
    from torchao.quantization import quantize_
    from torchao.quantization.qat import QATConfig

    if not any(isinstance(model.get_submodule(name), nn.Linear) for name in names):
        raise ValueError("no linear layer to quantize")
    weights, inputs = torchao_configs(bits, group_size)
    config = QATConfig(activation_config=inputs, weight_config=weights, step="prepare")
    quantize_(model, config, lambda module, name: name in names and isinstance(module, nn.Linear))


def brevitas(model: nn.Module, names: list[str], args: argparse.Namespace) -> None:
    for name in names:
        model.set_submodule(name, brevitas_layer(model.get_submodule(name), args.bits))


def nncf(model: nn.Module, batch: Tensor) -> nn.Module:
    import nncf as library

    library.set_log_level("ERROR")
    return library.quantize(model.eval(), library.Dataset([batch]))


def quantizer(variant: str, layer: nn.Conv2d, x: Tensor, weight: bool, args: argparse.Namespace) -> Callable:
    """The function of the tensor `x` that the variant computes on the weight, or on the input, of a layer."""
    levels = 2 ** args.bits[not weight] - 1
    batch = torch.randn(1, layer.in_channels, 8, 8, device=x.device) if weight else x[:4].float()
    if variant in ("copy", "clamp"):
        return torch.clone if variant == "copy" else lambda x: x.clamp(0, levels)
    if variant in DAQ:
        rule = {
            "pattern": "*",
            "weight_bits": args.bits[0],
            "activation_bits": args.bits[1],
        }  # its only layer is the last
        model: Any = hf_daq.apply_daq(nn.Sequential(layer), daq_config(variant, args).replace(rules=[rule]))
        with hf_daq.calibrate(model):
            model(batch)
        return model[0].w_quant if weight else model[0].a_quant
    if variant == "fake_quantize":
        return FakeQuantize(x, args.bits[not weight])
    if variant == "torchao":
        from torchao.quantization.qat import IntxFakeQuantizer

        fake = IntxFakeQuantizer(torchao_configs(args.bits)[not weight])
        return lambda x: fake(x.flatten(1 if weight else 2)).view_as(x)
    if variant == "brevitas":
        quantized: Any = brevitas_layer(layer, args.bits)
        module = quantized.weight_quant if weight else quantized.input_quant
        module.register_forward_hook(lambda module, inputs, output: output.value)
        return module
    hooked = nncf(layer, batch)
    (module,) = [m for name, m in hooked.named_modules() if hasattr(m, "num_bits") and ("pre_hooks" in name) == weight]
    return module


# ------------------------------------------------------------------------------------------------------- measuring


def synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def seconds(call: Callable[[], object], count: int, device: torch.device) -> float:
    synchronize(device)
    started = time.perf_counter()
    for _ in range(count):
        call()
    synchronize(device)
    return (time.perf_counter() - started) / count


@contextlib.contextmanager
def peer(variant: str, fails: dict[str, str]) -> Any:
    """Another library may fail on a network: its row says so. Our own mistakes are errors."""
    try:
        yield
    except Exception as error:
        if variant not in PEERS:
            raise
        fails[variant] = (str(error) or type(error).__name__).strip().splitlines()[0][:60]


def compare(
    calls: dict[str, Callable[[], object]], baseline: str, fails: dict[str, str], args: argparse.Namespace, title: str
) -> list[dict[str, Any]]:
    """A row of timings for each call that does not fail while it warms up."""
    first = {}
    for name, call in tqdm(calls.items(), f"{title}: warm up", leave=False):
        with peer(name, fails):
            first[name] = seconds(call, 1, args.device)
            seconds(call, 2, args.device)
    # A timing lasts some 0.1 s, so that the clock and the launch of the first kernel do not matter.
    count = 1 if args.quick else min(100, math.ceil(0.1 / seconds(calls[baseline], 1, args.device)))
    names = [name for name in calls if name not in fails]
    timings: dict[str, list[float]] = {name: [] for name in names}
    for index in tqdm(range(args.rounds), title, leave=False):
        for name in names if index % 2 == 0 else reversed(names):
            timings[name].append(seconds(calls[name], count, args.device))
    rows: list[dict[str, Any]] = []
    for name in names:
        ratios = [own / base for own, base in zip(timings[name], timings[baseline], strict=True)]
        row = {"variant": name, "ms": 1000 * statistics.median(timings[name]), "ratio": statistics.median(ratios)}
        row |= {"lowest": min(ratios), "highest": max(ratios), "first_call_s": first[name], "seconds": timings[name]}
        rows.append(row)
    return rows + [{"variant": name, "fails": reason} for name, reason in fails.items()]


def kept_mib(function: Callable, x: Tensor) -> float:
    """What a forward allocates and keeps for its backward, its output left out."""
    if x.is_cuda:
        before = torch.cuda.memory_allocated(x.device)
        output = function(x)
        kept = torch.cuda.memory_allocated(x.device) - before
    else:
        with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
            output = function(x)
        kept = sum(event.self_cpu_memory_usage for event in profile.key_averages())
    return max(0, kept - output.nbytes) / MIB


def quantizer_part(args: argparse.Namespace) -> list[dict[str, Any]]:
    torch.manual_seed(args.seed)
    activations, weights = ((2, 8, 8, 8), (16, 8, 3, 3)) if args.quick else ((64, 64, 56, 56), (512, 512, 3, 3))
    rows = []
    for title, shape in {"activation": activations, "signed activation": activations, "weight": weights}.items():
        weight = title == "weight"
        layer = nn.Conv2d(shape[1], shape[0] if weight else 1, 3).to(args.device)
        x = layer.weight.detach() if weight else torch.randn(shape, device=args.device)
        x = (x.relu() if title == "activation" else x).to(getattr(torch, args.dtype)).requires_grad_()
        grad, fails, functions = torch.randn_like(x), {}, {}
        for variant in ["copy", "clamp", *args.variants[1:]]:
            with peer(variant, fails):
                functions[variant] = quantizer(variant, copy.deepcopy(layer), x.detach(), weight, args)

        def backward(function: Callable, x: Tensor = x, grad: Tensor = grad) -> None:
            learned = function.parameters() if isinstance(function, nn.Module) else []
            leaves = [x, *(parameter for parameter in learned if parameter.requires_grad)]
            torch.autograd.grad(function(x), leaves, grad, allow_unused=True)

        for direction, reads_and_writes in (("forward", 2), ("forward + backward", 5)):
            call = backward if direction != "forward" else lambda function, x=x: function(x)
            calls = {name: lambda call=call, function=function: call(function) for name, function in functions.items()}
            for row in compare(calls, "clamp", dict(fails), args, f"{title}, {direction}"):
                row = {"tensor": f"{title} {'x'.join(map(str, shape))}", "call": direction} | row
                if "ms" in row:
                    row["kept_mib"] = kept_mib(functions[row["variant"]], x)
                    count = 2 if row["variant"] == "copy" else reads_and_writes  # the gradient of a copy is not copied
                    row["gb_per_s"] = count * x.nbytes / row["ms"] / 1e6
                rows.append(row)
    return rows


def network_parts(name: str, args: argparse.Namespace) -> dict[str, list[dict[str, Any]]]:
    """The rows of `step` and of `eval` for one network."""
    work, fails, runs, tables = workload(name, args), {}, {}, {}
    for variant in tqdm(args.variants, f"{name}: build", leave=False):
        with peer(variant, fails):
            runs[variant] = Run(variant, work, args)
    for part in (part for part in ("step", "eval") if part in args.parts):
        for run in runs.values():
            run.model.train(part == "step")
        calls = {variant: run.step if part == "step" else run.evaluate for variant, run in runs.items()}
        rows = compare(calls, "float", dict(fails), args, f"{name}: {part}")
        for row in tqdm(rows, f"{name}: memory", leave=False) if part == "step" and args.memory else ():
            if "ms" in row:
                row["peak_mib"] = peak_mib(runs[row["variant"]], name, row["variant"], args)
        tables[part] = [{"model": work.title} | row for row in rows]
    return tables


def peak_mib(run: Run, name: str, variant: str, args: argparse.Namespace) -> float | None:
    """Peak memory of a training step beyond what the network and its optimizer hold. None where it cannot be measured."""
    if args.device.type == "cuda":
        synchronize(args.device)
        torch.cuda.reset_peak_memory_stats(args.device)
        before = torch.cuda.memory_allocated(args.device)
        run.step()
        return (torch.cuda.max_memory_allocated(args.device) - before) / MIB
    if not Path("/proc/self/clear_refs").exists():
        return None
    # Larger blocks go back to the system as soon as they are freed, so that the process shows what is in use.
    malloc = {"MALLOC_ARENA_MAX": "1", "MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_TRIM_THRESHOLD_": "0"}
    command = [sys.executable, __file__, *args.argv, "--models", name, "--memory_of", variant]
    result = subprocess.run(command, env=os.environ | malloc, capture_output=True, text=True)
    if result.returncode:
        raise RuntimeError(f"the process that measures the memory of {variant} failed:\n{result.stderr[-2000:]}")
    return json.loads(result.stdout.splitlines()[-1])


def measure_memory(args: argparse.Namespace) -> None:
    """Print the MiB by which the third step raises the resident size of this process."""

    def resident(key: str) -> float:
        (line,) = [line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(key)]
        return int(line.split()[1]) / 1024

    run = Run(args.memory_of, workload(args.models[0], args), args)
    run.model.train()
    run.step()
    run.step()
    gc.collect()
    if trim := getattr(ctypes.CDLL(None), "malloc_trim", None):
        trim(0)
    Path("/proc/self/clear_refs").write_text("5")  # the peak starts anew from here
    before = resident("VmRSS")
    run.step()
    print(resident("VmHWM") - before)


def profile(args: argparse.Namespace) -> None:
    for name in args.models:
        run = Run(args.profile, workload(name, args), args)
        run.model.train()
        seconds(run.step, 3, args.device)
        with torch.profiler.profile() as profiler:
            seconds(run.step, 1, args.device)
        key = "self_device_time_total" if args.device.type == "cuda" else "self_cpu_time_total"
        print(f"{run.work.title}, {args.profile}\n{profiler.key_averages().table(key, row_limit=25)}")


# ----------------------------------------------------------------------------------------------------------- main

COLUMNS = {"ms": "{:.4g}", "ratio": "{:.2f}", "lowest": "{:.2f}", "highest": "{:.2f}", "peak_mib": "{:.0f}"}
COLUMNS |= {"kept_mib": "{:.1f}", "gb_per_s": "{:.1f}", "first_call_s": "{:.1f}"}
HEADS = {"peak_mib": "peak MiB", "kept_mib": "kept MiB", "gb_per_s": "GB/s", "first_call_s": "first call s"}


def table(rows: list[dict[str, Any]], keys: Iterable[str]) -> str:
    cells = [[HEADS.get(key, key) for key in keys]]
    for row in rows:
        texts = [COLUMNS.get(key, "{}").format(row[key]) if row.get(key) is not None else "-" for key in keys]
        if "fails" in row:
            texts[list(keys).index("ms")] = f"fails: {row['fails']}".replace("|", "/")
        cells.append(texts)
    widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
    cells.insert(1, [width * "-" for width in widths])
    return "\n".join(f"| {' | '.join(map(str.ljust, line, widths))} |" for line in cells)


def describe(args: argparse.Namespace) -> dict[str, str]:
    """Where this was measured."""
    device = torch.cuda.get_device_name(args.device) if args.device.type == "cuda" else platform.machine()
    if args.device.type == "cpu" and (cpuinfo := Path("/proc/cpuinfo")).exists():
        names = [line.split(":")[1].strip() for line in cpuinfo.read_text().splitlines() if "model name" in line]
        device = f"{device} {next(iter(names), '')}".strip()
    libraries = ["torch", "timm", "transformers", *(name for name in args.variants if name in PEERS)]
    versions = {name: version(name) for name in libraries} | {"hf_daq": hf_daq.__version__}
    where = {"date": time.strftime("%Y-%m-%d"), "device": device, "threads": str(torch.get_num_threads())}
    return where | {"python": platform.python_version()} | versions


def main(argv: list[str] | None = None) -> dict[str, Any]:
    args = parse(argv)
    if args.threads:
        torch.set_num_threads(args.threads)
    if args.compile:  # one class in many variants: without room for all of them the last would silently run uncompiled
        torch._dynamo.config.cache_size_limit = torch._dynamo.config.accumulated_cache_size_limit = 1000
        torch.compile(torch.neg)(torch.ones(8, device=args.device))  # starts the compiler
    if args.memory_of:
        measure_memory(args)
        return {}
    where = describe(args)
    print(", ".join(f"{key} {value}" for key, value in where.items()))
    print(f"W{args.bits[0]}A{args.bits[1]}, {args.dtype}{', compiled' * args.compile}, {args.rounds} rounds")
    if args.profile:
        profile(args)
        return {}

    tables: dict[str, list[dict[str, Any]]] = {part: [] for part in PARTS if part in args.parts}
    results = {"tables": tables, "where": where, "settings": vars(args)}
    try:
        if "quantizer" in tables:
            tables["quantizer"] = quantizer_part(args)
        for name in args.models if {"step", "eval"} & set(tables) else ():
            for part, rows in network_parts(name, args).items():
                tables[part] += rows
    finally:  # what was measured before an error or Ctrl-C
        first = ["first_call_s"] * args.compile
        spread = ["variant", "ms", "ratio", "lowest", "highest"]
        keys = {"quantizer": ["tensor", "call", *spread, "kept_mib", "gb_per_s"]}
        keys |= {"step": ["model", *spread, "peak_mib", *first], "eval": ["model", *spread, *first]}
        for part, rows in tables.items():
            print(f"\n{part}: ratio to {'clamp' if part == 'quantizer' else 'float'}\n\n{table(rows, keys[part])}")
        if args.output:
            args.output.parent.mkdir(parents=True, exist_ok=True)
            args.output.write_text(json.dumps(results, indent=2, default=str) + "\n")
    return results


if __name__ == "__main__":
    main()
