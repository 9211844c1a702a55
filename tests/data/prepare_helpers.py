"""What the tests of `bytelm prepare` share."""

import dataclasses
import hashlib
import json
import os
import subprocess
import sys

from array_record.python import array_record_module

from bytelm.data.corpus import PreparedCorpus
from bytelm.data.units import PrepareOptions

HERE = PrepareOptions(workers=0, valid_fraction=0.0)  # in this process, all of it training text
SKIP = dataclasses.replace(HERE, on_error="skip")


def texts(corpus):
    return [corpus.read(i) for i in range(len(corpus))]


def prepared(folder, split="train"):
    return texts(PreparedCorpus(folder, split))


def jsonl(*documents):
    return "".join(json.dumps({"text": d}) + "\n" for d in documents).encode()


def errors(folder):
    lines = (folder / "errors.jsonl").read_text().splitlines()
    return [(os.path.basename(e["file"]), e["index"], e["reason"]) for e in map(json.loads, lines)]


def write_parquet(path, documents, rows=3, column="text"):
    import pyarrow
    import pyarrow.parquet

    pyarrow.parquet.write_table(pyarrow.table({column: documents, "other": list(range(len(documents)))}), path,
                                row_group_size=rows)  # fmt: skip


def write_records(path, records):
    writer = array_record_module.ArrayRecordWriter(str(path), "group_size:1")
    for record in records:
        writer.write(record)
    writer.close()


def files_of(folder):
    return {p.name: hashlib.sha256(p.read_bytes()).hexdigest() for p in sorted(folder.iterdir()) if p.is_file()}


def command(root, out, inputs, *options):
    env = {**os.environ, "PYTHONPATH": str(root)}
    return subprocess.Popen([sys.executable, "-m", "bytelm.cli", "prepare", str(out), *inputs, *options], env=env,
                            stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)  # fmt: skip
