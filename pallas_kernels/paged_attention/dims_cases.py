"""Cases of paged attention at dims of values that are no multiple of 64, the rows of a product."""

from typing import Any

DIMS: dict[str, dict[str, Any]] = {
    "head dims of 80, 3 queries of 3 heads, window, sinks, soft cap": {
        "lengths": [70, 9],
        "num_queries": 3,
        "group": 3,
        "dims": (80, 80),
        "window": 20,
        "sinks": 2,
        "cap": 5.0,
    },
    "head dims of 96, lists of each head, valid slots": {
        "lengths": [70, 0, 9],
        "num_queries": 1,
        "group": 4,
        "dims": (96, 96),
        "lists": "heads",
        "kept": 0.6,
    },
    "values of 112 dims are the first columns of the keys": {
        "lengths": [70, 9],
        "num_queries": 1,
        "group": 4,
        "kv_heads": 1,
        "dims": (128, 112),
        "is_latent": True,
    },
    "int8 by token, head dims of 96": {
        "lengths": [70, 9],
        "num_queries": 2,
        "group": 2,
        "dims": (96, 96),
        "format": "int8",
        "page_size": 32,
        "window": 40,
    },
    "fp8 by token, head dims of 96, valid slots": {
        "lengths": [70, 9],
        "num_queries": 1,
        "group": 4,
        "dims": (96, 96),
        "format": "fp8",
        "page_size": 32,
        "kept": 0.6,
    },
    "int4 by token, head dims of 160": {
        "lengths": [70],
        "num_queries": 1,
        "group": 4,
        "kv_heads": 1,
        "dims": (160, 160),
        "format": "int4",
        "page_size": 32,
    },
    "int8 by channel, values of 96 dims": {
        "lengths": [70, 9],
        "num_queries": 1,
        "group": 4,
        "dims": (64, 96),
        "format": "int8",
        "per": "channel",
        "page_size": 32,
    },
}
