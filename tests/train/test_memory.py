import platform
import subprocess
import sys

import pytest

SCRIPT = """
import ctypes, sys
from dpal_edge.train.memory import give_back_freed_memory, keep_freed_memory

def resident():
    with open("/proc/self/statm") as file:
        return int(file.read().split()[1]) * 4096

kept = "keep" in sys.argv[1] and keep_freed_memory()
before = resident()
blocks = [bytearray(64_000_000) for _ in range(3)]
for block in blocks:
    block[:] = b"x" * len(block)
full = resident() - before
blocks = block = None
if sys.argv[1] == "keep for a while":
    give_back_freed_memory()
print(int(kept), full, resident() - before)
"""


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="other C libraries have their own ways")
@pytest.mark.parametrize("choice", ["keep", "keep for a while", "give back"])
def test_freed_memory_stays_only_where_it_is_kept(choice):
    done = subprocess.run([sys.executable, "-c", SCRIPT, choice], check=True, capture_output=True, text=True)
    kept, full, after = map(int, done.stdout.split())
    assert kept == (choice != "give back")
    assert full > 180e6
    assert (after > 180e6) == (choice == "keep")
