"""timm and transformers know of DAQ whichever is imported first, and an import loads no more than it needs."""

import json
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
waiting = [finder for finder in sys.meta_path if type(finder).__module__.startswith("hf_daq")]
assert not [finder.name for finder in waiting if finder.name in sys.modules]
"""
PLOTS = """
import hf_daq.plots
assert "matplotlib" not in sys.modules
hf_daq.plots.transfer_curve()
assert "matplotlib.pyplot" not in sys.modules
"""
TRAINER = """
import hf_daq
hf_daq.apply_daq
assert "transformers.trainer_callback" not in sys.modules
hf_daq.MonitorCallback
"""
# Each in a process of its own, forked from one that has imported torch and nothing else.
SCRIPTS = {
    "hf_daq first": "import hf_daq" + KNOWN,
    "timm first": "import timm, hf_daq" + KNOWN,
    "transformers first": "from transformers.quantizers import auto\nimport hf_daq" + KNOWN,
    "matplotlib when something is drawn, pyplot never": PLOTS,
    "Trainer when its callback is asked for": TRAINER,
}
MORE = {
    "a look for timm first": "import hf_daq, importlib.util\nimportlib.util.find_spec('timm')" + KNOWN,
    "a name of hf_daq first": "import hf_daq\nhf_daq.from_pretrained" + KNOWN,
    "a model of transformers first": "from transformers import BertModel\nimport hf_daq" + KNOWN,
    "the integration first": "import hf_daq.integrations.transformers" + KNOWN,
}
FORKS = """
import json, os, sys, traceback

def end_of(script):
    reading, writing = os.pipe()
    if not os.fork():
        text = ""
        try:
            exec(script, {"sys": sys})
        except BaseException:
            text = traceback.format_exc()
        os.write(writing, text.encode())
        os._exit(0)
    os.close(writing)
    with open(reading) as end:
        text = end.read()
    os.wait()
    return text

first = {"nothing heavy": end_of("import hf_daq\\nassert not {'torch', 'timm', 'transformers'} & sys.modules.keys()")}
import torch, torchvision
assert not {"timm", "transformers", "hf_daq", "matplotlib"} & sys.modules.keys()
print(json.dumps(first | {name: end_of(script) for name, script in json.load(sys.stdin).items()}))
"""


@pytest.mark.parametrize("scripts", [SCRIPTS, pytest.param(MORE, marks=pytest.mark.slow)], ids=["usual", "more"])
def test_order_of_imports(scripts):
    done = subprocess.run(
        [sys.executable, "-c", FORKS], input=json.dumps(scripts), capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr[-2000:]
    tracebacks = json.loads(done.stdout)
    assert tracebacks == dict.fromkeys(["nothing heavy", *scripts], "")
