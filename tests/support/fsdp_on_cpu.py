"""Accelerate's FSDP2 on CPU processes, for which Accelerate itself only takes GPUs."""

import os

from accelerate import PartialState
from accelerate.utils import DistributedType

_start = PartialState.__init__


def _start_as_on_gpus(state: PartialState, *args: object, **kwargs: object) -> None:
    _start(state, *args, **kwargs)
    if state.distributed_type == DistributedType.MULTI_CPU:
        state.distributed_type = DistributedType.MULTI_GPU


def launched_with_fsdp2(block: str, state_dict_type: str) -> None:
    """As if this process had been launched with a config like recipes/accelerate/fsdp2.yaml.

    Args:
        block: name of the class of the blocks.
    """
    os.environ |= {"ACCELERATE_USE_CPU": "true", "ACCELERATE_USE_FSDP": "true", "FSDP_VERSION": "2"}
    os.environ |= {"FSDP_AUTO_WRAP_POLICY": "TRANSFORMER_BASED_WRAP", "FSDP_TRANSFORMER_CLS_TO_WRAP": block}
    os.environ |= {"FSDP_RESHARD_AFTER_FORWARD": "true", "FSDP_STATE_DICT_TYPE": state_dict_type}
    PartialState.__init__ = _start_as_on_gpus
