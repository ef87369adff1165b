"""The wheel, in an empty environment far from the checkout: the configs travel with it and the command runs."""

import os
import subprocess
import sys
import venv
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]


@pytest.mark.timeout(900)
def test_the_wheel_runs_from_an_empty_environment(tmp_path):
    def run(*command, cwd=tmp_path):
        environment = {name: value for name, value in os.environ.items() if not name.startswith(("PYTHON", "VIRTUAL"))}
        return subprocess.run(command, cwd=cwd, check=True, capture_output=True, text=True, env=environment).stdout

    run(sys.executable, "-m", "build", "--wheel", "--outdir", str(tmp_path / "dist"), cwd=ROOT)
    (wheel,) = (tmp_path / "dist").iterdir()
    venv.create(tmp_path / "env", with_pip=True)
    python = tmp_path / "env" / "bin" / "python"
    constraints = ROOT / os.environ.get("KVLAB_CONSTRAINTS", "constraints.txt")
    run(python, "-m", "pip", "install", "-q", "-c", str(constraints), str(wheel))
    where = run(python, "-c", "import kvlab.compose as c; print(c.configs_dir())").strip()
    assert str(tmp_path / "env") in where
    run(tmp_path / "env" / "bin" / "kvlab", "run", "debug=tiny", "mixer=hybrid", "results_dir=results")
    shown = run(tmp_path / "env" / "bin" / "kvlab", "show", "results/tiny")
    assert "hybrid" in shown
    run(tmp_path / "env" / "bin" / "kvlab", "report", "results/tiny")
    assert (tmp_path / "results" / "tiny" / "report.html").exists()
