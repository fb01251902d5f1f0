"""Where threads take memory from."""

from __future__ import annotations

import os
import platform
import subprocess
import sys
from pathlib import Path

import pytest

HEAPS = """
import ctypes, sys, threading
from mira.engine.memory import share_heap
if "share" in sys.argv:
    share_heap()
libc, all_there = ctypes.CDLL(None), threading.Barrier(4)
libc.malloc.restype = libc.fopen.restype = ctypes.c_void_p
def take():
    all_there.wait()
    libc.malloc(ctypes.c_size_t(1000))
threads = [threading.Thread(target=take) for _ in range(4)]
for thread in threads: thread.start()
for thread in threads: thread.join()
told = ctypes.c_void_p(libc.fopen(sys.argv[1].encode(), b"w"))
libc.malloc_info(0, told)
libc.fclose(told)
"""


@pytest.mark.slow
@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="heaps of threads are those of glibc")
@pytest.mark.parametrize(
    ("arguments", "chosen", "one"),
    [((), {}, False), (("share",), {}, True), (("share",), {"MALLOC_ARENA_MAX": "8"}, False)],
)
def test_all_threads_take_memory_from_one_heap(
    arguments: tuple[str, ...], chosen: dict[str, str], one: bool, tmp_path: Path
) -> None:
    told = tmp_path / "heaps.xml"
    environment = {key: value for key, value in os.environ.items() if key != "MALLOC_ARENA_MAX"} | chosen
    subprocess.run([sys.executable, "-c", HEAPS, str(told), *arguments], env=environment, check=True)
    assert (told.read_text().count("<heap nr=") == 1) is one
