"""timm and transformers know of DAQ whichever is imported first, and `import hf_daq` loads neither."""

import subprocess
import sys

import pytest

KNOWN = """
from transformers import AutoModel
from transformers.quantizers import auto
assert auto.AUTO_QUANTIZATION_CONFIG_MAPPING["daq"] is hf_daq.DaqConfig
assert auto.AUTO_QUANTIZER_MAPPING["daq"].__module__ == "hf_daq.integrations.transformers"
import timm
assert timm.models.is_model("hf_daq")
assert not [finder for finder in sys.meta_path if type(finder).__module__.startswith("hf_daq")]
"""
SCRIPTS = {
    "hf_daq first": "import sys, hf_daq\nassert not {'torch', 'timm', 'transformers'} & sys.modules.keys()" + KNOWN,
    "a look for timm first": "import sys, hf_daq\nimport importlib.util\nimportlib.util.find_spec('timm')" + KNOWN,
    "timm first": "import sys, timm, hf_daq" + KNOWN,
    "a name of hf_daq first": "import sys, hf_daq\nhf_daq.from_pretrained" + KNOWN,
    "transformers first": "import sys\nfrom transformers.quantizers import auto\nimport hf_daq" + KNOWN,
    "a model of transformers first": "import sys\nfrom transformers import BertModel\nimport hf_daq" + KNOWN,
    "hub_transformers first": "import sys, hf_daq.integrations.transformers" + KNOWN,
}


@pytest.mark.parametrize("script", SCRIPTS)
def test_order_of_imports(script):
    result = subprocess.run([sys.executable, "-c", SCRIPTS[script]], capture_output=True, text=True)
    assert result.returncode == 0, result.stderr[-2000:]
