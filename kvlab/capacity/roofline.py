"""How fast a chip could decode at best: bytes over bandwidth, FLOPs over peak."""

from collections.abc import Sequence

from kvlab.capacity.config import CapacityConfig
from kvlab.capacity.presets import Preset
from kvlab.capacity.serving import Serving
from kvlab.memory.budgets import Context


def intensity(model: Preset, context_len: int) -> float:
    """FLOPs of mixing for each byte of state that decoding at this context moves, held in bfloat16 as the model
    declares it; bandwidth-bound below the chip's ridge. What a deployment makes of it: `Serving.intensity`."""
    mixing = sum(group.count * group.decode_flops(context_len) for group in model.groups())
    return mixing / max(1, model.moved_bytes(context_len, "bfloat16"))


def decode_roofline(
    config: CapacityConfig, contexts: Sequence[int | Context], serving: Serving | None = None
) -> dict[str, float]:
    """The least seconds in which one token of each sequence can be decoded, of contexts of so many tokens, all of them
    a prompt where nothing else is said. A `serving` says what is stored and moved of them; without one it is made.

    Parameters and states count apart. For each, bytes are moved once at full bandwidth, or FLOPs are done at dense bf16
    peak, whichever takes longer.

    Several chips count as one large chip: nothing is replicated, no time goes into talking. Models whose heads are
    fewer than the chips (MQA, MLA) would in truth hold their state more than once.
    """
    model, hardware = config.model, config.hardware
    bandwidth, peak = hardware.bandwidth, hardware.peak_flops
    weight_bytes = model.read_weight_bytes(len(contexts))
    each = [known if isinstance(known, Context) else Context(known, known) for known in contexts]
    if serving is None:
        longest = max(context.context_len for context in each)
        serving = Serving.of(config, longest, Context(longest, longest))
    state_bytes = sum(serving.moved_bytes(context) for context in each)
    dense_flops = 2.0 * (model.num_active_params or model.num_params) * len(each)
    weights, dense = weight_bytes / bandwidth, dense_flops / peak
    state, mixing = state_bytes / bandwidth, sum(serving.mixing_flops(context) for context in each) / peak
    compute = (dense if dense > weights else 0.0) + (mixing if mixing > state else 0.0)
    return {
        "seconds": max(weights, dense) + max(state, mixing),
        "weights": weights if weights >= dense else 0.0,
        "state": state if state >= mixing else 0.0,
        "compute": compute,
        "bytes": weight_bytes + state_bytes,
    }
