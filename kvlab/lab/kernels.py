"""Which implementation of each op a run takes on a device, and why not the kernel that was written for it."""

from dataclasses import replace
from typing import Any, NamedTuple

import jax

from kvlab.lab.laboratory import Laboratory
from kvlab.ledger.states import ROTATED, LatentState, TokenState
from kvlab.memory.config import SEALED
from kvlab.memory.formats import left_in_type, sealed_state
from kvlab.memory.views.sealed import schemes
from kvlab.mixers import MIXERS
from kvlab.models.transformer import LayerConfig
from pallas_kernels.ops import OPS, WITH_KERNELS
from pallas_kernels.selection import Asked, Taken, passed_over


class Chosen(NamedTuple):
    """The implementations of an op, "blocked" or "blocked+mosaic_gpu", and why kernels were passed over, if any."""

    taken: str
    reason: str


def chosen_kernels(lab: Laboratory, device: Any = None) -> dict[str, Chosen]:
    """What a config's ops take on a `selection.Device`, None: this process' first. Nothing is traced; see `summary` for
    what was taken."""
    device = device or jax.devices()[0]
    taken: Taken = {}
    for layer, states in zip(lab.config.layers(), lab.model.states, strict=True):
        taken = _of_whole_sequences(layer) | taken
        for spec in states.values():
            if not isinstance(spec, TokenState | LatentState):
                continue
            for op, asked in _asked(lab, layer, spec):
                name = OPS[op].available(asked, device)[0]
                reason = passed_over(name, OPS[op].refusals(asked, device), device.platform)
                taken.setdefault(op, {}).setdefault(name, set()).update([reason] if reason else [])
    return summary(taken)


def _of_whole_sequences(layer: LayerConfig) -> Taken:
    """Training's op of a layer, which has no kernels to choose from; nothing for a mixer of plain JAX."""
    op = MIXERS[layer.mixer].parallel_op
    return {op: {OPS[op].available()[0]: set()}} if op else {}


def _asked(lab: Laboratory, layer: LayerConfig, spec: TokenState | LatentState) -> list[tuple[str, Asked]]:
    """What a layer asks of each op on its pages. The dense baseline writes through an op, and attends without one.
    Where pages are sealed, those that are open are of the model's type, and attention is asked for both kinds."""
    memory = lab.config.memory
    kind = ROTATED.get(memory.format, memory.format)
    if memory.format == "model" or memory.format in SEALED:
        kind = spec.dtype
    options: dict[str, Any] = {"format": kind, "dtype": spec.dtype}
    if isinstance(spec, LatentState):
        num_kv_heads = 1
        options |= {"head_dims": (spec.rank + spec.rope_dim, spec.rank), "is_latent": True}
    else:
        num_kv_heads = spec.num_kv_heads
        options |= {"head_dims": (spec.key_dim, spec.value_dim)}
    if memory.name == "dense":
        return [("kv_write", Asked(**options, page_size=lab.config.context_len))]
    group = getattr(layer.config, "num_heads", num_kv_heads) // num_kv_heads
    asked = Asked(**options, page_size=memory.page_size)
    every = [(op, replace(asked, group=group) if op == "paged_attention" else asked) for op in WITH_KERNELS]
    if memory.format in SEALED and isinstance(spec, TokenState) and not left_in_type(spec, memory.format):
        both = schemes(sealed_state(spec, memory.format))
        every.append(("paged_attention", replace(asked, group=group, format=both[0].format, schemes=both)))
    return every


def summary(taken: Taken) -> dict[str, Chosen]:
    """A recording in a record's words, an op a line."""
    return {
        op: Chosen("+".join(sorted(names)), "; ".join(sorted(set().union(*names.values()))))
        for op, names in sorted(taken.items())
    }
