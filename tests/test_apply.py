"""Patching: what changes, what stays the same object, and what is refused before anything changes."""

import copy
import signal
import sys

import pytest
import torch
import torch.nn.functional as F
from models import images, small_net, small_timm
from torch import nn
from torch.nn.utils import prune
from torch.nn.utils.parametrizations import weight_norm
from torch.nn.utils.parametrize import remove_parametrizations
from torch.optim.swa_utils import AveragedModel

import hf_daq
from hf_daq import DaqConfig
from hf_daq.errors import CalibrationError, ConfigError, ModelError
from hf_daq.model.roles import computed_weights
from hf_daq.nn.layers import DaqConv2d, DaqLinear, quantized_layers


def calibrated(model, *args, **kwargs):
    hf_daq.apply_daq(model, *args, **kwargs)
    with hf_daq.calibrate(model):
        model(images())
    return model


def test_float_parameters_keep_their_objects_and_names_and_quantizers_are_children():
    model = small_net()
    before = dict(model.named_parameters())
    hf_daq.apply_daq(model, bits=3)
    after = dict(model.named_parameters())
    assert all(after[name] is parameter for name, parameter in before.items())
    added = {name for name in after if name not in before}
    assert added == {
        f"{layer}.{side}"
        for layer in ("conv", "depthwise", "grouped", "hidden")
        for side in (
            "w_quant.lower",
            "w_quant.upper",
            "w_quant.scale",
            "w_quant.shift",
            "a_quant.lower",
            "a_quant.upper",
        )
    }
    assert all(after[name].ndim == 1 and after[name].dtype == torch.float32 for name in added)
    assert {tuple(after[name].shape) for name in added if not name.endswith("shift")} == {(1,)}
    assert after["grouped.w_quant.shift"].shape == (16,)
    assert isinstance(model.conv, nn.Conv2d)
    assert isinstance(model.hidden, nn.Linear)


def test_the_first_matching_rule_decides_and_is_stronger_than_the_default():
    rules = [
        {"pattern": "conv", "weight_bits": 2, "activation_bits": None},
        {"pattern": "re:conv|hidden", "bits": 8},
        {"pattern": "depthwise", "skip": True},
        {"pattern": "head", "weight_bits": 5},
    ]
    plan = hf_daq.plan(small_net(), DaqConfig(bits=3, rules=rules, modules_to_not_convert=["grouped"]))
    bits = {name: (row.weight_bits, row.activation_bits) for name, row in plan.quantized.items()}
    assert bits == {"conv": (2, None), "hidden": (8, 8), "head": (5, 3)}
    assert plan.kept["grouped"].reason == "modules_to_not_convert: grouped"
    model = hf_daq.apply_daq(small_net(), DaqConfig(bits=3, rules=rules, modules_to_not_convert=["grouped"]))
    assert model.conv.a_quant is None
    assert model.daq_config.layers["head"] == {"weight_bits": 5, "activation_bits": 3}


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        (
            {"bits": 3, "rules": [{"pattern": "convv", "skip": True}]},
            ConfigError,
            "'convv' matches no layer.*did you mean 'conv'",
        ),
        ({"bits": 3, "modules_to_not_convert": ["zzz"]}, ConfigError, "'zzz' matches no layer.*named like 'stem'"),
        ({"bits": 3, "modules_to_not_convert": ["*"]}, ModelError, "nothing to quantize in SmallNet"),
        ({"bits": 3, "layers": {"nope": {"weight_bits": 2, "activation_bits": 2}}}, ConfigError, "layer 'nope'"),
        ({"config": "3 bits"}, ConfigError, r"apply_daq\(model, DaqConfig\(bits=3\)\)"),
        ({"config": DaqConfig(bits=2), "weight_bits": 3}, ConfigError, "not both"),
    ],
)
def test_what_does_not_fit_is_refused_and_the_model_stays_as_it_was(arguments, error, message):
    model = small_net()
    before = str(model), list(model.state_dict())
    with pytest.raises(error, match=message):
        hf_daq.apply_daq(model, **arguments)
    assert (str(model), list(model.state_dict())) == before


def spectral(layer):
    return nn.utils.parametrizations.spectral_norm(layer)


def parametrized(layer):
    class Symmetric(nn.Module):
        def forward(self, weight):
            return weight.flip(0) + weight

    nn.utils.parametrize.register_parametrization(layer, "weight", Symmetric())


@pytest.mark.parametrize(
    ("change", "call"),
    [
        (lambda layer: prune.l1_unstructured(layer, "weight", 0.5), r"utils.prune.remove\(layer, 'weight'\)"),
        (lambda layer: prune.random_unstructured(layer, "bias", 2), r"utils.prune.remove\(layer, 'bias'\)"),
        (nn.utils.spectral_norm, r"utils.remove_spectral_norm\(layer, 'weight'\)"),
        (spectral, "remove_parametrizations"),
        (nn.utils.parametrizations.orthogonal, "remove_parametrizations"),
        (parametrized, "remove_parametrizations"),
    ],
)
def test_a_weight_that_is_computed_from_others_is_refused_with_the_call_that_ends_it(change, call):
    model = small_net()
    change(model.hidden)
    with pytest.raises(ModelError, match=f"layer 'hidden' computes its weight or bias.*{call}"):
        hf_daq.apply_daq(model, bits=4)
    assert not quantized_layers(model)
    hf_daq.apply_daq(model, bits=4, modules_to_not_convert=["hidden"])
    assert "hidden" not in model.daq_config.layers
    exec(f"import torch; {computed_weights(model)['hidden']}", {"layer": model.hidden})
    hf_daq.apply_daq(hf_daq.remove_daq(model), bits=4)
    assert type(model.hidden) is DaqLinear


def test_a_model_without_shapes_is_refused():
    with pytest.raises(ModelError, match=r"'0.weight' has no shape yet; run one forward first"):
        hf_daq.apply_daq(nn.Sequential(nn.LazyLinear(4), nn.Linear(4, 4)), bits=4)


def test_what_was_frozen_before_stays_frozen():
    model = small_net()
    model.conv.requires_grad_(False)
    model.hidden.bias.requires_grad_(False)
    calibrated(model, bits=4)
    assert not any(parameter.requires_grad for parameter in model.conv.parameters())
    assert all(parameter.requires_grad for parameter in model.hidden.w_quant.parameters())


@pytest.mark.parametrize("again", [lambda m: m.load_state_dict(m.state_dict()), copy.deepcopy], ids=["load", "copy"])
@pytest.mark.parametrize("frozen", ["", "lower", "a_quant", "conv"])
def test_what_the_user_froze_stays_frozen(again, frozen):
    model = calibrated(small_net(), bits=4)
    names = [name for name, _ in model.named_parameters() if frozen in name]
    for name in names:
        model.get_parameter(name).requires_grad_(False)
    want = {name: parameter.requires_grad for name, parameter in model.named_parameters()}
    found = again(model)
    found = found if isinstance(found, nn.Module) else model
    assert {name: parameter.requires_grad for name, parameter in found.named_parameters()} == want


def test_a_bound_that_was_fixed_at_zero_learns_once_it_is_not():
    model = calibrated(small_net(), bits=4)
    assert not model.conv.a_quant.lower.requires_grad
    model.load_state_dict(model.state_dict() | {"conv.a_quant.lower": torch.tensor([-1.0])})
    assert model.conv.a_quant.lower.requires_grad
    model.load_state_dict(model.state_dict() | {"conv.a_quant.lower": torch.tensor([0.0])})
    model.requires_grad_(False).load_state_dict(model.state_dict() | {"conv.a_quant.lower": torch.tensor([-1.0])})
    assert not model.conv.a_quant.lower.requires_grad


def test_tied_weights_stay_in_full_precision():
    tied = small_net()
    tied.other = nn.Conv2d(8, 8, 3, padding=1, bias=False)
    tied.other.weight = tied.conv.weight
    kept = hf_daq.plan(tied, bits=2).kept
    assert kept["conv"].reason == "shares its weight with other"
    assert kept["other"].reason == "shares its weight with conv"
    hf_daq.apply_daq(tied, bits=2)
    assert tied.other.weight is tied.conv.weight
    assert set(tied.daq_config.layers) == {"depthwise", "grouped", "hidden"}
    config = DaqConfig(bits=2, layers={"conv": {"weight_bits": 2, "activation_bits": 2}})
    with pytest.raises(ConfigError, match="layer 'conv', but in this model it shares its weight with other"):
        hf_daq.apply_daq(hf_daq.remove_daq(tied), config)


def test_a_weight_that_is_read_without_calling_its_layer_stays_in_full_precision(caplog):
    class Reader(nn.Module):
        def __init__(self):
            super().__init__()
            self.called, self.read = nn.Linear(4, 4), nn.Linear(4, 4)

        def forward(self, x):
            return self.called(x).to(self.called.weight.dtype) @ self.read.weight.t()

    model = nn.Sequential(nn.Linear(4, 4), Reader(), nn.Linear(4, 2))
    planned = hf_daq.plan(model, bits=2)
    assert list(planned.quantized) == ["1.called"]
    assert planned.unsupported["1.read"].reason == "Reader reads its weight directly"
    hf_daq.apply_daq(model, bits=2)
    assert "1 modules with weights stay in full precision" in caplog.text


class ReadThroughNames(nn.Module):
    def __init__(self):
        super().__init__()
        self.a, self.b, self.e = nn.Linear(4, 4), nn.Linear(4, 4), nn.Linear(4, 4)
        self.c = nn.ModuleList(nn.Linear(4, 4) for _ in range(4))
        self.d = nn.Sequential(nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 4))
        self.attention = nn.MultiheadAttention(4, 2)
        self.f = nn.Linear(4, 4)

    def _through(self, layer, x):
        return F.linear(x, layer.weight)

    def _with_another_first_name(module, x):  # noqa: N805
        return F.linear(x, module.f.weight)

    def forward(self, x):
        alias = self.b
        x = self.e(F.linear(self.d(x), alias.weight)).to(self.e.weight.dtype)
        for number, layer in enumerate(self.c[2:]):
            x = F.linear(x, layer.weight) + number
        x = F.linear(x, self.d[0].weight) + self._through(self.a, x)
        return F.linear(self._with_another_first_name(x), self.attention.in_proj_weight)


def test_weights_that_are_read_through_other_names_stay_in_full_precision():
    model = nn.Sequential(nn.Linear(4, 4), ReadThroughNames(), nn.Linear(12, 2))
    planned = hf_daq.plan(model, weight_bits=2)
    read = ["a", "b", "f", "d.0", *(f"c.{number}" for number in range(4))]
    read += [f"attention.{name}_proj" for name in "qkv"]
    assert set(planned.unsupported) == {f"1.{name}" for name in read}
    assert {"1.e", "1.d.2"} <= planned.quantized.keys()


def test_encoders_of_torch_read_weights_on_a_path_that_is_switched_off():
    encoder = nn.TransformerEncoder(nn.TransformerEncoderLayer(8, 2, 16, batch_first=True), 2)
    assert not hf_daq.plan(encoder, bits=4).unsupported


class Remembering(nn.Module):
    """Counts its forwards, keeps what it sees, and draws random numbers."""

    def __init__(self):
        super().__init__()
        self.first, self.middle, self.last = nn.Linear(4, 4), nn.Linear(4, 4), nn.Linear(4, 4)
        self.calls, self.seen = 0, []
        self.register_buffer("total", torch.zeros(()))
        self.middle.register_forward_hook(lambda module, args, output: self.seen.append(output))

    def forward(self, x):
        self.calls += 1
        self.total += 1
        self.kept = self.first(x) + torch.randn(4)
        self.seen.append(self.kept)
        return self.last(self.middle(self.kept))


@pytest.mark.parametrize("call", [hf_daq.plan, hf_daq.apply_daq])
def test_the_forward_that_finds_the_ends_leaves_nothing(call):
    model, random = Remembering(), torch.get_rng_state()
    seen = model.seen
    call(model, bits=4)
    assert (model.calls, model.total.item(), hasattr(model, "kept")) == (0, 0, False)
    assert model.seen is seen
    assert seen == []
    assert torch.equal(torch.get_rng_state(), random)
    assert all(module.training for module in model.modules())


@pytest.mark.filterwarnings("ignore:`torch.jit:FutureWarning", "ignore:`torch.jit:DeprecationWarning")
@pytest.mark.parametrize("call", [hf_daq.plan, hf_daq.apply_daq])
def test_parts_in_torchscript_are_refused(call):
    traced = torch.jit.trace(nn.Linear(4, 4), torch.ones(1, 4))
    for model, what in ((nn.Sequential(nn.Linear(4, 4), traced), "part '1' of the model"), (traced, "the model")):
        with pytest.raises(ModelError, match=f"{what} is TorchScript, which cannot be changed"):
            call(model, bits=2)


def test_applying_twice_and_wrapped_models_are_refused():
    with pytest.raises(ModelError, match="already quantized.*remove_daq"):
        hf_daq.apply_daq(calibrated(small_net(), bits=3), bits=2)
    with pytest.raises(ModelError, match="wrapped in DataParallel; the order is"):
        hf_daq.apply_daq(nn.DataParallel(small_net()), bits=2)
    with pytest.raises(ModelError, match="wrapped in OptimizedModule"):
        hf_daq.apply_daq(torch.compile(small_net()), bits=2)
    with pytest.raises(ModelError, match="nothing to remove"):
        hf_daq.remove_daq(small_net())


def one_step(model, *optimizers):
    model(images()).sum().backward()
    for optimizer in optimizers:
        optimizer.step()


def test_an_optimizer_built_before_apply_daq_is_an_error_at_its_first_step():
    model = small_net()
    early = torch.optim.SGD(model.parameters(), lr=0.1)
    calibrated(model, bits=3)
    with pytest.raises(ModelError, match=r"no optimizer has 'conv.w_quant'.*The order is: .*apply_daq, calibrate, opt"):
        one_step(model, early)


def test_optimizers_that_know_the_quantizers_or_need_not_are_no_error():
    model = calibrated(small_net(), bits=3)
    one_step(model, torch.optim.SGD(model.parameters(), lr=0.1))
    *weights, quantizers = hf_daq.param_groups(model, lr=0.1)
    one_step(model, torch.optim.SGD(weights, lr=0.1), torch.optim.Adam([quantizers]))
    for layer in quantized_layers(model).values():
        for quantizer in layer.quantizers.values():
            quantizer.requires_grad_(False)
    one_step(model, torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1))
    other = small_net()
    one_step(other, torch.optim.SGD(other.parameters(), lr=0.1))


def test_forward_before_calibration_names_the_layer_and_the_call():
    model = hf_daq.apply_daq(small_net(), bits=3)
    with pytest.raises(CalibrationError, match=r"layer 'conv' is not calibrated(.|\n)*hf_daq.calibrate\(model\)"):
        model(images())


def test_remove_gives_back_the_float_model_bit_for_bit():
    model = small_net()
    want, text = model(images()), str(model)
    hf_daq.remove_daq(calibrated(model, bits=2))
    assert torch.equal(model(images()), want)
    assert str(model) == text
    assert not quantized_layers(model)
    calibrated(model, bits=4)


@pytest.mark.parametrize("bias_correction", [True, False])
def test_remove_with_quantized_weights_keeps_the_outputs_of_a_weight_only_model(bias_correction):
    model = calibrated(small_net(), weight_bits=3, bias_correction=bias_correction)
    want = model(images())
    hf_daq.remove_daq(model, weights="quantized")
    torch.testing.assert_close(model(images()), want)
    assert model.conv.weight.unique().numel() <= 8
    assert (model.conv.bias is not None) is bias_correction


def test_remove_with_quantized_weights_is_in_the_units_of_the_float_layer():
    model = calibrated(small_net(), weight_bits=8, activation_bits=8, smooth=False)
    original = small_net()
    hf_daq.remove_daq(model, weights="quantized")
    for name in ("conv", "depthwise", "grouped", "hidden"):
        difference = (model.get_submodule(name).weight - original.get_submodule(name).weight).abs().max()
        assert difference < 0.02 * original.get_submodule(name).weight.abs().max()


def test_remove_refuses_what_it_cannot_store():
    model = hf_daq.apply_daq(small_timm("test_nfnet"), bits=4)
    with pytest.raises(ModelError, match="standardizes its weight"):
        hf_daq.remove_daq(model, weights="quantized")
    with pytest.raises(ModelError, match="must be 'float' or 'quantized'"):
        hf_daq.remove_daq(model, weights="codes")
    with pytest.raises(CalibrationError, match="not calibrated"):
        hf_daq.remove_daq(hf_daq.apply_daq(small_net(), bits=4), weights="quantized")


@pytest.mark.parametrize("change", [hf_daq.remove_daq, hf_daq.restart])
def test_of_a_wrapped_model_the_part_is_named(change):
    model = hf_daq.apply_daq(small_net(), weight_bits=4)
    for wrapped in (nn.DataParallel(model), AveragedModel(model)):
        with pytest.raises(ModelError, match=rf"{change.__name__}\(model.get_submodule\('module'\)\)"):
            change(wrapped)
    change(model)


@pytest.mark.parametrize("change", [hf_daq.pack, lambda model: hf_daq.save_pretrained(model, "nowhere")])
def test_of_a_compiled_model_the_original_is_named(change):
    compiled = torch.compile(hf_daq.apply_daq(small_net(), weight_bits=4), backend="eager")
    with pytest.raises(ModelError, match="write model._orig_mod in its place"):
        change(compiled)


@pytest.mark.parametrize("change", [hf_daq.remove_daq, lambda model: hf_daq.calibrate(model).__enter__()])
def test_what_was_parametrized_since_is_refused(change):
    model = hf_daq.apply_daq(small_net(), weight_bits=4)
    name, layer = next(iter(quantized_layers(model).items()))
    weight_norm(layer)
    outputs = model(images())
    with pytest.raises(
        ModelError, match=rf"layer {name!r} computes its weight.*remove_parametrizations\(layer, 'weight'\)"
    ):
        change(model)
    assert torch.equal(model(images()), outputs)
    remove_parametrizations(layer, "weight")
    change(model)


def test_on_the_meta_device_and_back():
    want = calibrated(small_net(), bits=3)
    with torch.device("meta"):
        model = small_net()
        hf_daq.apply_daq(model, bits=3)
    assert all(parameter.is_meta for parameter in model.parameters())
    model.load_state_dict(want.state_dict(), assign=True)
    assert torch.equal(model.eval()(images()), want.eval()(images()))
    assert model.conv.a_quant.signed is want.conv.a_quant.signed is False
    assert model.grouped.a_quant.signed is True


def test_a_float_state_dict_still_loads():
    model = calibrated(small_net(), bits=3)
    result = model.load_state_dict(small_net(5).state_dict(), strict=False)
    assert not result.unexpected_keys
    assert all("_quant." in key for key in result.missing_keys)


@pytest.mark.parametrize(
    ("other", "problem"),
    [
        ({"bits": 2}, "conv.w_quant is of a model with {'bits': 3.*here it has {'bits': 2"),
        ({"bits": 3, "weight_grid": "odd"}, "'grid': 'integer'.*'grid': 'odd'"),
        ({"weight_bits": 3}, "Unexpected key.*conv.a_quant.lower"),
    ],
)
def test_a_state_dict_of_another_quantization_is_refused(other, problem, tmp_path):
    torch.save(calibrated(small_net(), bits=3).state_dict(), tmp_path / "model.pt")
    state = torch.load(tmp_path / "model.pt", weights_only=True)
    with pytest.raises(RuntimeError, match=problem):
        hf_daq.apply_daq(small_net(), **other).load_state_dict(state)
    hf_daq.apply_daq(small_net(), bits=3).load_state_dict(state)


def test_deepcopy_and_types():
    model = calibrated(small_net(), bits=3)
    twin = copy.deepcopy(model)
    assert torch.equal(twin(images()), model(images()))
    assert type(model.conv) is DaqConv2d
    assert type(model.hidden) is DaqLinear
    assert "bits=3, rounding='daq'" in repr(model.conv)


def test_param_groups():
    with pytest.raises(ModelError, match="apply_daq, calibrate, param_groups"):
        hf_daq.param_groups(small_net(), lr=0.1)
    with pytest.raises(CalibrationError, match="calibrate or load, then param_groups"):
        hf_daq.param_groups(hf_daq.apply_daq(small_net(), bits=3), lr=0.1)
    model = calibrated(small_net(), bits=3)
    groups = {
        group["name"]: group for group in hf_daq.param_groups(model, lr=0.1, quantizer_lr=1e-3, weight_decay=0.01)
    }
    assert {name: (group["lr"], group["weight_decay"]) for name, group in groups.items()} == {
        "decay": (0.1, 0.01),
        "no_decay": (0.1, 0.0),
        "quantizer": (1e-3, 0.0),
    }
    listed = [id(parameter) for group in groups.values() for parameter in group["params"]]
    trainable = [id(parameter) for parameter in model.parameters() if parameter.requires_grad]
    assert sorted(listed) == sorted(trainable)
    assert id(model.conv.a_quant.lower) not in listed  # unsigned: 0 stays 0
    assert id(model.grouped.a_quant.lower) in listed
    torch.optim.SGD(hf_daq.param_groups(model, lr=0.1), momentum=0.9)


@pytest.mark.parametrize(
    ("where", "ready", "change"),
    [
        ("hf_daq.model.patch.start_from_weight", lambda: small_net(), lambda model: hf_daq.apply_daq(model, bits=4)),
        ("hf_daq.model.patch.quantize_layer", lambda: small_net(), lambda model: hf_daq.apply_daq(model, bits=4)),
        ("hf_daq.nn.packed.encode", lambda: quantized(), hf_daq.pack),
        ("hf_daq.nn.packed._on_codes", lambda: hf_daq.pack(quantized()), hf_daq.unpack),
        ("hf_daq.model.patch.restore_layer", lambda: quantized(), hf_daq.remove_daq),
        ("hf_daq.calibration._share", lambda: quantized(), lambda model: calibrated_again(model)),
    ],
)
def test_ctrl_c_leaves_no_model_between_two_kinds(where, ready, change, ctrl_c, monkeypatch):
    module, _, name = where.rpartition(".")
    original = getattr(sys.modules[module], name)

    def pressed(*args, **kwargs):
        signal.raise_signal(signal.SIGINT)
        return original(*args, **kwargs)

    model, done = ready(), change(ready())
    before = model(images()), sorted(model.state_dict())
    monkeypatch.setattr(where, pressed)
    with pytest.raises(KeyboardInterrupt):
        change(model)
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
    monkeypatch.undo()
    if sorted(model.state_dict()) == before[1]:
        torch.testing.assert_close(model(images()), before[0])
        change(model)
    else:
        assert sorted(model.state_dict()) == sorted(done.state_dict())
    assert {type(layer) for layer in model.modules()} == {type(layer) for layer in done.modules()}


def quantized():
    return calibrated_again(hf_daq.apply_daq(small_net(), bits=4))


def calibrated_again(model):
    with hf_daq.calibrate(model, check=False):
        model(images())
    return model
