"""How fast a chip could decode at best: bytes over bandwidth, FLOPs over peak."""

from collections.abc import Sequence

from kvlab.capacity.config import CapacityConfig
from kvlab.capacity.presets import Preset
from kvlab.capacity.serving import Serving
from kvlab.memory.budgets import Context


def intensity(model: Preset, context: int | Context, dtype: str = "bfloat16", serving: Serving | None = None) -> float:
    """FLOPs of mixing for each byte of state that decoding at this context reads; bandwidth-bound below the chip's
    ridge."""
    context = context if isinstance(context, Context) else Context(context, context)
    return mixing_flops(model, context, serving) / max(1, read_bytes(model, context, dtype, serving))


def read_bytes(model: Preset, context: Context, dtype: str, serving: Serving | None) -> int:
    """Bytes of state that decoding the next token reads: of what a `serving` stores, where it stores less."""
    return model.read_bytes(context.context_len, dtype) if serving is None else serving.read_bytes(context)


def mixing_flops(model: Preset, context: Context, serving: Serving | None) -> float:
    """FLOPs of mixing for the next token, over what is stored."""
    if serving is not None:
        return serving.mixing_flops(context)
    return sum(group.count * group.decode_flops(context.context_len) for group in model.groups())


def decode_roofline(
    config: CapacityConfig, contexts: Sequence[int | Context], serving: Serving | None = None
) -> dict[str, float]:
    """The least seconds in which one token of each sequence can be decoded, of contexts of so many tokens; a `serving`
    says what is stored of them, and must know their prompts.

    Parameters and states count apart. For each, bytes are read once at full bandwidth, or FLOPs are done at dense bf16
    peak, whichever takes longer.

    Several chips count as one large chip: nothing is replicated, no time goes into talking. Models whose heads are
    fewer than the chips (MQA, MLA) would in truth hold their state more than once.
    """
    model, hardware, dtype = config.model, config.hardware, config.memory.dtype
    bandwidth, peak = hardware.bandwidth, hardware.peak_flops
    weight_bytes = model.read_weight_bytes(len(contexts))
    each = [known if isinstance(known, Context) else Context(known, known) for known in contexts]
    state_bytes = sum(read_bytes(model, context, dtype, serving) for context in each)
    dense_flops = 2.0 * (model.num_active_params or model.num_params) * len(each)
    weights, dense = weight_bytes / bandwidth, dense_flops / peak
    state, mixing = state_bytes / bandwidth, sum(mixing_flops(model, context, serving) for context in each) / peak
    compute = (dense if dense > weights else 0.0) + (mixing if mixing > state else 0.0)
    return {
        "seconds": max(weights, dense) + max(state, mixing),
        "weights": weights if weights >= dense else 0.0,
        "state": state if state >= mixing else 0.0,
        "compute": compute,
        "bytes": weight_bytes + state_bytes,
    }
