"""`torch.export` of trainable and packed models, for AOTInductor and ExecuTorch."""

import pytest
import torch
from models import images, quantized_timm, small_net
from text_models import tiny_bert, tokens
from torch import nn

import hf_daq
from hf_daq.errors import CalibrationError


@pytest.mark.parametrize(
    ("name", "strict", "packed"),
    [
        pytest.param("test_resnet", True, False, marks=pytest.mark.slow),
        ("test_resnet", False, True),
        pytest.param("test_vit", False, True, marks=pytest.mark.slow),
        pytest.param("test_vit", False, False, marks=pytest.mark.slow),
        pytest.param("test_resnet", True, True, marks=pytest.mark.slow),
    ],
)
@pytest.mark.usefixtures("bit_for_bit")
def test_a_timm_model_is_exported_with_a_dynamic_batch(name, strict, packed):
    model = quantized_timm(name, weight_bits=3, activation_bits=4)
    if packed:
        hf_daq.pack(model)
    size = model.pretrained_cfg["input_size"][-1]
    program = torch.export.export(
        model, (images(2, size),), dynamic_shapes=({0: torch.export.Dim("batch", min=1)},), strict=strict
    )
    for count in (1, 5):
        x = images(count, size, seed=count)
        assert torch.equal(program.module()(x), model(x))


@pytest.mark.slow
@pytest.mark.parametrize("packed", [True, False])
def test_a_transformers_model_is_exported(packed):
    model = hf_daq.apply_daq(tiny_bert(), weight_bits=2, activation_bits=8)
    with hf_daq.calibrate(model):
        model(tokens())
    if packed:
        hf_daq.pack(model)
    inputs = {"input_ids": tokens(), "attention_mask": torch.ones_like(tokens())}
    program = torch.export.export(model, (), inputs)
    assert torch.allclose(program.module()(**inputs).logits, model(**inputs).logits, atol=1e-6)


@pytest.mark.parametrize(
    ("options", "columns", "packed"),
    [
        ({}, 32, False),
        ({}, 30, True),
        ({"weight_granularity": "group", "group_size": 24}, 32, False),
        ({"weight_granularity": "group", "group_size": 24}, 32, True),
        ({"weight_grid": "ternary", "embedding_bits": 2}, 32, True),
    ],
)
def test_tables_are_exported_for_any_number_of_tokens(options, columns, packed):
    model = nn.Sequential(nn.Embedding(50, columns), nn.Linear(columns, 4)).eval()
    hf_daq.apply_daq(model, **({"weight_bits": 8, "embedding_bits": 4} | options))
    if packed:
        hf_daq.pack(model)
    sizes = {0: torch.export.Dim("batch"), 1: torch.export.Dim("tokens")}
    program = torch.export.export(model, (torch.randint(50, (3, 12)),), dynamic_shapes=(sizes,)).module()
    for x in (torch.randint(50, (2, 5)), torch.randint(50, (1, 7))):
        assert torch.equal(program(x), model(x))


@pytest.mark.slow
@pytest.mark.parametrize("packed", [False, True])
def test_aot_inductor_compiles_it_to_a_library_that_agrees(packed, tmp_path):
    model = quantized_timm("test_resnet", weight_bits=3, activation_bits=4)
    if packed:
        hf_daq.pack(model)
    x = images(2, 64)
    program = torch.export.export(model, (x,))
    path = torch._inductor.aoti_compile_and_package(program, package_path=str(tmp_path / "model.pt2"))
    assert torch.allclose(torch._inductor.aoti_load_package(path)(x), model(x), atol=1e-5)


@pytest.mark.filterwarnings("ignore:.*torch.jit.*:FutureWarning", "ignore:.*torch.jit.*:DeprecationWarning")
@pytest.mark.filterwarnings("ignore::torch.jit.TracerWarning")
@pytest.mark.parametrize("inputs", [None, 4])
def test_graphs_of_torch_jit_agree(inputs):
    model = hf_daq.apply_daq(small_net(), weight_bits=4, activation_bits=inputs).eval()
    with hf_daq.calibrate(model):
        model(images())
    x = images(seed=1)
    torch.testing.assert_close(torch.jit.trace(model, images())(x), model(x))
    hf_daq.pack(model)
    torch.testing.assert_close(torch.jit.trace(model, images())(x), model(x))


@pytest.mark.filterwarnings(
    "ignore:`torch.jit:FutureWarning", "ignore:`torch.jit:DeprecationWarning", "ignore::torch.jit.TracerWarning"
)
@pytest.mark.parametrize("graph_of", [lambda *args: torch.export.export(*args, strict=False), torch.jit.trace])
def test_before_calibration_there_is_no_graph(graph_of):
    model = hf_daq.apply_daq(small_net(), bits=4).eval()
    with pytest.raises(CalibrationError, match="layer 'conv' is not calibrated"):
        graph_of(model, (images(),))
