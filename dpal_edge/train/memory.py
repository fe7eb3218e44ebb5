"""Memory of a training process on a CPU."""

import ctypes

_TRIM_THRESHOLD, _MMAP_MAX = -1, -4  # of glibc's <malloc.h>
_DEFAULTS = {_TRIM_THRESHOLD: 128 * 1024, _MMAP_MAX: 65536}


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


def give_back_freed_memory() -> None:
    """Undo ``keep_freed_memory``, and give back what was kept, so that what is free can be told."""
    try:
        library = ctypes.CDLL(None)
        for setting, value in _DEFAULTS.items():
            library.mallopt(setting, value)
        library.malloc_trim(0)
    except (AttributeError, OSError, TypeError):
        pass
