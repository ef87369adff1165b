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
    """With a child in the same session, deaf to polite signals."""
    for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
        signal.signal(number, signal.SIG_IGN)
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

    for number in (signal.SIGTERM, signal.SIGINT):  # which who runs tests in the background ignores
        signal.signal(number, signal.SIG_DFL)
    pieces = [Piece("planted", f"{i}", (sys.executable, "-S", __file__, what), 100.0) for i, what in enumerate(whats)]
    with Runner(Path(path), {"device": "none"}) as runner:
        try:
            runner.run(pieces)
        except Interrupted as error:
            sys.exit(f"interrupted by {error}")


TIMING = {"wall_us": 12.0, "fraction": None, "error": 1e-3, "absent": "", "is_wrong": False, "has_failed": False}
OURS, PEER = "mosaic_gpu", "jax paged_attention"


def bench(planted, kind, name, *options):
    """A piece of the bench that answers without jax, but for what is planted: a word, which is done, an answer, or
    [who, what]: in somebody's turn."""
    plan = json.loads(Path(planted).read_text()).get(f"{kind} {name}".strip())
    if isinstance(plan, str):
        globals()[plan]()
    elif isinstance(plan, dict):
        say(**plan)
    elif kind == "probe":
        say(device="a chip", platform="gpu", versions={"jax": "0"})
    elif kind == "case":
        say(op=name.partition(": ")[0], by=[OURS], wrong="")
    elif kind == "ceilings":
        say(copy_bytes_per_s=1e12, read_bytes_per_s=1e12, product_flops_per_s=1e14)
    else:
        without = dict(zip(options[1::3], options[2::3], strict=True))
        timings = [TIMING | {"name": who, "device_us": None, "doubt": ""} for who in (OURS, PEER)]
        for timing in timings:
            who = timing["name"]
            if who in without:
                timing |= {"absent": without[who], "has_failed": True}
                continue
            say(timings=timings, doing=who, failed="")
            if plan and plan[0] == who:
                {"abort": os.abort, "fail": fail, "hang": lambda: time.sleep(600)}[plan[1]]()
            timing["device_us"] = 10.0
        say(timings=timings, doing="", failed="")


if __name__ == "__main__":
    globals()[sys.argv[1]](*sys.argv[2:])
