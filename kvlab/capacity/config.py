"""What `kvlab capacity` is asked: a model, chips, how the memory is managed, and a workload."""

from dataclasses import dataclass, field

from kvlab.capacity.presets import KV_DTYPES, Preset
from kvlab.capacity.workload import WorkloadConfig
from kvlab.hardware import HardwareConfig
from kvlab.ledger.checkpoints import CHECKPOINTS
from kvlab.ledger.replacement import POLICIES
from kvlab.schema import ConfigError, Schema, choice, flag, integer, real


@dataclass(frozen=True)
class ServingMemory(Schema):
    """How the memory of a deployment is managed. "paged", or a contiguous reservation: "max" ("dense" is its other
    name), "pow2", "oracle". `kv_dtype` is the cache's; `utilization` of the chips' memory is used, the rest is for
    activations."""

    name: str = choice("paged", ("paged", "dense", "max", "pow2", "oracle"))
    page_size: int = integer(16, 1, 4096)
    chunk_len: int = integer(512, 1, 1 << 24)
    kv_dtype: str = choice("bfloat16", KV_DTYPES)
    utilization: float = real(0.9, 0.0, 1.0, open_low=True)
    prefix_cache: bool = flag(True)
    policy: str = choice("lru", POLICIES)
    checkpoints: str = choice("junctions", CHECKPOINTS)
    checkpoint_interval: int = integer(1, 1, 65536)
    preemption: str = choice("recompute", ("recompute", "swap"))
    host_gb: float = real(0.0, 0.0, 1e6)

    @property
    def reservation(self) -> str | None:
        """The contiguous reservation, if any."""
        return {"paged": None, "dense": "max"}.get(self.name, self.name)


@dataclass(frozen=True)
class CapacityConfig(Schema):
    """`kvlab capacity`: a model on chips under a workload. `context_len` (null: the workload's mean) is where users are
    counted; `price` is dollars an hour for one chip; `max_batch` caps the sequences of a step."""

    model: Preset
    hardware: HardwareConfig = field(default_factory=HardwareConfig)
    memory: ServingMemory = field(default_factory=ServingMemory)
    workload: WorkloadConfig = field(default_factory=WorkloadConfig)
    context_len: int | None = integer(None, 1, 1 << 24, optional=True)
    max_batch: int = integer(256, 1, 1 << 20)
    price: float | None = real(None, 0.0, 1e6, optional=True)
    simulate: bool = flag(True)

    def cross_check(self) -> None:
        if self.context_len is not None and self.context_len > self.workload.max_total:
            legal = f"must be at most workload.max_total = {self.workload.max_total}"
            raise ConfigError("context_len", self.context_len, legal)
