"""Processes that are killed: ``main([...])`` in a forked child, which needs no second import."""

import logging
import os
import signal
import socket
import sys
import time
import traceback
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import peft  # noqa: F401
import torch
import transformers.models.llama.modeling_llama  # noqa: F401
from lightning.pytorch.utilities import rank_zero_only

# What is imported here, no child has to import again.
import sst_lightning.cli.lightning_cli  # noqa: F401
from sst_lightning.cli.main import main

# A process that takes longer hangs.
SECONDS = 180


@dataclass(frozen=True)
class Ended:
    """A process that has ended.

    Attributes:
        code: exit code, 128 + the number of the signal that ended it, as a shell has it.
        output: what it wrote to its streams.
    """

    code: int
    output: str


def run_child(
    folder: Path, arguments: list[str], before: Callable[[], object] | None = None
) -> Ended:
    """Run the program in a process of its own.

    Args:
        folder: current folder of the process.
        arguments: command line.
        before: called in the process first, to lay traps.
    """
    return _wait(*_start(folder, arguments, before, "output.txt"))


def run_ranks(folder: Path, arguments: list[str]) -> list[Ended]:
    """Run the program in two processes that a cluster would have started, as torchrun does."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])

    def join(rank: int) -> None:
        names = {"LOCAL_RANK": str(rank), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
        os.environ.update(names, WORLD_SIZE="2", NODE_RANK="0")
        rank_zero_only.rank = rank

    both = ["--trainer.devices=2", "--trainer.strategy=ddp"]
    started = [
        _start(folder, [*arguments, *both], partial(join, rank), f"rank-{rank}.txt")
        for rank in range(2)
    ]
    return [_wait(*process) for process in started]


def _start(
    folder: Path, arguments: list[str], before: Callable[[], object] | None, log: str
) -> tuple[int, Path]:
    folder.mkdir(parents=True, exist_ok=True)
    sys.stdout.flush()
    sys.stderr.flush()
    process = os.fork()
    if process == 0:
        os._exit(_child(folder, folder / log, arguments, before))
    return process, folder / log


def _wait(process: int, log: Path) -> Ended:
    end = time.monotonic() + SECONDS
    while True:
        found, status = os.waitpid(process, os.WNOHANG)
        if found:
            break
        if time.monotonic() > end:
            os.kill(process, signal.SIGKILL)
            os.waitpid(process, 0)
            raise TimeoutError(f"a process did not end:\n{log.read_text()}")
        time.sleep(0.01)
    code = os.waitstatus_to_exitcode(status)
    return Ended(code if code >= 0 else 128 - code, log.read_text())


def _child(
    folder: Path, log: Path, arguments: list[str], before: Callable[[], object] | None
) -> int:
    code = 1
    try:
        descriptor = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
        os.dup2(descriptor, 1)
        os.dup2(descriptor, 2)
        sys.stdout = os.fdopen(1, "w", buffering=1)
        sys.stderr = os.fdopen(2, "w", buffering=1)
        for name in ("lightning", "lightning.pytorch", "lightning.fabric"):
            for handler in logging.getLogger(name).handlers:
                if isinstance(handler, logging.StreamHandler):
                    handler.setStream(sys.stderr)
        os.chdir(folder)
        # torch renews its thread pool at the first call after a fork, which must not be several
        # threads' at once, as it would be when transformers reads weights.
        torch.set_num_threads(1)
        # As a shell starts a program; a test runner may ignore them.
        signal.signal(signal.SIGINT, signal.default_int_handler)
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
        if before is not None:
            before()
        code = main(arguments)
    except SystemExit as stop:
        code = stop.code if isinstance(stop.code, int) else 1
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
    return code
