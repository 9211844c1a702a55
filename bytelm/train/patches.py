"""Patches by entropy for training text: found once for all of it and kept on disk, one byte beside each byte.

A place's entropy depends on a bounded stretch of text before it (`EntropyConfig.reach`), so a document is read in rows
that begin so much earlier than what is kept of them: the same patches as in one pass over the whole document, and as
the network finds when it decodes (`models/patcher.py`).
"""

import dataclasses
import fcntl
import hashlib
import math
import os
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path

import jax
import numpy as np
from flax import nnx
from jax.sharding import NamedSharding
from numpy.typing import NDArray

from bytelm.config import BLTConfig, Config, ConfigError, EntropyConfig, MeshConfig, TrainConfig
from bytelm.data.corpus import Corpus
from bytelm.data.marks import Marks, StoredMarks, WordMarks, corpus_identity
from bytelm.data.readers import DataError
from bytelm.data.sources import cache_folder
from bytelm.models.build import Params, entropy_rule, is_marked, structure, word_rule
from bytelm.models.patcher import Patcher
from bytelm.parallel.mesh import make_mesh
from bytelm.train.init import load_parts, with_parts
from bytelm.vocab import FLAT_IDS

ROWS_BYTES = 1 << 15  # positions that go through the model at once
# A document, where in it a stretch begins, and the entropies, in nats, of what follows the place before that and each
# byte of the stretch. The place before a document is its start symbol.
Stretch = tuple[int, int, NDArray[np.float32]]


def text_marks(
    config: Config, sources: list[Corpus], params: Params, replicated: NamedSharding, note: Callable[[str], None]
) -> list[Marks]:
    """The marks of each training source, for a model that needs some; else nothing."""
    if not is_marked(config.model, config.data):
        return []
    words, rule = word_rule(config.model), entropy_rule(config.model)
    if words is not None:
        return [WordMarks(corpus, words) for corpus in sources]
    assert rule is not None
    whole = jax.jit(lambda p: p, out_shardings=replicated)(params["patcher"])  # parts may lie with other processes
    own = jax.tree.map(lambda x: np.asarray(x, np.float32), whole)
    return [StoredMarks(corpus, stored(corpus, rule, own, config.data.cache_dir, note)) for corpus in sources]


def load_patcher(source: str, rule: EntropyConfig) -> tuple[EntropyConfig, Params]:
    """The rule with the model of a run or weights directory, and that model's weights."""
    config = with_parts(Config(model=BLTConfig(patcher=rule), train=TrainConfig(patcher=source)))
    assert isinstance(config.model, BLTConfig)
    here = jax.sharding.SingleDeviceSharding(jax.local_devices()[0])
    place = lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=here)  # noqa: E731
    abstract = jax.tree.map(place, structure(config.model)[1])
    return config.model.patcher, load_parts(config, abstract, {}, ())[0]["patcher"]


def stored(corpus: Corpus, rule: EntropyConfig, params: Params, cache_dir: str, note: Callable[[str], None]) -> Path:
    """The file of a corpus's patches; made where it does not exist yet."""
    identity = hashlib.sha256(repr((corpus_identity(corpus), dataclasses.asdict(rule))).encode())
    for leaf in jax.tree.leaves(params):
        identity.update(np.ascontiguousarray(leaf).tobytes())
    path = cache_folder(cache_dir) / "patches" / f"{identity.hexdigest()[:24]}.marks"
    if path.exists():
        return path
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with open(path.with_suffix(".lock"), "w") as lock:  # several processes want it: one makes it
            fcntl.flock(lock, fcntl.LOCK_EX)
            if not path.exists():
                note(f"finding the patches of {corpus.describe()}, once; kept in {path}")
                _write(path, corpus, rule, params, note)
    except OSError as e:
        raise ConfigError(
            f"{path}: cannot be written: {e}; name another data.cache_dir, or set data.marks=step"
        ) from None
    return path


def _write(path: Path, corpus: Corpus, rule: EntropyConfig, params: Params, note: Callable[[str], None]) -> None:
    """Whether a patch begins behind each byte, byte by byte; what a process that was killed left is written over."""
    cut, done, said = Cut(rule), 0, time.monotonic()
    temporary = path.with_suffix(".tmp")
    with open(temporary, "wb") as file:
        for _, begin, entropy in entropies(corpus, rule, params):
            file.write(cut(begin, entropy).astype(np.uint8).tobytes())
            done += len(entropy) - 1
            if time.monotonic() - said > 30:
                said = time.monotonic()
                note(f"patches: {done / corpus.total_bytes:.0%} of the text")
        file.flush()
        os.fsync(file.fileno())
    temporary.replace(path)


@partial(jax.jit, static_argnames="graph")
def _row_entropies(graph, params, rows, segments):
    return nnx.merge(graph, params).entropies(rows, segments)


def entropies(corpus: Corpus, rule: EntropyConfig, params: Params) -> Iterator[Stretch]:
    """The entropies of all documents, in order. Stretches of several short ones share a row."""
    graph, _ = nnx.split(nnx.eval_shape(lambda: Patcher(rule, rngs=nnx.Rngs(0))), nnx.Param)
    before = rule.reach + 1
    step = max(2 * before, 1024)
    width = before + 1 + step
    count = max(ROWS_BYTES // width, 1)
    here = make_mesh(MeshConfig(data=1), jax.local_devices()[:1])  # each process finds them for itself
    rows, segments = (np.zeros((count, width), np.int32) for _ in range(2))
    waiting: list[tuple[int, int, int, int, int]] = []  # document, begin, bytes kept; row, and where in it they end

    def flush() -> Iterator[Stretch]:
        with jax.set_mesh(here):
            found = np.asarray(_row_entropies(graph, params, rows, segments))
        for document, begin, kept, row, end in waiting:
            yield document, begin, found[row, end - kept - 1 : end]
        waiting.clear()
        rows.fill(0)
        segments.fill(0)

    row = used = 0
    for document, size in enumerate(corpus.lengths.tolist()):
        for begin in range(0, size, step):
            end, first = min(begin + step, size), max(begin - before, 0)
            ids = np.frombuffer(corpus.read(document, first, end), np.uint8).astype(np.int32)
            if first == 0:
                ids = np.concatenate([[np.int32(FLAT_IDS.start)], ids])
            if used + len(ids) > width:
                row, used = row + 1, 0
            if row == count:
                yield from flush()
                row = 0
            place = slice(used, used + len(ids))
            used += len(ids)
            rows[row, place], segments[row, place] = ids, len(waiting) + 1
            waiting.append((document, begin, end - begin, row, used))
    if waiting:
        yield from flush()


def first_entropies(corpus: Corpus, rule: EntropyConfig, params: Params, max_bytes: int) -> list[Stretch]:
    """The entropies of the first documents, up to `max_bytes` bytes or a little more. Raises DataError for no text."""
    out, seen = [], 0
    for stretch in entropies(corpus, rule, params):
        out.append(stretch)
        seen += len(stretch[2]) - 1
        if seen >= max_bytes:
            break
    if not out:
        raise DataError("the text is empty")
    return out


class Cut:
    """Behind which bytes of a document a patch begins, stretch after stretch."""

    def __init__(self, rule: EntropyConfig):
        self.rule, self._length = rule, 0  # bytes of the patch so far

    def __call__(self, begin: int, entropy: NDArray[np.float32]) -> NDArray[np.bool_]:
        """Of the bytes of a stretch, from the entropies of the place before it and of its bytes (float32)."""
        rule, now = self.rule, entropy[1:]
        high, rising = now > np.float32(rule.threshold), now - entropy[:-1] > np.float32(rule.rise)
        fires = {"threshold": high, "rise": rising, "both": high & rising}[rule.rule]
        if not rule.max_patch:
            return fires
        none = -1 - (self._length if begin else 0)  # where the patch so far began, less 1
        place = np.arange(len(now))
        length = place - np.maximum.accumulate(np.concatenate([[none], np.where(fires, place, none)[:-1]]))
        self._length = 0 if fires[-1] else int(length[-1])
        return fires | (length % rule.max_patch == 0)


def choose(rule: EntropyConfig, size: float, found: list[Stretch]) -> EntropyConfig:
    """The rule with the threshold (for `rise`: the rise) that gives patches of `size` bytes on average, cuts by length
    included, over some stretches. Raises ConfigError where none comes within a tenth of that."""
    values = [np.diff(e) if rule.rule == "rise" else e[1:] for *_, e in found]
    values = np.unique(np.concatenate(values))
    between = (values[1:].astype(np.float64) + values[:-1]) / 2  # one threshold between any two neighbours

    def at(i: int) -> EntropyConfig:
        value = float(f"{between[i]:.7g}")
        return (
            dataclasses.replace(rule, rise=value) if rule.rule == "rise" else dataclasses.replace(rule, threshold=value)
        )

    def mean(rule: EntropyConfig) -> float:
        return float(patch_lengths(rule, found).mean())

    low, high = 0, len(between) - 1  # patches get longer with the threshold
    while low < high:
        middle = (low + high) // 2
        low, high = (low, middle) if mean(at(middle)) >= size else (middle + 1, high)
    nearest = min((i for i in (low - 1, low) if 0 <= i < len(between)), default=None,
                  key=lambda i: abs(mean(at(i)) - size))  # fmt: skip
    best = math.nan if nearest is None else mean(at(nearest))
    if nearest is None or not abs(best / size - 1) <= 0.1:
        raise ConfigError(
            f"--size {size:g}: no threshold of this rule gives such patches here (nearest: {best:.2f} bytes)"
        )
    return at(nearest)


def patch_lengths(rule: EntropyConfig, found: list[Stretch]) -> NDArray[np.int64]:
    """Bytes of each patch of some stretches of documents, in order."""
    cut, ends, place = Cut(rule), [0], 0
    for _, begin, entropy in found:
        if begin == 0 and place > ends[-1]:
            ends.append(place)
        ends += (np.flatnonzero(cut(begin, entropy)) + place + 1).tolist()
        place += len(entropy) - 1
    return np.diff(ends if ends[-1] == place else [*ends, place])
