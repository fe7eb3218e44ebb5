"""Memory of a training process on a CPU."""

import ctypes

_TRIM_THRESHOLD, _MMAP_MAX = -1, -4  # of glibc's <malloc.h>


def keep_freed_memory() -> bool:
    """Let this process keep the memory it frees; tell whether its C library can.

    glibc maps every block above 32 MB anew and gives it back when it is freed, so the kernel clears the pages of each
    activation in each update: 8 % of it for a ViT-S alone (bench/allocator.py), more where heads have large maps. The
    process then stays as large as it was at its largest.
    """
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (AttributeError, OSError, TypeError):  # another C library, which has its own ways
        return False
    return bool(mallopt(_MMAP_MAX, 0) and mallopt(_TRIM_THRESHOLD, -1))
