"""Launches several processes on this machine, as torchrun does."""

import os
import socket
import subprocess
import sys
import time
from pathlib import Path


def launch(script, processes, *args):
    """Run a script of this folder; after two minutes its processes are killed."""
    with socket.socket() as opened:
        opened.bind(("127.0.0.1", 0))
        port = opened.getsockname()[1]
    tests = Path(__file__).parent
    environment = {
        **os.environ,
        "PYTHONPATH": os.pathsep.join(filter(None, [str(tests.parent), os.environ.get("PYTHONPATH")])),
        "WORLD_SIZE": str(processes),
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
        "GLOO_SOCKET_IFNAME": "lo",
        "OMP_NUM_THREADS": "1",
    }
    running = []
    try:
        for rank in map(str, range(processes)):
            own = {**environment, "RANK": rank, "LOCAL_RANK": rank}
            running.append(subprocess.Popen([sys.executable, tests / script, *args], env=own))
        end = time.monotonic() + 120
        assert [process.wait(timeout=end - time.monotonic()) for process in running] == [0] * processes
    finally:
        for process in running:
            process.kill()
            process.wait()
