"""Runs a module in several processes on this machine, as torchrun does, but for the imports, which take longest."""

import os
import signal
import socket
import subprocess
import sys
from contextlib import suppress
from pathlib import Path

import torch


# Each process prints to files of its own.
LAUNCHER = """
import importlib, os, runpy, sys
from peft_edit import *
outputs, processes, *sys.argv = sys.argv[1:]
importlib.import_module(sys.argv[0])
running = []
for rank in map(str, range(int(processes))):
    if not (child := os.fork()):
        os.environ |= {"RANK": rank, "LOCAL_RANK": rank}
        for number, name in (1, "out"), (2, "err"):
            os.dup2(os.open(f"{outputs}/{name}{rank}", os.O_CREAT | os.O_WRONLY), number)
        runpy.run_module(sys.argv[0], run_name="__main__", alter_sys=True)
        sys.exit()
    running.append(child)
sys.exit(any([os.waitpid(child, 0)[1] for child in running]))
"""
LONGEST = 600  # seconds, after which processes that wait for each other are killed; a busy machine takes minutes


def launch(outputs, module, processes, *args):
    """What each process printed, standard output and standard error, of a module of the package or of this folder.

    Args:
        outputs: folder, which is made, for what they print.
        module: its name. It is run as `python -m` runs it, and must be one that can be imported.
    """
    with socket.socket() as opened:
        opened.bind(("127.0.0.1", 0))
        port = opened.getsockname()[1]
    tests = Path(__file__).parent
    environment = {
        **os.environ,
        "PYTHONPATH": os.pathsep.join(filter(None, [str(tests), str(tests.parent), os.environ.get("PYTHONPATH")])),
        "WORLD_SIZE": str(processes),
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
        "GLOO_SOCKET_IFNAME": "lo",
        "OMP_NUM_THREADS": "1",
    }
    if processes > torch.cuda.device_count():
        environment["CUDA_VISIBLE_DEVICES"] = ""  # each needs one of its own
    outputs.mkdir()
    started = [sys.executable, "-c", LAUNCHER, *map(str, (outputs, processes, module, *args))]
    with subprocess.Popen(started, env=environment, start_new_session=True) as process:
        try:
            status = process.wait(timeout=LONGEST)
        finally:
            with suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
    printed = [[(outputs / f"{name}{rank}").read_text() for name in ("out", "err")] for rank in range(processes)]
    assert status == 0, "\n".join(err for _, err in printed)
    return printed
