"""Stands between a runner and a piece of work, started by path: if the runner dies, the piece and its children die with
it (Linux).

python -I -S guard.py RUNNERS_PID COMMAND... ends with the command's status, 128 + the signal's number where one ended
it."""

import ctypes
import os
import signal
import subprocess
import sys

PR_SET_PDEATHSIG = 1


def main() -> int:
    """The command's status."""
    signal.signal(signal.SIGTERM, lambda *_: os.killpg(0, signal.SIGKILL))
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGTERM)
    if os.getppid() != int(sys.argv[1]):  # it died before that
        os.killpg(0, signal.SIGKILL)
    status = subprocess.call(sys.argv[2:])
    return status if status >= 0 else 128 - status


if __name__ == "__main__":
    sys.exit(main())
