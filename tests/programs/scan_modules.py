"""Take plain modules, which neither timm nor transformers knows, through the whole way: plan, apply, calibrate, train, save, pack,
reload, integers, remove.

    python tests/programs/scan_modules.py [--names vit_b_16 unet] [--output scan.json]

Those of torchvision have their own sizes with fewer layers. Weights are random. The exit code is 1 if a model fails.
"""

from __future__ import annotations

import sys
import tempfile
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1] / "support"))
import scanning
import torch
import torchvision.models as tv
from packed_paths import different_outputs
from scanning import Result
from torch import Tensor, nn

import hf_daq
from hf_daq.nn.layers import quantized_layers
from hf_daq.nn.packed import packed_layers
from hf_daq.nn.paths import bit_for_bit


class UNet(nn.Module):
    """Segmentation in two or three dimensions: convolutions down, transposed convolutions up, with what was on the way down."""

    def __init__(self, dims: int = 2, widths: tuple[int, ...] = (8, 12, 16)) -> None:
        super().__init__()
        conv, up, norm = {
            2: (nn.Conv2d, nn.ConvTranspose2d, nn.BatchNorm2d),
            3: (nn.Conv3d, nn.ConvTranspose3d, nn.BatchNorm3d),
        }[dims]

        def block(before: int, after: int) -> nn.Module:
            return nn.Sequential(conv(before, after, 3, padding=1, bias=False), norm(after), nn.ReLU())

        self.down = nn.ModuleList(block(*pair) for pair in zip((3, *widths), widths, strict=False))
        self.pool = (nn.MaxPool2d if dims == 2 else nn.MaxPool3d)(2)
        steps = list(zip(widths[:0:-1], widths[-2::-1], strict=True))
        self.up = nn.ModuleList(up(before, after, 2, stride=2) for before, after in steps)
        self.join = nn.ModuleList(block(2 * after, after) for _, after in steps)
        self.head = conv(widths[0], 4, 1)

    def forward(self, x: Tensor) -> Tensor:
        kept = []
        for index, block in enumerate(self.down):
            x = block(x if index == 0 else self.pool(x))
            kept.append(x)
        for up, join, left in zip(self.up, self.join, kept[-2::-1], strict=True):
            x = join(torch.cat([up(x), left], 1))
        return self.head(x)


class Speech(nn.Module):
    """Sound to sound: strided Conv1d, torch's own encoder, transposed Conv1d, some with weight normalization."""

    def __init__(self) -> None:
        super().__init__()
        norm = nn.utils.parametrizations.weight_norm
        second = norm(nn.Conv1d(16, 32, 4, 2, groups=2), dim=2)
        self.encoder = nn.Sequential(nn.Conv1d(1, 16, 8, 4), nn.GELU(), second, nn.GELU())
        layer = nn.TransformerEncoderLayer(32, 4, 48, 0.0, batch_first=True)
        self.mixer = nn.TransformerEncoder(layer, 2, enable_nested_tensor=False)
        self.decoder = nn.Sequential(norm(nn.ConvTranspose1d(32, 16, 4, 2)), nn.GELU(), nn.ConvTranspose1d(16, 1, 8, 4))

    def forward(self, x: Tensor) -> Tensor:
        x = self.encoder(x)
        return self.decoder(self.mixer(x.transpose(1, 2)).transpose(1, 2))


def vit_b_16() -> nn.Module:
    return tv.VisionTransformer(32, 16, num_layers=2, num_heads=12, hidden_dim=768, mlp_dim=3072, num_classes=10)


def r3d() -> nn.Module:
    resnet = tv.video.resnet
    options = {"stem": resnet.BasicStem, "num_classes": 10}
    return resnet.VideoResNet(resnet.BasicBlock, [resnet.Conv3DSimple] * 4, [1, 1, 1, 1], **options)


def translator() -> nn.Module:
    return nn.Transformer(32, 4, 2, 2, 48, 0.0, batch_first=True)


# Name: how it is built, and the shapes of what it takes.
MODELS: dict[str, tuple[Callable[[], nn.Module], tuple[tuple[int, ...], ...]]] = {
    "vit_b_16": (vit_b_16, ((4, 3, 32, 32),)),
    "swin_t": (lambda: tv.SwinTransformer([4, 4], 24, [1, 1, 2], [2, 4, 8], [4, 4], num_classes=10), ((4, 3, 64, 64),)),
    "maxvit": (lambda: tv.MaxVit((64, 64), 16, 4, [16, 32], [1, 1], 8, 0.0, num_classes=10), ((4, 3, 64, 64),)),
    "convnext": (lambda: tv.convnext_tiny(num_classes=10), ((2, 3, 64, 64),)),
    "mobilenet_v3": (lambda: tv.mobilenet_v3_small(num_classes=10), ((4, 3, 64, 64),)),
    "shufflenet": (lambda: tv.shufflenet_v2_x0_5(num_classes=10), ((4, 3, 64, 64),)),
    "googlenet": (lambda: tv.googlenet(num_classes=10, aux_logits=False, init_weights=False), ((4, 3, 64, 64),)),
    "lraspp": (
        lambda: tv.segmentation.lraspp_mobilenet_v3_large(weights=None, weights_backbone=None, num_classes=4),
        ((2, 3, 64, 64),),
    ),
    "r3d": (r3d, ((2, 3, 4, 16, 16),)),
    "unet": (UNet, ((2, 3, 32, 32),)),
    "unet_3d": (lambda: UNet(3), ((2, 3, 8, 16, 16),)),
    "speech": (Speech, ((2, 1, 164),)),
    "translator": (translator, ((2, 7, 32), (2, 5, 32))),
}


def build(name: str) -> tuple[nn.Module, tuple[Tensor, ...]]:
    """A model in evaluation mode whose batch normalizations have the statistics of its inputs, and these."""
    torch.manual_seed(0)
    make, shapes = MODELS[name]
    model, batch = make(), tuple(torch.randn(*shape) for shape in shapes)
    with torch.no_grad():
        for parameter in model.parameters():  # what starts at zero has no gradient behind it
            if not parameter.any():
                parameter.normal_(0.0, 0.1)
        norms = [module for module in model.modules() if isinstance(module, nn.modules.batchnorm._BatchNorm)]
        for module in model.modules():
            if isinstance(module, nn.Dropout) or type(module).__name__ == "StochasticDepth":
                module.p = 0.0
        for norm in norms:
            norm.momentum = 1.0
        if norms:
            model.train()(*batch)
        for norm in norms:
            norm.momentum = 0.1
    return model.eval(), batch


def outputs(model: nn.Module, batch: tuple[Tensor, ...]) -> Tensor:
    with torch.no_grad():
        return first(model.eval()(*batch))


def first(output: Any) -> Tensor:
    return next(iter(output.values())) if isinstance(output, dict) else output


def check_model(name: str, **config: Any) -> Result:
    return scanning.checked(name, lambda result: _problems(result, config or {"bits": 4}))


def _problems(result: Result, config: dict[str, Any]) -> Iterator[str]:
    model, batch = build(result.name)
    before, keys = outputs(model, batch), list(model.state_dict())
    plan = hf_daq.plan(model, **config)
    result.quantized, result.unsupported = len(plan.quantized), len(plan.unsupported)
    result.kept = dict(Counter(layer.reason.partition(" in the traced")[0] for layer in plan.kept.values()))
    unknown = {name for name, layer in plan.unsupported.items() if "reads its weight directly" not in layer.reason}
    if unknown:
        yield f"there is no quantized form of {', '.join(sorted(unknown))}"
    hf_daq.apply_daq(model, **config)
    if list(quantized_layers(model)) != list(plan.quantized):
        yield "apply_daq does not follow the plan"
    with hf_daq.calibrate(model):
        model(*batch)
    expected = outputs(model, batch)
    if torch.equal(expected, before) or not expected.isfinite().all():
        yield "quantized outputs are those of the float model, or not finite"
    yield from _files(model, batch, expected, result.name)
    with hf_daq.integer_arithmetic(model.double()):
        wide = outputs(model, tuple(x.double() for x in batch))
    simulated = outputs(model, tuple(x.double() for x in batch))
    if (wide - simulated).abs().max() > 1e-9 * simulated.abs().max():
        yield f"integers in float64 are off by {float((wide - simulated).abs().max()):.1g}"
    model.float()
    first(model.train()(*batch)).square().mean().backward()
    yield from _still(model)
    hf_daq.remove_daq(model)
    if list(model.state_dict()) != keys:
        yield "remove_daq leaves other keys than those of the float model"


def _files(model: nn.Module, batch: tuple[Tensor, ...], expected: Tensor, name: str) -> Iterator[str]:
    with tempfile.TemporaryDirectory() as folder:
        for packed in (False, True):
            hf_daq.save_pretrained(model, folder, packed=packed)
            opened = hf_daq.from_pretrained(folder, model=MODELS[name][0]())
            with bit_for_bit():
                if not torch.equal(outputs(opened, batch), expected):
                    yield f"the reloaded model gives other outputs ({packed=})"
    if list(packed_layers(opened)) != list(quantized_layers(model)):
        yield "not every quantized layer is packed"
    yield from different_outputs(opened, lambda: outputs(opened, batch))


def _still(model: nn.Module) -> Iterator[str]:
    """What does not learn. A bias may have no gradient: normalization takes it away."""
    for name, parameter in model.named_parameters():
        gradient = parameter.grad
        matters = parameter.ndim > 1 or name.endswith(("_quant.upper", "_quant.scale"))
        if parameter.requires_grad and matters and (gradient is None or not gradient.any() or gradient.isnan().any()):
            yield f"{name} has no gradient, zeros, or NaN"


def check_one(name: str, arguments: Any) -> Result:
    config = scanning.options(arguments, list(MODELS).index(name))
    if arguments.activation_scale is None:  # most have convolutions, which have no tokens
        config["activation_scale"] = "static"
    return check_model(name, **{"weight_bits": 4, "activation_bits": 4} | config)


def main() -> int:
    parser = scanning.parser("Take plain modules through apply, train, save and reload.", MODELS)
    torch.set_num_threads(1)
    arguments = parser.parse_args()
    return scanning.report(arguments, lambda name: check_one(name, arguments))


if __name__ == "__main__":
    sys.exit(main())
