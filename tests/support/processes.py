"""Processes that start in no time: forked from a server that has imported torch, timm and transformers, and done no more.

They see none of what the tests did before. What a process finds when it imports these libraries itself, and what they
read from the environment at import, needs a process of `subprocess`.
"""

import contextlib
import gc
import multiprocessing
import multiprocessing.connection
import os
import runpy
import socket
import sys
import tempfile
import time
from multiprocessing.context import ForkServerProcess
from pathlib import Path

_AT_START = dict(os.environ)  # no test has changed it yet
_CONTEXT = multiprocessing.get_context("forkserver")
_CONTEXT.set_forkserver_preload(  # a name that a release lacks is passed over
    [
        *("torch", "torchvision", "torch._dynamo", "torch.distributed.fsdp", "torch.distributed.checkpoint.state_dict"),
        *("timm", "timm.data", "timm.optim", "accelerate", "datasets", "sklearn.datasets", "tqdm", "pytest", "typer"),
        *("transformers.trainer", "transformers.models.bert.modeling_bert", "transformers.models.auto.modeling_auto"),
    ]
)


class Program:
    """`python PROGRAM ARGUMENTS`, once for each of `ranks` processes of torch.distributed, or alone without ranks."""

    def __init__(self, program: Path, *args: object, ranks: int = 0, **environment: str) -> None:
        self._folder = Path(tempfile.mkdtemp())
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = str(free.getsockname()[1])
        self.processes: list[ForkServerProcess] = []
        for rank in range(max(ranks, 1)):
            places = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": ranks, "LOCAL_WORLD_SIZE": ranks}
            places |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
            whole = environment | ({key: str(value) for key, value in places.items()} if ranks else {})
            written = self._folder / str(rank)
            target = (str(program), [str(arg) for arg in args], whole, str(written))
            process = _CONTEXT.Process(target=_run, args=target, daemon=True)
            with _environment_at_start():
                process.start()
            self.processes.append(process)

    def finish(self, timeout: float = 300) -> str:
        """What the first process printed; an error where a process failed."""
        end = time.monotonic() + timeout
        while running := [process for process in self.processes if process.is_alive()]:
            if time.monotonic() > end or any(process.exitcode for process in self.processes):
                break
            multiprocessing.connection.wait([process.sentinel for process in running], timeout=1)
        codes = [process.exitcode for process in self.processes]
        self.kill()
        assert codes == [0] * len(codes), f"exit codes {codes}\n" + self.errors()
        return (self._folder / "0.out").read_text()

    def kill(self) -> None:
        for process in self.processes:
            process.kill()
            process.join()

    def kill_when(self, path: Path, timeout: float = 300) -> None:
        """Kill all processes as soon as the path is there."""
        end = time.monotonic() + timeout
        while not path.exists():
            assert all(process.is_alive() for process in self.processes), self.errors()
            assert time.monotonic() < end, f"{path} did not appear"
            time.sleep(0.002)
        self.kill()

    def errors(self) -> str:
        return "\n".join(path.read_text()[-4000:] for path in sorted(self._folder.glob("*.err")))


@contextlib.contextmanager
def _environment_at_start():
    """The first process starts the server, which keeps its environment."""
    now = dict(os.environ)
    os.environ.clear()
    os.environ.update(_AT_START)
    try:
        yield
    finally:
        os.environ.clear()
        os.environ.update(now)


def _run(program: str, args: list[str], environment: dict[str, str], written: str) -> None:
    for descriptor, ending in ((1, "out"), (2, "err")):
        file = os.open(f"{written}.{ending}", os.O_WRONLY | os.O_CREAT)
        os.dup2(file, descriptor)
        os.close(file)
    os.environ.update(environment)
    gc.freeze()  # what the libraries hold is there to stay
    sys.argv = [program, *args]
    sys.path.insert(0, str(Path(program).parent))
    runpy.run_path(program, run_name="__main__")
