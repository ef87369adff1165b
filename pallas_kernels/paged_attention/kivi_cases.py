"""Cases of paged attention over KIVI's pages: keys by channel and values by token in groups, both with zero points."""

from typing import Any

_CASES: dict[str, dict[str, Any]] = {
    "KIVI of 4 bits": {"lengths": [130, 64, 1], "num_queries": 1, "group": 4},
    "KIVI of 4 bits, all far off zero, window, sinks, lists of each head": {
        "lengths": [150, 40],
        "num_queries": 2,
        "group": 2,
        "lists": "heads",
        "offset": 30.0,
        "window": 50,
        "sinks": 3,
    },
    "KIVI of 4 bits, valid slots, soft cap": {
        "lengths": [100, 33],
        "num_queries": 1,
        "group": 2,
        "kept": 0.6,
        "cap": 20.0,
        "offset": -3.0,
    },
    "KIVI of 4 bits, large logits": {"lengths": [70, 9], "num_queries": 1, "group": 8, "magnitude": 40.0},
    "KIVI of 4 bits, channels of many sizes": {
        "lengths": [70],
        "num_queries": 1,
        "group": 2,
        "magnitude": tuple(0.5**channel for channel in range(32)),
        "of_keys": tuple(2.0**channel for channel in range(32)),
    },
    "KIVI of 4 bits, tiny values": {"lengths": [70], "num_queries": 1, "group": 2, "of_values": 1e-6},
    "KIVI of 2 bits": {"lengths": [130, 0, 31], "num_queries": 2, "group": 4, "schemes": ("int2", "int2")},
    "KIVI, keys of 4 bits and values of 2": {
        "lengths": [70, 40],
        "num_queries": 1,
        "group": 4,
        "schemes": ("int4", "int2"),
        "offset": 3.0,
    },
    "KIVI, keys of 2 bits and values of 4, its own chunk": {
        "lengths": [200, 90],
        "num_queries": 3,
        "group": 2,
        "schemes": ("int2", "int4"),
        "chunk": 48,
    },
}
KIVI = {name: {"schemes": ("int4", "int4"), "page_size": 64, "dims": (64, 64)} | case for name, case in _CASES.items()}
"""In pages of 64 and 64 dims unless said. `schemes` are what `formats.kivi` is called with."""
