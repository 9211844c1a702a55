"""Copies parity cases into tests/golden, keeping of io.safetensors only what `bytelm parity` reads.

usage: python scripts/trim_golden.py hnet|mrt5 FOLDER_OF_CASES
"""

import re
import shutil
import sys
from pathlib import Path

from safetensors.numpy import load_file, save_file

TARGET = Path(__file__).resolve().parent.parent / "tests" / "golden"
CASES = {
    "hnet": ("one_stage", "two_stage", "window", "batch3_ragged"),
    "mrt5": (
        "byt5_plain",
        "mrt5_soft_softmax1",
        "mrt5_hard_softmax1",
        "mrt5_softmax_both",
        "bp_mean_pool",
        "cp_conv_pool",
    ),
}
KEEP = {
    "hnet": re.compile(r"input_ids|mask|logits|step\.logits|stage\d\.padded\..*|loss\..*|grad\..*"),
    "mrt5": re.compile(
        r"input_ids|attention_mask|labels|loss.*|greedy.*|grad\..*|boundary_logits|.*hard_boundaries.*"
        r"|((soft|hard|hard_thr)\.)?(logits|loss|total_loss|gate_loss|gate_values|keep_mask|positions|kept_per_row|scores_loss_unscaled)"
    ),
}


def main(family: str, source: Path) -> None:
    for case in CASES[family]:
        folder = TARGET / (f"hnet_{case}" if family == "hnet" else f"mrt5/{case}")
        folder.mkdir(parents=True, exist_ok=True)
        io = load_file(source / case / "io.safetensors")
        save_file({name: x for name, x in io.items() if KEEP[family].fullmatch(name)}, folder / "io.safetensors")
        for name in ("config.json", "weights.safetensors", "meta.json"):
            if (source / case / name).exists():
                shutil.copyfile(source / case / name, folder / name)


if __name__ == "__main__":
    main(sys.argv[1], Path(sys.argv[2]))
