"""Where arrays lie: one device, or a mesh whose axes divide some of the axis letters of `kvlab.typing`.

Placement()                                                       # this process' first device
Placement(jax.make_mesh((2,), ("data",)), {"B": "data"})          # batches divided over two devices
placement.sharding("B T")                                         # of an array [B, T]
"""

from collections.abc import Mapping
from dataclasses import dataclass, field

import jax
from jax import Array
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec, SingleDeviceSharding

from kvlab.typing import PyTree


@dataclass(frozen=True)
class Placement:
    """`axes` says which axis of the mesh divides an axis letter; letters that it does not name are whole on every
    device. The compiler carries the division through the program: the mesh is kept with axes of type Auto.

    Raises ValueError for an axis that the mesh does not have, and for axes without a mesh.
    """

    mesh: Mesh | None = None
    axes: Mapping[str, str] = field(default_factory=dict)

    def __post_init__(self) -> None:
        legal = () if self.mesh is None else self.mesh.axis_names
        for letter, axis in self.axes.items():
            if axis not in legal:
                raise ValueError(f"axes[{letter!r}] = {axis!r}: must be an axis of the mesh; legal: {', '.join(legal)}")
        if self.mesh is not None:
            types = (AxisType.Auto,) * len(legal)
            object.__setattr__(self, "mesh", Mesh(self.mesh.devices, legal, axis_types=types))

    def sharding(self, axes: str) -> SingleDeviceSharding | NamedSharding:
        """The sharding of an array with these axes, letters with spaces between them; "" lies whole on every device."""
        if self.mesh is None:
            return SingleDeviceSharding(jax.devices()[0])
        return NamedSharding(self.mesh, PartitionSpec(*(self.axes.get(letter) for letter in axes.split())))

    def put(self, tree: PyTree, axes: str) -> PyTree:
        """Every array of a tree, placed; all of them begin with these axes."""
        return tree if self.mesh is None else jax.device_put(tree, self.sharding(axes))

    def constrain(self, array: Array, axes: str) -> Array:
        """Inside a traced function: an array that is to lie so."""
        return array if self.mesh is None else jax.lax.with_sharding_constraint(array, self.sharding(axes))
