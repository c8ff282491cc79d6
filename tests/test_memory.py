"""Large blocks of memory are used again inside, and go back to the system afterwards."""

import os
import subprocess
import sys

import pytest
from models import quantized_timm

from hf_daq.nn import memory
from hf_daq.nn.memory import memory_reused

SIZE = 2**26
# Page faults of writing one block after the other, and the memory of the process: outside, inside, inside twice, outside again.
PROGRAM = f"""
import resource, torch
from hf_daq.nn.memory import memory_reused

def look():
    for _ in range(8):
        torch.ones({SIZE}, dtype=torch.uint8)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    for _ in range(4):
        torch.ones({SIZE}, dtype=torch.uint8)
    print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)

def size():
    with open("/proc/self/statm") as pages:
        print(int(pages.read().split()[1]) * resource.getpagesize())

look()
size()
with memory_reused():
    look()
    with memory_reused():
        look()
    look()
    size()
size()
"""


def printed(**environment):
    kept = {name: value for name, value in os.environ.items() if not name.startswith("MALLOC_")}
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM], env=kept | environment, capture_output=True, text=True, check=True
    )
    return [int(line) for line in done.stdout.split()]


needs_glibc = pytest.mark.skipif(
    memory._glibc() is None, reason="malloc is another one, or is set up by the environment"
)


@needs_glibc
def test_blocks_are_used_again_inside_and_go_back_afterwards():
    outside, before, *inside, within, after = printed()
    assert outside > 100  # 16,384 a block of pages of 4 KiB, 32 of 2 MiB
    assert max(inside) < outside / 4
    assert within > before + SIZE / 2
    assert after < before + SIZE / 4


@needs_glibc
def test_what_the_environment_says_stays():
    assert memory._inside == 0
    found = printed(MALLOC_MMAP_THRESHOLD_="1000000")
    assert min(found[0], *found[2:5]) > 100


def test_every_way_out_of_calibration_ends_it():
    quantized_timm("test_resnet", bits=4)
    assert memory._inside == 0
    with pytest.raises(KeyError), memory_reused():
        assert memory._inside == (memory._glibc() is not None)
        raise KeyError
    assert memory._inside == 0
