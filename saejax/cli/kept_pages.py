"""glibc allocator setting: memory that a step frees stays with the process."""

import ctypes
import sys

# Parameters of glibc's mallopt.
_TRIM_THRESHOLD, _MMAP_MAX, _ARENA_MAX = -1, -4, -8


def keep() -> None:
    """Let the allocator keep freed memory, for the whole process, whose memory then stays at its peak.

    XLA on CPU requests its temporary arrays from the system and returns them in every step. Clearing those pages anew
    took a fifth of a step. Only what comes before any thread sees all of it: call it before NumPy or JAX are
    imported.
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None) if sys.platform == "linux" else None  # musl has none
    if mallopt is not None:
        mallopt(_ARENA_MAX, 1)  # other arenas map large blocks whatever is said
        mallopt(_MMAP_MAX, 0)
        mallopt(_TRIM_THRESHOLD, 2**31 - 1)
