"""transformers models of many architectures and plain modules, the whole way. `tests/programs/scan_transformers.py` and
`scan_modules.py` take all of them."""

import pytest
import tiny
from scan_modules import check_model
from scan_transformers import CHECKS, check_architecture, quiet

# One of each kind: an encoder with a head, encoders with a tied decoder, decoders with Conv1D, grouped queries, fused
# projections, experts and states, an encoder-decoder, images, two towers, and sound.
WHOLE_WAY = ["bert", "albert", "gpt2", "llama_tied", "mixtral", "mamba", "vit", "resnet", "wav2vec2"]
LONGER = [name for name in WHOLE_WAY if name != "llama_tied"]
OTHERS = [name for name in tiny.ARCHITECTURES if name not in WHOLE_WAY]


@pytest.fixture(autouse=True)
def no_reports():
    with quiet():
        yield


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=pytest.mark.slow if name in LONGER else ()) for name in WHOLE_WAY]
)
def test_plan_load_calibrate_train_save_reload_dequantize_generate_remove(name):
    assert check_architecture(name, CHECKS).problems == []


@pytest.mark.parametrize("name", OTHERS)
def test_plan(name):
    assert check_architecture(name, ["plan"]).problems == []


@pytest.mark.parametrize("name", ["deberta_v2", "t5", "phi3", "clip"])
def test_load_and_generate(name):
    assert check_architecture(name, ["load", "generate"]).problems == []


@pytest.mark.parametrize("name", ["swin_t", "unet", "unet_3d", "speech", "translator"])
def test_plain_modules(name):
    assert check_model(name).problems == []
