"""Take timm models of every family through the whole way: apply, calibrate, train, save, pack, reload, remove.

    python tests/programs/scan_timm.py [--names test_vit test_resnet] [--output scan.json]

Weights are random. The exit code is 1 if a model fails.
"""

from __future__ import annotations

import sys
import tempfile
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1] / "support"))
import scanning
import timm
import torch
from packed_paths import different_outputs
from scanning import Result
from torch import Tensor, nn

import hf_daq
from hf_daq.model.roles import outer_layers
from hf_daq.nn.layers import QuantizedLayer, StandardizedConv, quantized_layers
from hf_daq.nn.packed import packed_layers
from hf_daq.nn.paths import bit_for_bit

# Architecture: input size, and arguments that make it smaller.
ARCHITECTURES: dict[str, tuple[int, dict[str, Any]]] = {
    "test_resnet": (64, {}),
    "test_vit": (64, {"img_size": 64}),
    "test_vit2": (64, {"img_size": 64}),
    "test_vit_relpos": (64, {"img_size": 64}),
    "test_convnext": (64, {}),
    "test_convnext3": (64, {}),
    "test_efficientnet": (64, {}),
    "test_efficientnet_evos": (64, {}),
    "test_byobnet": (64, {}),
    "test_mambaout": (64, {}),
    "test_nfnet": (64, {}),
    "test_coatnet": (64, {"img_size": 64}),
    "test_maxvit": (64, {"img_size": 64}),
    "tf_efficientnet_b0": (64, {}),
    "tf_efficientnet_cc_b0_4e": (64, {}),
    "tf_mobilenetv3_small_minimal_100": (64, {}),
    "mobilenetv2_050": (64, {}),
    "mobilenetv4_conv_small_050": (64, {}),
    "mnasnet_small": (64, {}),
    "fbnetc_100": (64, {}),
    "hardcorenas_a": (64, {}),
    "lcnet_050": (64, {}),
    "tinynet_e": (64, {}),
    "ghostnet_050": (64, {}),
    "dm_nfnet_f0": (64, {}),
    "nf_resnet26": (64, {}),
    "resnetv2_50x1_bit": (64, {}),
    "resnet18d": (64, {}),
    "seresnext26t_32x4d": (64, {}),
    "ecaresnet26t": (64, {}),
    "lambda_resnet26t": (64, {}),
    "botnet26t_256": (64, {"img_size": 64}),
    "skresnet18": (64, {}),
    "resnest14d": (64, {}),
    "res2net50_26w_4s": (64, {}),
    "regnetx_002": (64, {}),
    "regnety_002": (64, {}),
    "densenet121": (64, {}),
    "vgg11": (64, {"mlp_ratio": 0.03125}),
    "inception_v3": (160, {}),
    "inception_next_atto": (64, {}),
    "xception41": (64, {}),
    "dla34": (64, {}),
    "dpn48b": (64, {}),
    "hrnet_w18_small": (64, {}),
    "cspresnet50": (64, {}),
    "selecsls42": (64, {}),
    "ese_vovnet19b_slim": (64, {}),
    "rdnet_tiny": (64, {}),
    "rexnet_100": (64, {}),
    "repvgg_a0": (64, {}),
    "repghostnet_050": (64, {}),
    "mobileone_s0": (64, {}),
    "repvit_m0_9": (64, {}),
    "starnet_s1": (64, {}),
    "fasternet_t0": (64, {}),
    "fastvit_t8": (64, {}),
    "convmixer_768_32": (56, {}),
    "convnextv2_atto": (64, {}),
    "edgenext_xx_small": (64, {}),
    "efficientformer_l1": (224, {}),
    "efficientformerv2_s0": (224, {}),
    "caformer_s18": (64, {}),
    "efficientvit_b0": (64, {}),
    "efficientvit_m0": (224, {}),
    "mobilevit_xxs": (64, {}),
    "mobilevitv2_050": (64, {}),
    "levit_128s": (224, {}),
    "pit_ti_224": (224, {}),
    "poolformer_s12": (64, {}),
    "pvt_v2_b0": (64, {}),
    "nextvit_small": (64, {}),
    "shvit_s1": (64, {}),
    "mixer_s32_224": (64, {"img_size": 64}),
    "gmixer_12_224": (64, {"img_size": 64}),
    "resmlp_12_224": (64, {"img_size": 64}),
    "sequencer2d_s": (64, {"img_size": 64}),
    "deit_tiny_distilled_patch16_224": (64, {"img_size": 64, "depth": 4}),
    "vit_tiny_r_s16_p8_224": (64, {"img_size": 64, "depth": 4}),
    "vit_small_resnet26d_224": (64, {"img_size": 64, "depth": 4}),
    "beit_base_patch16_224": (64, {"img_size": 64, "depth": 2}),
    "eva02_tiny_patch14_224": (56, {"img_size": 56, "depth": 4}),
    "vit_medium_patch16_rope_reg1_gap_256": (64, {"img_size": 64, "depth": 2}),
    "naflexvit_base_patch16_gap": (64, {"depth": 2}),
    "vit_base_patch16_siglip_gap_224": (64, {"img_size": 64, "depth": 2}),
    "samvit_base_patch16_224": (64, {"img_size": 64, "depth": 3}),
    "flexivit_small": (64, {"img_size": 64, "depth": 2}),
    "cait_xxs24_224": (64, {"img_size": 64, "depth": 4}),
    "crossvit_tiny_240": (240, {}),
    "convit_tiny": (64, {"img_size": 64, "depth": 12}),
    "coat_tiny": (64, {"img_size": 64}),
    "tnt_s_legacy_patch16_224": (64, {"img_size": 64, "depth": 2}),
    "visformer_tiny": (64, {"img_size": 64}),
    "volo_d1_224": (64, {"img_size": 64}),
    "xcit_nano_12_p16_224": (64, {"depth": 4}),
    "swin_tiny_patch4_window7_224": (64, {"img_size": 64, "window_size": 4, "depths": (1, 1, 2, 1)}),
    "swinv2_cr_tiny_ns_224": (64, {"img_size": 64, "depths": (1, 1, 2, 1)}),
    "swinv2_tiny_window8_256": (64, {"img_size": 64, "window_size": 4, "depths": (1, 1, 2, 1)}),
    "nest_tiny": (64, {"img_size": 64, "drop_path_rate": 0.0}),
    "twins_svt_small": (64, {"img_size": 64, "depths": (1, 1, 2, 1)}),
    "twins_pcpvt_small": (64, {"img_size": 64, "depths": (1, 1, 2, 1)}),
    "davit_tiny": (64, {}),
    "focalnet_tiny_srf": (64, {}),
    "gcvit_xxtiny": (128, {"img_size": 128}),
    "hiera_tiny_224": (64, {"img_size": 64}),
    "mvitv2_tiny": (64, {"img_size": 64}),
    "tiny_vit_5m_224": (64, {}),
}


def build(name: str) -> tuple[nn.Module, Tensor]:
    """A model as if it had been trained, with random weights and ten classes, and four images.

    What starts at zero is moved: biases a little, and branches (LayerScale, the last normalization of a block) are
    opened, since no gradient goes through a closed one. Running statistics are those of the images: calibration is in
    evaluation mode, and initial statistics have nothing to do with what training sees.
    """
    size, arguments = ARCHITECTURES[name]
    torch.manual_seed(0)
    model = timm.create_model(name, num_classes=10, **arguments)
    images = torch.randn(4, 3, size, size)
    with torch.no_grad():
        for parameter_name, parameter in model.named_parameters():
            if not parameter.any():
                parameter.normal_(0.0 if parameter_name.endswith("bias") else 1.0, 0.1)
        norms = {m: m.momentum for m in model.modules() if isinstance(m, nn.modules.batchnorm._BatchNorm)}
        for norm in norms:
            norm.momentum = 1.0
        if norms:
            model.train()(images)
        for norm, momentum in norms.items():
            norm.momentum = momentum
    return model, images


def check_architecture(name: str, **config: Any) -> Result:
    return scanning.checked(name, lambda result: _problems(result, config or {"bits": 4}))


def _problems(result: Result, config: dict[str, Any]) -> Iterator[str]:
    model, images = build(result.name)
    float_logits = _evaluate(model, images)
    float_keys = list(model.state_dict())

    plan = hf_daq.plan(model, **config)
    result.quantized, result.unsupported = len(plan.quantized), len(plan.unsupported)
    result.kept = dict(Counter(layer.reason for layer in plan.kept.values()))
    planned = {layer.name for layer in plan.layers}
    for name, module in model.named_modules():
        if isinstance(module, (nn.Conv2d, nn.Linear)) and name not in planned:
            yield f"{name} is not in the plan"
    roles = outer_layers(model)
    for role in ("first layer", "classifier"):
        if not any(roles[name] == role for name in roles if name in plan.kept):
            yield f"nothing is kept as {role}"

    hf_daq.apply_daq(model, **config)
    if list(quantized_layers(model)) != list(plan.quantized):
        yield "apply_daq does not follow the plan"
    with hf_daq.calibrate(model):
        for batch in images.split(2):
            model(batch)
    logits = _evaluate(model, images)
    if torch.equal(logits, float_logits) or not logits.isfinite().all():
        yield "quantized logits are those of the float model, or not finite"

    with tempfile.TemporaryDirectory() as directory:
        hf_daq.save_pretrained(model, directory)
        reloaded = timm.create_model(f"local-dir:{directory}", pretrained=True)
        yield from _packed_problems(model, images, logits, directory)
    if not torch.equal(_evaluate(reloaded, images), logits):
        yield "the reloaded model gives other logits"
    hf_daq.remove_daq(reloaded)
    returned = _evaluate(reloaded, images)
    # Files hold weights a little off the thresholds between codes.
    if (returned - float_logits).norm() > 1e-3 * float_logits.norm():
        yield "remove_daq does not give back the float model"
    if list(reloaded.state_dict()) != float_keys:
        yield "remove_daq leaves other keys than those of the float model"

    yield from _gradient_problems(model, images)


def _packed_problems(model: nn.Module, images: Tensor, logits: Tensor, directory: str) -> Iterator[str]:
    hf_daq.save_pretrained(model, directory, packed=True)
    packed = timm.create_model(f"local-dir:{directory}", pretrained=True)
    if list(packed_layers(packed)) != list(quantized_layers(model)):
        yield "not every quantized layer is packed"
    with bit_for_bit():
        if not torch.equal(_evaluate(packed, images), logits):
            yield "the packed model gives other logits"
    yield from different_outputs(packed, lambda: _evaluate(packed, images))
    if any(isinstance(layer, StandardizedConv) for layer in quantized_layers(model).values()):
        return  # has no float weights to go back to
    hf_daq.unpack(packed)
    if not torch.equal(_evaluate(packed, images), logits):
        yield "the unpacked model gives other logits"
    if list(packed.state_dict()) != list(model.state_dict()):
        yield "unpack leaves other keys than those of the model"


def _evaluate(model: nn.Module, batch: Tensor) -> Tensor:
    with torch.no_grad():
        return model.eval()(batch)


def _gradient_problems(model: nn.Module, batch: Tensor) -> Iterator[str]:
    logits = model.train()(batch)
    if not isinstance(logits, Tensor):
        logits = sum(logits)
    nn.functional.cross_entropy(logits, torch.arange(len(batch))).backward()
    zero = []
    for name, layer in quantized_layers(model).items():
        for kind, parameter in _learnables(layer):
            if parameter.grad is None:
                yield f"{name}: {kind} has no gradient"
            elif not parameter.grad.isfinite().all():
                yield f"{name}: the gradient of {kind} is not finite"
            # Batch normalization undoes scale and shift of what it reads: their gradients are rounding noise.
            elif not parameter.grad.any() and kind not in ("w_quant.scale", "w_quant.shift"):
                zero.append(f"{name}: {kind}")
    if zero:
        yield f"{len(zero)} zero gradients: {', '.join(zero[:12])}"


def _learnables(layer: QuantizedLayer) -> Iterator[tuple[str, nn.Parameter]]:
    yield "weight", layer.weight
    for name, parameter in layer.w_quant.named_parameters():
        yield f"w_quant.{name}", parameter
    if layer.a_quant is not None:
        yield "a_quant.upper", layer.a_quant.upper
        if layer.a_quant.signed:
            yield "a_quant.lower", layer.a_quant.lower


def main() -> int:
    parser = scanning.parser("Take timm models of every family through apply, train, save and reload.", ARCHITECTURES)
    torch.set_num_threads(1)
    arguments = parser.parse_args()
    return scanning.report(arguments, lambda name: check_one(name, arguments))


def check_one(name: str, arguments: Any) -> Result:
    config = scanning.options(arguments, list(ARCHITECTURES).index(name))
    config = {"weight_bits": 4, "activation_bits": 4} | config
    if arguments.activation_scale is None:  # most have convolutions, which have no tokens
        config["activation_scale"] = "static"
    return check_architecture(name, **config)


if __name__ == "__main__":
    sys.exit(main())
