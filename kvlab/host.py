"""What the host process must be told before the device is asked for speed."""

import ctypes
import sys

# glibc's mallopt parameters (malloc.h).
_TRIM_THRESHOLD, _TOP_PAD, _MMAP_MAX, _ARENA_MAX = -1, -2, -4, -8


def keep_freed_memory() -> bool:
    """Tells glibc to keep freed memory instead of giving it back to the kernel; returns whether it could.

    XLA on CPU allocates the temporaries of every call anew. With glibc's defaults they are mapped, faulted in page by
    page and unmapped each time. That costs half of a training step of tens of megabytes (docs/findings/training.md). A
    process that trains wants the opposite: one arena, never trimmed, never mapped piecewise. Without glibc nothing
    happens.
    """
    if not sys.platform.startswith("linux"):
        return False
    try:
        mallopt = ctypes.CDLL("libc.so.6").mallopt
    except (OSError, AttributeError):
        return False
    settings = ((_MMAP_MAX, 0), (_TRIM_THRESHOLD, 2**31 - 1), (_TOP_PAD, 1 << 28), (_ARENA_MAX, 1))
    accepted = [mallopt(name, value) for name, value in settings]  # every one is tried
    return all(accepted)
