"""Chips by name: memory, bandwidth and peak, from the makers' datasheets (dense bf16; sparse figures are not used)."""

import re
from dataclasses import dataclass
from typing import Any, Self

from pydantic import GetJsonSchemaHandler, model_validator
from pydantic.json_schema import JsonSchemaValue
from pydantic_core import CoreSchema

from kvlab.schema import ConfigError, Schema, integer, nearest, text, validated
from pallas_kernels.selection import Device


@dataclass(frozen=True)
class Chip:
    """One accelerator: memory in GB (10^9 bytes), bandwidth in GB/s, dense bf16 TFLOP/s."""

    name: str
    memory_gb: float
    bandwidth_gb_s: float
    bf16_tflops: float
    source: str
    compute_capability: str = ""
    """Of NVIDIA's chips."""
    platform: str = "gpu"
    """JAX's name for such devices."""

    @property
    def ridge(self) -> float:
        """FLOPs for each byte above which the chip is bound by compute."""
        return self.bf16_tflops * 1e3 / self.bandwidth_gb_s

    @property
    def memory_bytes(self) -> int:
        """Memory in bytes."""
        return int(self.memory_gb * 1e9)


CHIPS = {
    chip.name: chip
    for chip in (
        Chip("a100", 80, 2_039, 312, "NVIDIA A100 80GB SXM datasheet", "8.0"),
        Chip("h100", 80, 3_350, 989, "NVIDIA H100 SXM datasheet", "9.0"),
        Chip("h200", 141, 4_800, 989, "NVIDIA H200 SXM datasheet", "9.0"),
        Chip("b200", 180, 8_000, 2_250, "NVIDIA HGX B200 datasheet", "10.0"),
        Chip("mi300x", 192, 5_300, 1_307, "AMD Instinct MI300X datasheet"),
        Chip("v5e", 16, 819, 197, "Google Cloud TPU v5e documentation", platform="tpu"),
        Chip("v5p", 95, 2_765, 459, "Google Cloud TPU v5p documentation", platform="tpu"),
        Chip("v6e", 32, 1_638, 918, "Google Cloud TPU v6e documentation", platform="tpu"),
        Chip("tpu7x", 192, 7_380, 2_307, "Google Cloud TPU7x documentation", platform="tpu"),
    )
}


def _parts(word: str) -> tuple[str, int]:
    """ "h100x2" as ("h100", 2)."""
    match = re.fullmatch(r"(\w+?)x([1-9]\d{0,4})", word)
    return (match[1], int(match[2])) if match and word not in CHIPS else (word, 1)


def _is_known(word: str) -> bool:
    return word == "host" or _parts(word)[0] in CHIPS


@dataclass(frozen=True)
class HardwareConfig(Schema):
    """The chips that `kvlab plan` and `kvlab capacity` fit against, written in one word: "h100", "h100x2" for two;
    "host" is the machine it runs on. `num_chips` multiplies them."""

    name: str = text("host")
    num_chips: int = integer(1, 1, 1 << 16)

    @model_validator(mode="before")
    @classmethod
    def _from_word(cls, values: Any) -> Any:
        if not isinstance(values, str):
            return values
        if not _is_known(values):
            raise ConfigError("", values, nearest(values, ["host", *CHIPS]))
        return {"name": values}

    @classmethod
    def __get_pydantic_json_schema__(cls, core: CoreSchema, handler: GetJsonSchemaHandler) -> JsonSchemaValue:
        return {"anyOf": [{"type": "string", "description": "chips such as h100x2"}, handler(core)]}

    @classmethod
    def build(cls, values: object, path: str = "") -> Self:
        """From a word such as "h100x2", or from a mapping. Raises ConfigError."""
        return validated(cls, values, path) if isinstance(values, str) else super().build(values, path)

    def cross_check(self) -> None:
        if not _is_known(self.name):
            raise ConfigError("name", self.name, nearest(self.name, ["host", *CHIPS]))
        if self.name == "host" and self.num_chips != 1:
            raise ConfigError("num_chips", self.num_chips, "must be 1 for the host, which is this machine")

    @property
    def total_chips(self) -> int:
        """Chips in all."""
        return _parts(self.name)[1] * self.num_chips

    @property
    def label(self) -> str:
        """How people write it: h100x2."""
        return _parts(self.name)[0] + (f"x{self.total_chips}" if self.total_chips > 1 else "")

    def with_chips(self, count: int) -> "HardwareConfig":
        """So many of the same chips."""
        return HardwareConfig(_parts(self.name)[0], count)

    @property
    def chip(self) -> Chip:
        """One of the chips. Raises ConfigError for the host, of which no datasheet is known."""
        if self.name == "host":
            raise ConfigError("hardware.name", self.name, nearest("host", CHIPS))
        return CHIPS[_parts(self.name)[0]]

    @property
    def bandwidth(self) -> float:
        """Bytes a second of all chips together."""
        return self.chip.bandwidth_gb_s * 1e9 * self.total_chips

    @property
    def peak_flops(self) -> float:
        """Dense bf16 FLOPs a second of all chips together."""
        return self.chip.bf16_tflops * 1e12 * self.total_chips

    @property
    def device(self) -> Device | None:
        """One of the chips, as ops ask for it; None for the host: this process' own device."""
        if self.name == "host":
            return None
        return Device(self.chip.platform, self.chip.name, self.chip.compute_capability)

    def memory_bytes(self) -> int:
        """Memory of all chips together, or of this machine."""
        if self.name != "host":
            return self.chip.memory_bytes * self.total_chips
        import os

        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
