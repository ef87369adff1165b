"""What `kvlab capacity` is asked: a model, chips, how the memory is managed, and a workload."""

from dataclasses import dataclass, field

from kvlab.capacity.presets import KV_DTYPES, Preset
from kvlab.capacity.workload import WorkloadConfig
from kvlab.compression import COMPRESSIONS, Compression
from kvlab.compression.budget import LEGAL
from kvlab.hardware import HardwareConfig
from kvlab.ledger.checkpoints import CHECKPOINTS
from kvlab.ledger.replacement import POLICIES
from kvlab.memory.config import SEALED, MemoryConfig
from kvlab.memory.naming import words_of
from kvlab.schema import ConfigError, Schema, choice, flag, integer, plain, real, registered, to_plain

BY_TOKEN = ("int8", "int4")
"""Formats with a scale for each token and head: as `format` or as `kv_dtype`."""


@dataclass(frozen=True)
class ServingMemory(Schema):
    """How the memory of a deployment is managed. "paged", or a contiguous reservation: "max" ("dense" is its other
    name), "pow2", "oracle". `kv_dtype` is the cache's; `utilization` of the chips' memory is used, the rest is for
    activations. `format`, `residual`, `quantised_prefill`, `compression` and `budget` as in `MemoryConfig`: what is
    sealed or dropped leaves room for more users. A budget of bytes is solved at the context where users are counted."""

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
    format: str = choice("model", ("model", *BY_TOKEN, *SEALED))
    residual: int = integer(32, 0, 1 << 20)
    quantised_prefill: str = choice("no", ("no", "chunks"))
    compression: Compression | None = registered(COMPRESSIONS, "a compression")  # noqa: RUF009
    budget: int | float | str | None = plain(None, LEGAL)
    allow_underfill: bool = flag(False)

    def cross_check(self) -> None:
        if self.reservation is not None and (self.compression is not None or self.format in SEALED):
            name = self.compression.name if self.compression is not None else self.format
            raise ConfigError("name", self.name, f"must be paged with {name}: only pages are given back")
        if self.format != "model" and self.kv_dtype in BY_TOKEN:
            raise ConfigError("format", self.format, f"must be model with kv_dtype = {self.kv_dtype}")
        if self.reservation is None:
            _ = self.held

    @property
    def dtype(self) -> str:
        """What numbers of a token are stored as before they are sealed."""
        return self.format if self.format in BY_TOKEN else self.kv_dtype

    @property
    def shortens(self) -> bool:
        """Whether sequences are compacted, or their pages sealed."""
        return self.compression is not None or self.format in SEALED

    @property
    def held(self) -> MemoryConfig:
        """How a model of this laboratory would be held by such a memory."""
        return MemoryConfig(
            page_size=self.page_size,
            chunk_len=min(self.chunk_len, 65536),
            format=self.format,
            residual=self.residual,
            quantised_prefill=self.quantised_prefill,
            compression=self.compression,
            budget=self.budget,
            allow_underfill=self.allow_underfill,
        )

    @property
    def label(self) -> str:
        """How tables call it: its kind, what is dropped, and how the rest is stored where that is not bfloat16."""
        stored_as = [self.kv_dtype] if self.kv_dtype != ServingMemory.kv_dtype else []
        return " ".join([self.name, *words_of(to_plain(self)), *stored_as])

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
