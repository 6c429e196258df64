"""Main memory that a training step frees and takes again."""

import ctypes

M_TRIM_THRESHOLD, M_MMAP_MAX = -1, -4  # of mallopt(3)


def keep_freed_memory():
    """Let this process keep the main memory that it frees, for the next allocation; return whether that can be set here.

    glibc gives large blocks back to the system at once, which then clears each of their pages again for the next step: 200,000
    page faults and a tenth of the time of a ResNet-50 step on a CPU (batch 32, 128 px, fp32). No result depends on it.
    Elsewhere than with glibc nothing changes.
    """
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (OSError, AttributeError, TypeError):  # another libc
        return False
    return bool(mallopt(M_MMAP_MAX, 0) and mallopt(M_TRIM_THRESHOLD, -1))
