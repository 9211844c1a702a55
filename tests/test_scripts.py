"""The set-up of scripts/quickstart and scripts/test: what they say when Python, disk or network are missing."""

import os
import re
import shutil
import subprocess
import sys

import pytest


@pytest.fixture
def clone(tmp_path, root):
    """What a fresh clone holds, as far as the set-up looks at it."""
    for name in ("scripts", "constraints", "bytelm"):
        shutil.copytree(root / name, tmp_path / name, ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(root / name, tmp_path / name)
    return tmp_path


def run(clone, script, **environment):
    env = {k: v for k, v in os.environ.items() if not k.startswith(("PIP_", "BYTELM_"))} | environment
    return subprocess.run([clone / "scripts" / script], cwd="/", env=env, capture_output=True, text=True, timeout=300)


@pytest.mark.parametrize("script", ["quickstart", "test"])
def test_no_python(clone, script):
    done = run(clone, script, BYTELM_PYTHON="/bin/false")
    assert done.returncode == 2 and "no Python 3.11 or newer found" in done.stderr
    assert not (clone / ".venv").exists()


def test_no_disk(clone):
    tools = clone / "tools"
    tools.mkdir()
    (tools / "df").write_text("#!/bin/sh\necho Filesystem\necho '/dev/x 9000000 8000000 102400 99% /'\n")
    (tools / "df").chmod(0o755)
    done = run(clone, "quickstart", BYTELM_PYTHON=sys.executable, PATH=f"{tools}:{os.environ['PATH']}")
    assert done.returncode == 2 and "only 100 MB free here" in done.stderr


def test_no_network(clone):
    # Every source of packages is a closed port; pip's own configuration files are left out.
    done = run(
        clone, "test", BYTELM_PYTHON=sys.executable, PIP_CONFIG_FILE=os.devnull, PIP_INDEX_URL="http://127.0.0.1:9/simple",
        PIP_RETRIES="0", PIP_TIMEOUT="1", PIP_NO_CACHE_DIR="1",
    )  # fmt: skip
    assert done.returncode == 2, done.stderr
    assert "the package index could not be reached" in done.stderr and "Traceback" not in done.stderr


def test_wrong_arguments_and_help(clone):
    assert run(clone, "quickstart", BYTELM_PYTHON="/bin/false").returncode == 2
    done = run(clone, "test", BYTELM_PYTHON="/bin/false")
    assert done.returncode == 2
    for script in ("quickstart", "test"):
        shown = subprocess.run([clone / "scripts" / script, "--help"], capture_output=True, text=True, timeout=60)
        assert shown.returncode == 0 and len(shown.stdout) > 80 and not shown.stdout.startswith("#")


def test_constraints_hold_what_the_project_needs(root):
    """Each tested Python has a set of versions that names every direct dependency."""
    import tomllib

    project = tomllib.loads((root / "pyproject.toml").read_text())["project"]
    needed = project["dependencies"] + project["optional-dependencies"]["dev"]
    names = {
        n.split(">")[0].split("<")[0].split("=")[0].split("!")[0].strip().lower().replace("_", "-") for n in needed
    }
    for version in ("3.11", "3.12"):
        pins = (root / "constraints" / f"python{version}.txt").read_text().lower().replace("_", "-")
        pinned = {line.split("==")[0] for line in pins.splitlines() if "==" in line}
        assert names <= pinned, names - pinned


def make_tasks(root, *arguments):
    command = [sys.executable, root / "scripts/make_character_tasks", *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, timeout=60)


def test_spelling_task(root, tmp_path):
    (tmp_path / "typos.txt").write_text("teh->the\ntehe->the\nqiuck->quick, quack\nallot->a lot\n")
    (tmp_path / "text.txt").write_text("The quick brown fox,\nnaïve as ever, saw the other fox. " * 9)
    made = make_tasks(root, "spelling", tmp_path / "a.tsv", "--typos", tmp_path / "typos.txt", "--text",
                      tmp_path / "text.txt", "--bytes", 40)  # fmt: skip
    assert made.returncode == 0, made.stderr
    lines = (tmp_path / "a.tsv").read_text().splitlines()
    assert len(lines) == 27  # The, quick, the
    for line in lines:
        source, target = line.split("\t")
        assert max(len(source.encode()), len(target.encode())) <= 39
        changed = [(a, b) for a, b in zip(source.split(), target.split()) if a != b]
        assert len(changed) == 1
        typo, word = changed[0]
        assert {"The": typo in ("Teh", "Tehe"), "the": typo in ("teh", "tehe"), "quick": typo == "qiuck"}[word]


def test_tasks_to_train_on(root, tmp_path):
    (tmp_path / "text.txt").write_text(
        " ".join(["able", "ant", "bear", "coffee", "dolphin", "elephant", "of", "to", "letters", "yellow"] * 3)
    )
    made = make_tasks(root, "langgame", tmp_path / "a.txt", "--text", tmp_path / "text.txt", "--count", 40)
    assert made.returncode == 0, made.stderr
    for line in (tmp_path / "a.txt").read_text().splitlines():
        question, answer = line.rsplit(" Answer: ", 1)
        assert answer in question.split("options are: ")[1].rstrip(".").split(", ")
    assert make_tasks(root, "sums", tmp_path / "b.txt", "--count", 30).returncode == 0
    for line in (tmp_path / "b.txt").read_text().splitlines():
        a, b, total = re.fullmatch(r"\$(\d{3})\+(\d{3})=(\d+)\$", line).groups()
        assert int(a) + int(b) == int(total[::-1])
    (tmp_path / "text.txt").write_text("a b c")
    refused = make_tasks(root, "langgame", tmp_path / "c.txt", "--text", tmp_path / "text.txt")
    assert refused.returncode == 1 and "too few" in refused.stderr and "Traceback" not in refused.stderr


def test_word_search_task(root, tmp_path):
    (tmp_path / "words.txt").write_text("lion\ta large cat\nox\ttoo short\nviolin\tan instrument with strings\n")
    made = make_tasks(root, "words", tmp_path / "a.tsv", "--definitions", tmp_path / "words.txt", "--count", 50)
    assert made.returncode == 0, made.stderr
    for line in (tmp_path / "a.tsv").read_text().splitlines():
        source, target = line.split("\t")
        assert target in ("lion", "violin")
        assert target in source.split(": ")[1]
        assert len(source.encode()) < 128
    refused = make_tasks(root, "words", tmp_path / "b.tsv", "--definitions", tmp_path / "words.txt", "--bytes", 20)
    assert refused.returncode == 1
    assert "fits 20 bytes" in refused.stderr
    assert make_tasks(root, "words", tmp_path / "c.tsv", "--definitions", tmp_path / "none").returncode == 2
