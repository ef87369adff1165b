"""A model as one value: its static structure and its parameters. Programs take the two apart, since only parameters
are traced."""

from dataclasses import dataclass
from functools import cached_property

import jax
from flax import nnx

from kvlab.memory.views import LayerStates
from kvlab.models.transformer import Transformer, merge, split
from kvlab.typing import Params


@dataclass(frozen=True, eq=False)
class Model:
    """Structure and parameters of a `Transformer`; parameters may be shapes and dtypes only, of a model that is not
    held.

    Outside programs pass it around whole; inside `jax.jit` merge `structure` with the traced parameters.
    """

    structure: nnx.GraphDef[Transformer]
    params: Params

    @classmethod
    def of(cls, model: Transformer) -> "Model":
        """A built model, or one of shapes (`nnx.eval_shape`), taken apart."""
        return cls(*split(model))

    def merge(self) -> Transformer:
        """The callable model."""
        return merge(self.structure, self.params)

    def __str__(self) -> str:
        return str(self.merge())

    @cached_property
    def vocab_size(self) -> int:
        """Token ids that the model embeds."""
        return self.merge().embedding.num_embeddings

    @cached_property
    def states(self) -> tuple[LayerStates, ...]:
        """The named states of every layer: what a memory must hold."""
        return self.merge().states()

    @property
    def num_params(self) -> int:
        """Parameters, tied ones counted once."""
        return sum(leaf.size for leaf in jax.tree.leaves(self.params))

    @property
    def num_bytes(self) -> int:
        """Bytes of the parameters."""
        return sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(self.params))
