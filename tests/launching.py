"""Launches several processes on this machine as torchrun does, after the imports, which take longest and are of all."""

import os
import signal
import socket
import subprocess
import sys
from contextlib import suppress
from pathlib import Path


LAUNCHER = """
import os, runpy, sys
from peft_edit import *
processes, *sys.argv = sys.argv[1:]
running = []
for rank in map(str, range(int(processes))):
    if not (child := os.fork()):
        os.environ |= {"RANK": rank, "LOCAL_RANK": rank}
        runpy.run_path(sys.argv[0], run_name="__main__")
        sys.exit()
    running.append(child)
sys.exit(any([os.waitpid(child, 0)[1] for child in running]))
"""


def launch(script, processes, *args):
    """Run a script of this folder; after two minutes its processes are killed."""
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
    started = [sys.executable, "-c", LAUNCHER, str(processes), tests / script, *args]
    with subprocess.Popen(started, env=environment, start_new_session=True) as process:
        try:
            assert process.wait(timeout=120) == 0
        finally:
            with suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
