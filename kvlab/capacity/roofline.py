"""How fast a chip could decode at best: bytes over bandwidth, FLOPs over peak."""

from collections.abc import Sequence

from kvlab.capacity.config import CapacityConfig
from kvlab.capacity.presets import Preset


def intensity(model: Preset, context_len: int, dtype: str = "bfloat16") -> float:
    """FLOPs of mixing for each byte of state that decoding at this context reads; bandwidth-bound below the chip's
    ridge."""
    mixing = sum(group.count * group.decode_flops(context_len) for group in model.groups())
    return mixing / max(1, model.read_bytes(context_len, dtype))


def decode_roofline(config: CapacityConfig, lengths: Sequence[int]) -> dict[str, float]:
    """The least seconds in which one token of each sequence can be decoded.

    Parameters and states count apart. For each, bytes are read once at full bandwidth, or FLOPs are done at dense bf16
    peak, whichever takes longer.

    Several chips count as one large chip: nothing is replicated, no time goes into talking. Models whose heads are
    fewer than the chips (MQA, MLA) would in truth hold their state more than once.
    """
    model, hardware = config.model, config.hardware
    bandwidth, peak = hardware.bandwidth, hardware.peak_flops
    weight_bytes = model.read_weight_bytes(len(lengths))
    state_bytes = sum(model.read_bytes(n, config.memory.kv_dtype) for n in lengths)
    dense_flops = 2.0 * (model.num_active_params or model.num_params) * len(lengths)
    mixing_flops = sum(model.decode_flops(n) for n in lengths) - dense_flops
    weights, dense = weight_bytes / bandwidth, dense_flops / peak
    state, mixing = state_bytes / bandwidth, mixing_flops / peak
    compute = (dense if dense > weights else 0.0) + (mixing if mixing > state else 0.0)
    return {
        "seconds": max(weights, dense) + max(state, mixing),
        "weights": weights if weights >= dense else 0.0,
        "state": state if state >= mixing else 0.0,
        "compute": compute,
        "bytes": weight_bytes + state_bytes,
    }
