"""Compressions by name. A new one is a file and its line here, or an entry point of another package; no mixer
and no memory knows of it."""

from kvlab.compression.base import Attended, Compression, Noted, Part, PassLens, Shape, Slots
from kvlab.compression.budget import Budget
from kvlab.compression.duo import Duo
from kvlab.compression.expected import ExpectedAttention
from kvlab.compression.h2o import H2O
from kvlab.compression.keydiff import KeyDiff
from kvlab.compression.knorm import Knorm
from kvlab.compression.lagkv import LagKV
from kvlab.compression.rkv import RKV
from kvlab.compression.second_pass import KVzip, Oracle, SecondPass
from kvlab.compression.snapkv import SnapKV
from kvlab.compression.static import Random, Recency
from kvlab.compression.streaming import Streaming
from kvlab.compression.tova import TOVA
from kvlab.registry import Registry

OURS: dict[str, type[Compression]] = {
    method.name: method
    for method in (
        Random,
        Recency,
        Knorm,
        SnapKV,
        H2O,
        TOVA,
        KeyDiff,
        LagKV,
        ExpectedAttention,
        RKV,
        Streaming,
        Duo,
        KVzip,
        Oracle,
    )
}
COMPRESSIONS = Registry[type[Compression]]("kvlab.compressions", Compression, OURS, called="name")

__all__ = [
    "COMPRESSIONS",
    "Attended",
    "Budget",
    "Compression",
    "Noted",
    "Part",
    "PassLens",
    "SecondPass",
    "Shape",
    "Slots",
]
