"""Memory that a process keeps, in a process of its own: what is freed is not given back to the system."""

import platform
import subprocess
import sys

import pytest

from bytelm.host_memory import keep_memory

PAGES = """
import resource, sys
from pathlib import Path
from bytelm.host_memory import keep_memory
kept = keep_memory(Path(sys.argv[1])) if len(sys.argv) > 1 else None
def pages():
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    b"x" * (1 << 24)
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before
pages()
print(kept, pages())
"""


def run(root, *devices):
    done = subprocess.run([sys.executable, "-c", PAGES, *map(str, devices)], cwd=root, capture_output=True, text=True,
                          check=True)  # fmt: skip
    kept, pages = done.stdout.split()
    return kept, int(pages)


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="glibc's malloc is told what to keep")
def test_freed_memory_is_kept(root, tmp_path):
    assert run(root)[1] > 1000  # 16 MiB in pages of 4 KiB
    kept, pages = run(root, tmp_path)
    assert kept == "True" and pages < 50


def test_not_where_an_accelerator_is(tmp_path):
    (tmp_path / "vfio").mkdir()
    (tmp_path / "vfio" / "0").touch()
    assert not keep_memory(tmp_path)
