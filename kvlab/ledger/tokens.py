"""Token ids as bytes, and the names under which what was computed from them is found again."""

import hashlib
from collections.abc import Callable, Sequence

import numpy as np
import numpy.typing as npt

type TokenIds = Sequence[int] | npt.NDArray[np.integer]

ITEM = 4  # bytes of a stored token id


def sha256(data: bytes) -> bytes:
    """The chain's digest."""
    return hashlib.sha256(data).digest()


def namespace(*, parameters: str, spec: str, page_format: str = "", salt: str = "") -> str:
    """The name of a trie: pages are shared only between runs in which all four are equal. `salt` separates users."""
    return sha256(repr((parameters, spec, page_format, salt)).encode()).hex()


def encode(tokens: TokenIds) -> bytes:
    """Token ids as little-endian int32. Raises ValueError for ids that are no integers of [0, 2^31)."""
    if len(tokens) == 1 and type(tokens[0]) is int and 0 <= tokens[0] < 2**31:
        return tokens[0].to_bytes(ITEM, "little")  # one decoded token, at a tenth of the cost
    array = np.asarray(tokens)
    if array.size == 0:
        return b""
    if array.ndim != 1 or array.dtype.kind not in "iu":
        raise ValueError(f"tokens of shape {array.shape} and dtype {array.dtype}: must be one list of integers")
    if int(array.min()) < 0 or int(array.max()) >= 2**31:
        raise ValueError(f"token {int(array.min() if array.min() < 0 else array.max())}: must be in [0, {2**31})")
    return array.astype("<i4").tobytes()


def page_keys(
    tokens: TokenIds, page_size: int, name: str = "", digest: Callable[[bytes], bytes] = sha256
) -> list[bytes]:
    """The keys of the pages that a lookup of these tokens could be given: all full pages short of the last token."""
    ids, key, keys = encode(tokens), digest(name.encode()), []
    for page in range(max(0, len(tokens) - 1) // page_size):
        key = digest(key + ids[page * page_size * ITEM : (page + 1) * page_size * ITEM])
        keys.append(key)
    return keys
