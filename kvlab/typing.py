"""The axis alphabet of kvlab, and an alias for every array that crosses a public boundary.

    B batch · T query tokens · S key tokens · H query heads · K KV heads · G query heads per KV head · D head dim
    E model dim · L layers · P pages · N state dim · R latent rank · V vocabulary · C convolution channels
    M labelled positions · W convolution width · I index dim · J index heads
    A streams of AltUp · F features of a layer's own embedding

Say *page* for memory and *block* for a residual block; `num_*` counts, `*_len` tokens, `*_bytes` always bytes.
Shapes are checked in tests only (jaxtyping's import hook with beartype).
"""

from typing import Any

from jaxtyping import Array, Float, Int32

type PyTree = Any
type Params = dict[str, Any]
"""Nested dict of arrays: `nnx.to_pure_dict` of a model's parameters."""

Hidden = Float[Array, "B T E"]
Tokens = Int32[Array, "B T"]
Positions = Int32[Array, "B T"]
Counts = Int32[Array, "B"]
StreamValues = Float[Array, "A B T E"]
LayerEmbedding = Float[Array, "B T F"]
LayerEmbeddings = Float[Array, "L B T F"]
Logits = Float[Array, "B T V"]
LabelPositions = Int32[Array, "B M"]
LabelLogits = Float[Array, "B M V"]
Queries = Float[Array, "B T H D"]
Keys = Float[Array, "B S K D"]
Values = Float[Array, "B S K Dv"]
HeadOutputs = Float[Array, "B T H Dv"]
Channels = Float[Array, "B T C"]
SinkLogits = Float[Array, "H"]
