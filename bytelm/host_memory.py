"""Memory of a process that computes on CPU: kept when it is freed, in large pages.

XLA's CPU client takes the temporary arrays of a step from malloc anew at each step, and glibc gives arrays of this size
back to the system each time: a training step of a 5M-parameter model then meets 67,000 new pages, a fifth of its time.
glibc's mallopt(3) keeps them, and madvise(2) makes their pages large (`benchmarks/memory`). What a process once had, it
keeps to its end.
"""

import ctypes
import itertools
import platform
from pathlib import Path

ACCELERATORS = ("nvidiactl", "dxg", "kfd", "accel*", "vfio/[0-9]*")  # device files of NVIDIA (WSL), AMD, TPUs
RESERVED = 1 << 31  # bytes of address space marked for large pages
_ARENA_MAX, _MMAP_MAX, _TRIM_THRESHOLD = -8, -4, -1  # mallopt's numbers
_HUGEPAGE = 14  # madvise's
_PAGE = 1 << 21


def keep_memory(devices: Path = Path("/dev")) -> bool:
    """Keeps freed memory of this process; whether it did: on Linux with glibc, where `devices` shows no accelerator.

    Must come before jax meets its devices: threads that have memory of their own keep their ways.
    """
    if platform.system() != "Linux" or platform.libc_ver()[0] != "glibc":
        return False
    if any(itertools.chain.from_iterable(devices.glob(name) for name in ACCELERATORS)):
        return False
    libc = ctypes.CDLL(None)
    libc.malloc.restype, libc.malloc.argtypes = ctypes.c_void_p, [ctypes.c_size_t]
    libc.free.argtypes, libc.madvise.argtypes = [ctypes.c_void_p], [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int]
    # One arena for all threads, which alone can grow without bound; nothing mapped apart; nothing trimmed.
    if not all(libc.mallopt(name, value) for name, value in ((_ARENA_MAX, 1), (_MMAP_MAX, 0), (_TRIM_THRESHOLD, -1))):
        return False
    begin = libc.malloc(RESERVED)  # address space, of which nothing is touched
    if begin:
        first = -(-begin // _PAGE) * _PAGE
        libc.madvise(first, (begin + RESERVED - first) // _PAGE * _PAGE, _HUGEPAGE)
        libc.free(begin)
    return True
