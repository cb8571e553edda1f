"""Several processes of one training, on this machine."""

import subprocess
import sys


def run_processes(count: int, *arguments) -> None:
    """What follows torchrun's own arguments; fails where a process does."""
    launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(count)]
    command = [sys.executable, *launcher, *map(str, arguments)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=1200)
    assert done.returncode == 0, done.stderr
