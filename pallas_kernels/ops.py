"""Every operation, and all that is known of it: what the command line, provenance, simulators, compilers and the bench
iterate over.

An op is a folder: `api.py` is the contract and has IMPLEMENTATIONS, `reference.py` is plain XLA, `__init__.py` exports
the function. To add one, add these three. One with kernels has beside them

    gpu.py, tpu.py   the kernels, each with `refusal(asked)`: why it cannot serve such pages
    proof.py         `check(kernel, **case)`: what every implementation must do; `by_api`: the public function, as one
    cases.py         `cases(platform, num_generated)`: what it is checked on; `SIMULATED`: what simulators run
    shapes.py        `shapes`, `call`, `floor_bytes`: what is compiled for absent chips

Of a second function in `api.py`, NAME_IMPLEMENTATIONS makes the op `folder_name`.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from typing import Any

import pallas_kernels
from pallas_kernels import selection
from pallas_kernels.chips import DIMS, Call, Shape, Target
from pallas_kernels.selection import Asked


@dataclass(frozen=True)
class Op:
    """An operation. `implementations` are in the order in which they are preferred; those of an op with kernels that
    work on pages depend on what is asked."""

    name: str
    implementations: Mapping[str, Callable[..., Any]]
    has_kernels: bool = False

    def refusals(self, asked: Asked | None = None, device: Any = None) -> dict[str, str]:
        """Why an implementation cannot serve what is asked on a device (None: this process' first), for those that
        cannot."""
        return selection.refusals(self.name, asked, device) if self.has_kernels else {}

    def available(self, asked: Asked | None = None, device: Any = None) -> list[str]:
        """What can run, the most preferred first."""
        return list(selection.available(self.implementations, self.refusals(asked, device)))

    def kernel(self, backend: str) -> Callable[..., Any]:
        """That of "gpu" or "tpu", called as implementations are."""
        return getattr(import_module(f"pallas_kernels.{self.name}.{backend}"), self.name)

    def check(self, kernel: Callable[..., Any] | None = None, **case: Any) -> None:
        """Proves a kernel on a case; None: what the public function chooses."""
        proof = import_module(f"pallas_kernels.{self.name}.proof")
        proof.check(kernel or proof.by_api(), **case)

    def cases(self, platform: str, num_generated: int) -> dict[str, dict[str, Any]]:
        """By name, in sizes that the kernels of "gpu", "tpu" or "cpu" take."""
        return self._module("cases").cases(platform, num_generated)

    @property
    def simulated(self) -> Sequence[dict[str, Any]]:
        """The cases that a simulator's verdict rests on."""
        return self._module("cases").SIMULATED

    def shapes(self, backend: str, dims: Sequence[int] = DIMS) -> list[Shape]:
        """What is compiled for the chips of a backend."""
        return self._module("shapes").shapes(backend, dims)

    def call(self, shape: Shape, target: Target, sharding: Any) -> Call:
        """The kernel of a target on arrays of a shape."""
        return self._module("shapes").call(shape, target, sharding)

    def floor_bytes(self, shape: Shape) -> int:
        """What must move at least."""
        return self._module("shapes").floor_bytes(shape)

    def _module(self, name: str) -> Any:
        return import_module(f"pallas_kernels.{self.name}.{name}")


def discovered() -> dict[str, Op]:
    """Every op by its name, those with the most implementations first."""
    found, mark = [], "IMPLEMENTATIONS"
    for contract in (path for folder in pallas_kernels.__path__ for path in Path(folder).glob("*/api.py")):
        folder = contract.parent
        for name, implementations in vars(import_module(f"pallas_kernels.{folder.name}.api")).items():
            if name.endswith(mark):
                second = name.removesuffix(mark).lower().rstrip("_")
                op_name = f"{folder.name}_{second}" if second else folder.name
                found.append(Op(op_name, implementations, has_kernels=(folder / "cases.py").exists()))
    found.sort(key=lambda op: (-len(op.implementations), op.name))
    return {op.name: op for op in found}


OPS = discovered()
WITH_KERNELS: dict[str, Op] = {name: op for name, op in OPS.items() if op.has_kernels}
"""Those over pages."""


def shapes(backend: str, dims: Sequence[int] = DIMS) -> list[Shape]:
    """What is compiled for the chips of a backend, of every op with kernels."""
    return [shape for op in WITH_KERNELS.values() for shape in op.shapes(backend, dims)]
