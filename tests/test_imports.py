"""Who may import whom (the rooms of the house), and that light rooms stay light."""

import ast
import subprocess
import sys

ANY = {
    "config",
    "model_config",
    "boundaries",
    "codec",
    "vocab",
    "windows",
    "patterns",
    "copying",
    "data.functional",
    "data.words",
    "data.word_rule",
    "hierarchical_config",
    "t5_config",
}  # pure and small: anyone may use them
ARROWS = {
    "xla_flags": set(), "config": set(), "model_config": set(), "hierarchical_config": set(), "t5_config": set(),
    "boundaries": set(), "vocab": set(), "metrics": set(), "devices": set(),
    "codec": set(), "windows": set(), "patterns": set(), "copying": set(), "kernels": set(), "host_memory": set(),
    "parallel": set(),
    "nn": {"parallel"},  # only shard()
    "models": {"nn", "parallel"},
    "interop": {"models", "nn", "parallel", "checkpoint", "train.losses"},
    "data": set(),
    "byteview": {"models", "nn", "generate", "protocol", "following"}, "following": {"generate"},
    "checkpoint": {"parallel.hosts"},
    "evals": {"lm", "data", "generate", "metrics", "protocol", "seq2seq_lm", "byteview", "checkpoint"},
    "generate": {"models", "nn.stack"},
    "protocol": {"generate", "following"},
    "cached_steps": {"following", "generate", "models", "protocol"},
    "coding": {"following", "protocol"},
    "drafts": {"following", "generate", "models", "nn.cache"},
    "lm": {"models", "byteview", "interop", "generate", "checkpoint", "protocol", "seq2seq_lm", "parallel",
           "cached_steps", "drafts", "kernels"},
    "seq2seq_lm": {"models", "generate", "parallel", "protocol", "beams", "drafts"}, "beams": set(),
    "topology": set(), "plan_compile": {"topology", "parallel", "train"},
    "communication": {"parallel", "models.flops", "data.seq2seq"},
    "plan_sweep": {"plan", "plan_pod", "topology", "devices", "models"},
    "plan_pod": {"plan", "plan_compile", "topology", "communication", "devices", "models", "train.capacity"},
    "plan": {"models", "nn", "parallel", "devices", "train.state", "train.capacity", "data.seq2seq"},
    "train": {"models", "nn", "kernels", "data", "parallel", "checkpoint", "metrics", "devices", "interop", "generate",
              "evals.bpb", "evals.chunk_history", "evals.seq2seq",
              "lm", "byteview.vocabulary",  # these for word_reader
              "byteview.dropout", "byteview.tokenizer_files"},  # and these for models of tokens
}  # fmt: skip


def imports_of(path):
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom) and node.module and node.module.startswith("bytelm"):
            yield node.module.removeprefix("bytelm").lstrip(".") or ""
        elif isinstance(node, ast.Import):
            yield from (a.name.removeprefix("bytelm").lstrip(".") for a in node.names if a.name.startswith("bytelm"))
        elif isinstance(node, ast.ImportFrom) and node.level:
            raise AssertionError(f"{path}: relative import")


def test_arrows(root):
    for path in (root / "bytelm").rglob("*.py"):
        parts = path.relative_to(root / "bytelm").with_suffix("").parts
        room = parts[0]
        if room in ("cli", "cli_eval", "cli_compress", "cli_model", "cli_sample", "cli_data", "__init__"):
            continue
        for target in imports_of(path):
            allowed = ARROWS[room] | ANY | {room}
            assert any(target == a or target.startswith(a + ".") for a in allowed), (
                f"{'.'.join(parts)} imports {target}"
            )


def test_data_does_not_import_jax(root):
    for path in (root / "bytelm" / "data").glob("*.py"):
        tree = ast.parse(path.read_text())
        names = [a.name for n in ast.walk(tree) if isinstance(n, ast.Import) for a in n.names]
        names += [n.module or "" for n in ast.walk(tree) if isinstance(n, ast.ImportFrom)]
        assert not [n for n in names if n.split(".")[0] in ("jax", "flax", "optax", "orbax")], path


def test_help_and_the_bare_package_need_no_jax(root):
    code = "import sys, bytelm.cli; bytelm.cli.run(['--help']); assert 'jax' not in sys.modules, 'jax was imported'"
    subprocess.run([sys.executable, "-c", code], check=True, cwd=root, capture_output=True)


def test_files_stay_readable(root):
    for path in (root / "bytelm").rglob("*.py"):
        assert len(path.read_text().splitlines()) <= 400, path
        assert path.stem not in ("utils", "helpers", "common")


def test_scripts_are_python(root):
    """Commands without an ending, which linters pass over, can be read."""
    found = [p for folder in ("benchmarks", "scripts") for p in (root / folder).iterdir() if p.is_file()]
    python = [p for p in found if p.read_text().startswith("#!/usr/bin/env python3")]
    assert len(python) > 8
    for path in python:
        compile(path.read_text(), str(path), "exec")
