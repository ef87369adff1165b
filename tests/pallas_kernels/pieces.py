"""Pieces of work that behave badly, and a run of them: python pieces.py WHAT ARGUMENT..."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path


def say(**answer):
    print(json.dumps(answer), flush=True)


def answer(value="42"):
    say(value=int(value))


def hang():
    """With a child in the same session, both deaf to polite signals."""
    for one in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
        signal.signal(one, signal.SIG_IGN)
    child = subprocess.Popen([sys.executable, "-S", "-c", "import time; time.sleep(600)"])
    say(step=1, pids=[os.getpid(), child.pid])
    say(step=2, pids=[os.getpid(), child.pid])
    time.sleep(600)


def leave_a_child():
    child = subprocess.Popen([sys.executable, "-S", "-c", "import time; time.sleep(600)"])
    say(pids=[child.pid])


def abort():
    say(step=1)
    os.abort()


def fail():
    print("before", "x" * 5000, "the reason", file=sys.stderr)
    sys.exit(3)


def silent():
    print("no JSON")


def torn():
    say(step=1)
    print('{"step": 2')


def count(path):
    """How often it ran."""
    with Path(path).open("a") as file:
        file.write(".")
    say(runs=len(Path(path).read_text()))


def run(path, *whats):
    """A runner of pieces that do this, one after the other."""
    from pallas_kernels.bench.runner import Interrupted, Piece, Runner

    pieces = [Piece("planted", f"{i}", (sys.executable, "-S", __file__, what), 100.0) for i, what in enumerate(whats)]
    with Runner(Path(path), {"device": "none"}) as runner:
        try:
            runner.run(pieces)
        except Interrupted as error:
            sys.exit(f"interrupted by {error}")


if __name__ == "__main__":
    globals()[sys.argv[1]](*sys.argv[2:])
