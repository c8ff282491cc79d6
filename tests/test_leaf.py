"""Other tools see a quantized or packed layer as one leaf."""

import copy

import accelerate
import pytest
import torch
from models import images, quantized_timm
from timm.models import get_notrace_modules
from torch import nn
from torch.distributed.checkpoint.state_dict import get_model_state_dict, set_model_state_dict
from torchvision.models.feature_extraction import create_feature_extractor

import hf_daq
from hf_daq.errors import CheckpointError, ModelError
from hf_daq.nn.layers import LAYER_TYPES
from hf_daq.nn.packed import PACKED_TYPES

KINDS = {"quantized": lambda: quantized_timm(bits=8), "packed": lambda: hf_daq.pack(quantized_timm(bits=8))}


def test_timm_does_not_trace_into_any_of_them():
    assert {*LAYER_TYPES.values(), *PACKED_TYPES.values()} <= set(get_notrace_modules())


@pytest.mark.parametrize("options", [{}, {"tracer_kwargs": {"leaf_modules": get_notrace_modules()}}])
@pytest.mark.parametrize("kind", KINDS)
def test_a_feature_extractor_gives_what_the_model_computes(kind, options):
    model, seen = KINDS[kind](), []
    model.layer2.register_forward_hook(lambda _, __, output: seen.append(output))
    want = model(images(2, 64))
    extractor = create_feature_extractor(model, ["layer2"], **options)
    assert torch.equal(extractor(images(2, 64))["layer2"], seen[0])
    graph = torch.fx.symbolic_trace(model)
    assert torch.equal(graph(images(2, 64)), want)
    assert "layer1.0.conv1" in {str(node.target) for node in graph.graph.nodes if node.op == "call_module"}


def test_a_traced_network_that_is_quantized_is_copied_packed_and_saved(tmp_path):
    def traced():
        torch.manual_seed(0)
        net = nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Conv2d(8, 8, 3), nn.Flatten(), nn.Linear(128, 5))
        return torch.fx.symbolic_trace(net.eval())

    x, model = images(4, 8), hf_daq.apply_daq(traced(), bits=4)
    with hf_daq.calibrate(model):
        model(x)
    assert copy.deepcopy(model).daq_config == model.daq_config
    hf_daq.save_pretrained(copy.deepcopy(model), tmp_path / "trainable")
    hf_daq.save_pretrained(model, tmp_path / "packed", packed=True, probe=x)
    assert not model.daq_config.packed
    assert torch.equal(hf_daq.from_pretrained(tmp_path / "trainable", model=traced())(x), model(x))
    packed = copy.deepcopy(hf_daq.from_pretrained(tmp_path / "packed", model=traced()))
    assert packed.daq_config.packed
    torch.testing.assert_close(packed(x), model(x), rtol=1e-4, atol=1e-5)
    assert not hasattr(copy.deepcopy(hf_daq.remove_daq(model)), "daq_config")


@pytest.mark.parametrize("limit", range(300, 1400, 100))
@pytest.mark.filterwarnings("ignore")
def test_the_parts_of_a_layer_stay_on_one_device(limit):
    model = nn.Sequential(*[nn.Linear(8, 8) for _ in range(3)])
    hf_daq.apply_daq(model, weight_bits=8, first_last_bits=8)
    found = accelerate.infer_auto_device_map(model, max_memory={0: limit, "cpu": 10**6})
    assert set(found) <= {"", "0", "1", "2"}
    assert all(not child.training for child in model.eval().modules())
    assert all(parameter.dtype == torch.float64 for parameter in model.double().parameters())


@pytest.mark.parametrize("kind", KINDS)
def test_offloaded_layers_compute_what_they_did_and_are_refused_where_their_weights_are_needed(kind, tmp_path):
    model = KINDS[kind]()
    want = model(images(2, 64))
    accelerate.cpu_offload(model, execution_device=torch.device("cpu"))
    with torch.no_grad():
        assert torch.equal(model(images(2, 64)), want)
    with pytest.raises(CheckpointError, match="remove_hook_from_submodules"):
        hf_daq.save_pretrained(model, tmp_path / "out")
    assert not (tmp_path / "out").exists()
    if kind == "quantized":
        with pytest.raises(ModelError, match="remove_hook_from_submodules"):
            hf_daq.pack(model)
        with pytest.raises(ModelError, match="is offloaded.*remove_hook_from_submodules"), hf_daq.calibrate(model):
            pass
        with pytest.raises(ModelError, match="is offloaded.*remove_hook_from_submodules"):
            hf_daq.restart(model)
    else:
        with pytest.raises(ModelError, match="is offloaded.*remove_hook_from_submodules"):
            hf_daq.unpack(model)
    with pytest.raises(ModelError, match="is offloaded.*remove_hook_from_submodules"):
        hf_daq.remove_daq(model, weights="quantized")
    with torch.no_grad():
        assert torch.equal(model(images(2, 64)), want)
    plain = accelerate.cpu_offload(nn.Sequential(nn.Linear(8, 8)), execution_device=torch.device("cpu"))
    with pytest.raises(ModelError, match="is offloaded.*remove_hook_from_submodules"):
        hf_daq.apply_daq(plain, weight_bits=8, first_last_bits=8)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.filterwarnings("ignore:.*torch.jit.script. is deprecated")
def test_scripting_is_refused(kind):
    with pytest.raises(ModelError, match=r"torch.jit.script cannot compile.*hf_daq.export_onnx"):
        torch.jit.script(KINDS[kind]())


def test_torch_walks_through_the_quantizers_to_load_a_distributed_checkpoint():
    model, twin = quantized_timm(bits=4), quantized_timm(bits=4)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(1.1)
    set_model_state_dict(twin, get_model_state_dict(model))
    for one, other in zip(model.state_dict().values(), twin.state_dict().values(), strict=True):
        assert torch.equal(one, other)
