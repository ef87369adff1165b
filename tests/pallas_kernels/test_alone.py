"""The kernels can be used alone: with jax and what jax itself needs, nothing else."""

import subprocess
import sys
from pathlib import Path

ALONE = """
import importlib, importlib.abc, importlib.util, pkgutil, sys

class Refused(importlib.abc.MetaPathFinder):
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in {others}:
            raise ModuleNotFoundError(f"{{name}} is not installed here", name=name)

sys.meta_path.insert(0, Refused())
real = importlib.util.find_spec
importlib.util.find_spec = lambda name, *rest: None if name in {others} else real(name, *rest)
import pallas_kernels
for module in pkgutil.walk_packages(pallas_kernels.__path__, "pallas_kernels."):
    importlib.import_module(module.name)
    print(module.name)
"""


def test_every_module_needs_jax_alone():
    others = ["kvlab", "jaxtyping", "flax", "optax", "matplotlib", "torch", "yaml", "hydra", "rich", "chex", "beartype"]
    code = ALONE.format(others=others)
    root = Path(__file__).parents[2]
    done = subprocess.run([sys.executable, "-c", code], cwd=root, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert "pallas_kernels.bench.__main__" in done.stdout.split()
