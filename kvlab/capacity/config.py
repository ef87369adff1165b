"""What `kvlab capacity` is asked: a model, chips, how the memory is managed, and a workload."""

from dataclasses import dataclass, field, replace

from kvlab.capacity.presets import WIDE, Preset
from kvlab.capacity.workload import WorkloadConfig
from kvlab.hardware import HardwareConfig
from kvlab.ledger.checkpoints import CHECKPOINTS
from kvlab.ledger.replacement import POLICIES
from kvlab.ledger.states import QUANTISED
from kvlab.memory.config import SEALED, MemoryConfig
from kvlab.memory.naming import words_of
from kvlab.schema import ConfigError, Schema, choice, flag, integer, real, to_plain


@dataclass(frozen=True)
class ServingMemory(MemoryConfig):
    """How the memory of a deployment is managed. "paged", or a contiguous reservation: "max" ("dense" is its other
    name), "pow2", "oracle". `utilization` of the chips' memory is used, the rest is for activations. What is sealed or
    dropped, as `MemoryConfig` has it, leaves room for more users; what is not read leaves none, and is time that a step
    saves. A budget of bytes is solved at the context where users are counted.

    `kv_dtype` is the type in which the model computes keys and values, or a format by token: `kv_dtype` int8 and
    `format` int8 are the same memory."""

    name: str = choice("paged", ("paged", "dense", "max", "pow2", "oracle"))
    chunk_len: int = integer(512, 1, 1 << 24)
    kv_dtype: str = choice("bfloat16", (*WIDE, *QUANTISED))
    utilization: float = real(0.9, 0.0, 1.0, open_low=True)
    prefix_cache: bool = flag(True)
    policy: str = choice("lru", POLICIES)
    checkpoints: str = choice("junctions", CHECKPOINTS)
    checkpoint_interval: int = integer(1, 1, 65536)
    preemption: str = choice("recompute", ("recompute", "swap"))
    host_gb: float = real(0.0, 0.0, 1e6)

    def cross_check(self) -> None:
        super().cross_check()
        if self.kv_dtype in QUANTISED and self.format not in ("model", self.kv_dtype):
            legal = f"must be {self.kv_dtype} or model with kv_dtype = {self.kv_dtype}, which is a format, too"
            raise ConfigError("format", self.format, legal)

    @property
    def dtype(self) -> str:
        """What the model computes keys and values in, and states that no format changes."""
        return "bfloat16" if self.kv_dtype in QUANTISED else self.kv_dtype

    @property
    def held(self) -> MemoryConfig:
        """How a model of this laboratory would be held by such a memory: in pages, since a block in one piece holds the
        same numbers."""
        format = self.kv_dtype if self.kv_dtype in QUANTISED else self.format
        return replace(self, name="paged", format=format, kv_dtype=self.dtype)

    @property
    def shortens(self) -> bool:
        """Whether sequences are compacted, or their pages sealed."""
        return self.compression is not None or self.format in SEALED

    @property
    def label(self) -> str:
        """How tables call it: its kind, what is dropped, how the rest is stored, and which of it is read; and another
        type than bfloat16 for what the model computes."""
        stored_as = [self.dtype] if self.dtype != ServingMemory.kv_dtype else []
        return " ".join([self.name, *words_of(to_plain(self.held)), *stored_as])

    @property
    def reservation(self) -> str | None:
        """The contiguous reservation, if any."""
        return {"paged": None, "dense": "max"}.get(self.name, self.name)


@dataclass(frozen=True)
class CapacityConfig(Schema):
    """`kvlab capacity`: a model on chips under a workload. `context_len` (null: the workload's mean) is where users are
    counted, which may be longer than any request of the workload, whose own lengths are those that are simulated.
    `price` is dollars an hour for one chip; `max_batch` caps the sequences of a step."""

    model: Preset
    hardware: HardwareConfig = field(default_factory=HardwareConfig)
    memory: ServingMemory = field(default_factory=ServingMemory)
    workload: WorkloadConfig = field(default_factory=WorkloadConfig)
    context_len: int | None = integer(None, 1, 1 << 24, optional=True)
    max_batch: int = integer(256, 1, 1 << 20)
    price: float | None = real(None, 0.0, 1e6, optional=True)
    simulate: bool = flag(True)
