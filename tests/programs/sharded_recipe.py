"""A recipe under Accelerate's FSDP2 on CPU processes: `python -m torch.distributed.run --nproc-per-node 2
tests/programs/sharded_recipe.py NAME ARGUMENTS...`"""

import importlib
import sys
from pathlib import Path

TESTS = Path(__file__).parents[1]
sys.path[:0] = [str(TESTS.parent / "recipes"), str(TESTS / "support")]

from fsdp_on_cpu import launched_with_fsdp2  # noqa: E402

BLOCKS = {"image_classification": "Block", "language_modeling": "LlamaDecoderLayer"}
BLOCKS["text_classification"] = "BertLayer"

if __name__ == "__main__":
    launched_with_fsdp2(BLOCKS[sys.argv[1]], "FULL_STATE_DICT")
    importlib.import_module(sys.argv[1]).main(sys.argv[2:])
