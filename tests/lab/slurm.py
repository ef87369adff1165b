"""A Slurm of one machine for tests: sbatch, srun, scontrol, sacct and scancel as far as submitit calls them.

sbatch starts a process that runs the job's script, and runs it again where somebody has asked for that: `scontrol
requeue`, or a preemption, which is SIGTERM to all tasks and SIGKILL a moment later, as by PreemptMode=REQUEUE.
"""

import os
import shlex
import signal
import subprocess
import sys
import time
from pathlib import Path

ROOT = Path(os.environ.get("FAKE_SLURM", "/nowhere"))


def install(folder):
    """The commands, in a folder for PATH; returns the variables that a process needs to find them."""
    folder.mkdir()
    for name in ("sbatch", "srun", "scontrol", "sacct", "scancel"):
        command = folder / name
        command.write_text(f'#!/bin/sh\nexec {shlex.quote(sys.executable)} {shlex.quote(__file__)} {name} "$@"\n')
        command.chmod(0o755)
    return {"PATH": f"{folder}:{os.environ['PATH']}", "FAKE_SLURM": str(folder)}


def preempt(folder, job, grace_s):
    """What Slurm does to a job that it requeues for another."""
    (folder / f"{job}.again").touch()
    pid = int((folder / f"{job}.pid").read_text())
    os.kill(pid, signal.SIGTERM)
    time.sleep(grace_s)
    os.kill(pid, signal.SIGKILL)


def sbatch(script):
    options = [line.removeprefix("#SBATCH --") for line in Path(script).read_text().splitlines()]
    (ends,) = [line.removeprefix("array=").strip("'").split("%")[0] for line in options if "array=" in line] or ["0-0"]
    is_array = any("array=" in line for line in options)
    low, high = map(int, ends.split("-"))
    copy = ROOT / "7.sh"
    copy.write_text(Path(script).read_text())
    for index in range(low, high + 1):
        job = f"7_{index}" if is_array else "7"
        ids = {"SLURM_ARRAY_JOB_ID": "7", "SLURM_ARRAY_TASK_ID": str(index)} if is_array else {}
        environment = {**os.environ, **ids, "SLURM_JOB_ID": str(7 + index), "FAKE_SLURM_JOB": job}
        environment |= {"SLURM_PROCID": "0", "SLURM_NTASKS": "1", "SLURM_JOB_NUM_NODES": "1"}
        subprocess.Popen(
            [sys.executable, __file__, "run", str(copy)],
            env=environment,
            start_new_session=True,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )
    print("Submitted batch job 7")


def run(script):
    again = ROOT / f"{os.environ['FAKE_SLURM_JOB']}.again"
    for _ in range(5):
        subprocess.run(["bash", script], check=False)
        if not again.exists():
            break
        again.unlink()


def srun(*words):
    values = {"--output": None, "--error": None}
    words = list(words)
    while words[0].startswith("--"):
        if (name := words.pop(0)) in values:
            values[name] = words.pop(0)
    for number, name in ((1, "--output"), (2, "--error")):
        path = values[name].replace("%t", "0").replace("%A_%a", os.environ["FAKE_SLURM_JOB"])
        path = path.replace("%j", os.environ["FAKE_SLURM_JOB"])
        os.dup2(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND), number)
    (ROOT / f"{os.environ['FAKE_SLURM_JOB']}.pid").write_text(str(os.getpid()))
    os.execvp(words[0], words)


def scontrol(verb, job):
    assert verb == "requeue"
    (ROOT / f"{job}.again").touch()


def sacct(*words):
    print("JobID|State|NodeList")
    for path in ROOT.glob("*.pid"):
        print(f"{path.stem}|RUNNING|here")


if __name__ == "__main__":
    globals()[sys.argv[1]](*sys.argv[2:])
