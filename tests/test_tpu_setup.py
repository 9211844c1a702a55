"""Every command in TPU_SETUP.md is run as it stands, but for those that say that they were not."""

import os
import re
import subprocess
import sys

import pytest


def commands(root):
    blocks = re.findall(r"```bash\n(.*?)```", (root / "TPU_SETUP.md").read_text(encoding="utf-8"), re.DOTALL)
    return [line for block in blocks for line in block.replace("\\\n", " ").splitlines() if line.strip()]


def local(root):
    return [line for line in commands(root) if "not run here" not in line]


def test_every_command_says_whether_it_was_run(root):
    lines = commands(root)
    assert len(lines) > 12 and 5 <= len(local(root)) < len(lines)
    assert all(re.match(r"(\w+=\w+ )*(bytelm|scripts/)", line) for line in local(root))


@pytest.mark.slow
def test_local_commands_run(root, tmp_path):
    (tmp_path / "bin").mkdir()
    tool = tmp_path / "bin" / "bytelm"
    tool.write_text(f'#!/bin/sh\nexec {sys.executable} -m bytelm.cli "$@"\n')
    tool.chmod(0o755)
    for name in ("configs", "scripts", "tests", "bytelm"):
        (tmp_path / name).symlink_to(root / name)
    env = {**os.environ, "PATH": f"{tmp_path / 'bin'}:{os.environ['PATH']}", "PYTHONPATH": str(root)}
    env.pop("XLA_FLAGS", None)
    for line in local(root):
        done = subprocess.run(line, shell=True, cwd=tmp_path, env=env, capture_output=True, text=True, timeout=600)
        assert done.returncode == 0, f"{line}\n{done.stdout[-1500:]}\n{done.stderr[-1500:]}"
    assert (tmp_path / "runs" / "rehearsal" / "metrics.jsonl").exists()
