"""`lint-imports` passes as the packages are, and fails where an import is planted that a contract of `pyproject.toml`
forbids."""

import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]


def lint_imports(folder: Path) -> subprocess.CompletedProcess[str]:
    program = Path(sys.executable).parent / "lint-imports"
    return subprocess.run([program, "--no-cache"], cwd=folder, capture_output=True, text=True, check=False)


@pytest.fixture
def house(tmp_path: Path) -> Path:
    """A copy of the packages, in which one may plant what one likes."""
    for package in ("kvlab", "pallas_kernels"):
        shutil.copytree(ROOT / package, tmp_path / package, ignore=shutil.ignore_patterns("__pycache__"))
    shutil.copy(ROOT / "pyproject.toml", tmp_path)
    return tmp_path


@pytest.mark.parametrize(
    ("package", "planted", "broken"),
    [
        ("pallas_kernels", "import kvlab", "kernels stand alone BROKEN"),
        ("kvlab/ledger", "import jax", "the ledger imports no JAX BROKEN"),
        ("kvlab/ledger", "import kvlab.memory", "arrows point down BROKEN"),
        ("kvlab/memory", "import kvlab.lab.execute", "arrows point down BROKEN"),
        ("kvlab/training", "import kvlab.engine", "arrows point down BROKEN"),
        ("kvlab/compression", "import kvlab.lab.execute", "arrows point down BROKEN"),  # a room that has no place yet
        ("pallas_kernels/page_bounds", "import kvlab", "kernels stand alone BROKEN"),
        ("pallas_kernels/page_bounds/api", "import pallas_kernels.bench", "an op knows nothing above it BROKEN"),
    ],
)
def test_a_planted_import_breaks_its_wall(house: Path, package: str, planted: str, broken: str):
    folder = house / package.removesuffix("/api")
    folder.mkdir(exist_ok=True)
    (folder / "__init__.py").touch()
    with (folder / ("api.py" if package.endswith("/api") else "__init__.py")).open("a") as file:
        file.write(f"\n{planted}\n")
    done = lint_imports(house)
    assert done.returncode == 1, done.stdout + done.stderr
    assert broken in done.stdout


def test_as_it_is_every_wall_stands(house: Path):
    done = lint_imports(house)
    assert done.returncode == 0, done.stdout + done.stderr
