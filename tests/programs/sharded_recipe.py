"""A recipe under Accelerate's FSDP2 on CPU processes, for which Accelerate itself only takes GPUs: `python -m
torch.distributed.run --nproc-per-node 2 tests/programs/sharded_recipe.py NAME ARGUMENTS...`"""

import importlib
import os
import sys
from pathlib import Path

os.environ |= {"ACCELERATE_USE_CPU": "true", "ACCELERATE_USE_FSDP": "true", "FSDP_VERSION": "2"}
BLOCKS = {"image_classification": "Block", "language_modeling": "LlamaDecoderLayer"}
BLOCKS["text_classification"] = "BertLayer"
os.environ |= {"FSDP_AUTO_WRAP_POLICY": "TRANSFORMER_BASED_WRAP", "FSDP_TRANSFORMER_CLS_TO_WRAP": BLOCKS[sys.argv[1]]}
os.environ |= {"FSDP_RESHARD_AFTER_FORWARD": "true", "FSDP_STATE_DICT_TYPE": "FULL_STATE_DICT"}
sys.path.insert(0, str(Path(__file__).parents[2] / "recipes"))

from accelerate import PartialState  # noqa: E402
from accelerate.utils import DistributedType  # noqa: E402

start = PartialState.__init__


def start_as_on_gpus(state: PartialState, *args: object, **kwargs: object) -> None:
    start(state, *args, **kwargs)
    if state.distributed_type == DistributedType.MULTI_CPU:
        state.distributed_type = DistributedType.MULTI_GPU


if __name__ == "__main__":
    PartialState.__init__ = start_as_on_gpus
    importlib.import_module(sys.argv[1]).main(sys.argv[2:])
