"""Copies H-Net parity cases into tests/golden, keeping of io.safetensors only what `bytelm parity` reads.

usage: python scripts/trim_golden.py FOLDER_OF_CASES
"""

import re
import shutil
import sys
from pathlib import Path

from safetensors.numpy import load_file, save_file

TARGET = Path(__file__).resolve().parent.parent / "tests" / "golden"
KEEP = re.compile(r"input_ids|mask|logits|step\.logits|stage\d\.padded\..*|loss\..*|grad\..*")


def main(source: Path) -> None:
    for case in ("one_stage", "two_stage", "window", "batch3_ragged"):
        folder = TARGET / f"hnet_{case}"
        folder.mkdir(exist_ok=True)
        io = load_file(source / case / "io.safetensors")
        save_file({name: x for name, x in io.items() if KEEP.fullmatch(name)}, folder / "io.safetensors")
        for name in ("config.json", "weights.safetensors"):
            shutil.copyfile(source / case / name, folder / name)


if __name__ == "__main__":
    main(Path(sys.argv[1]))
