"""Documents of all lengths, some of them twice."""

import gzip

import pytest
from prepare_helpers import jsonl, write_parquet


@pytest.fixture
def many(tmp_path):
    """400 documents in several files, every fourth twice."""
    (tmp_path / "a.jsonl").write_bytes(jsonl(*(f"document {i} " * (i % 7 + 1) for i in range(200))))
    (tmp_path / "b.jsonl.gz").write_bytes(
        gzip.compress(jsonl(*(f"document {i} " * (i % 7 + 1) for i in range(0, 800, 4))))
    )
    write_parquet(tmp_path / "c.parquet", [f"row {i}" for i in range(50)], rows=7)
    return [f"{tmp_path}/a.jsonl", f"{tmp_path}/b.jsonl.gz", f"{tmp_path}/c.parquet"]
