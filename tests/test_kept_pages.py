"""The allocator keeps what a step gives back."""

import subprocess
import sys

import pytest

CHILD = """
import ctypes, resource, sys
from saejax.cli import kept_pages as pages
if sys.argv[1] == "keep":
    pages.keep()
libc = ctypes.CDLL(None)
libc.malloc.restype, libc.free.argtypes = ctypes.c_void_p, [ctypes.c_void_p]
size = 64 << 20
def touched():
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    block = libc.malloc(ctypes.c_size_t(size))
    ctypes.memset(block, 1, size)
    libc.free(block)
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before
touched()
print(touched())
"""


def faults_of_a_second_block(how):
    done = subprocess.run([sys.executable, "-c", CHILD, how], capture_output=True, text=True, timeout=120, check=True)
    return int(done.stdout)


@pytest.mark.skipif(sys.platform != "linux", reason="glibc only")
def test_freed_memory_is_used_again_without_new_pages():
    # 64 MiB are 16,384 pages of 4 KiB, or 32 of 2 MiB.
    assert faults_of_a_second_block("keep") < 16 <= faults_of_a_second_block("give")
