"""Patches by entropy for training text: found once for all of it and kept on disk, one byte beside each byte.

A place's entropy depends on a bounded stretch of text before it (`EntropyConfig.reach`), so a document is read in rows
that begin so much earlier than what is kept of them: the same patches as in one pass over the whole document, and as
the network finds when it decodes (`models/patcher.py`).
"""

import dataclasses
import hashlib
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
    return config.model.patcher, load_parts(config, abstract, {})["patcher"]


def stored(corpus: Corpus, rule: EntropyConfig, params: Params, cache_dir: str, note: Callable[[str], None]) -> Path:
    """The file of a corpus's patches; made where it does not exist yet."""
    identity = hashlib.sha256(repr((corpus_identity(corpus), dataclasses.asdict(rule))).encode())
    for leaf in jax.tree.leaves(params):
        identity.update(np.ascontiguousarray(leaf).tobytes())
    path = cache_folder(cache_dir) / "patches" / f"{identity.hexdigest()[:24]}.npy"
    if path.exists():
        return path
    note(f"finding the patches of {corpus.describe()}, once; kept in {path}")
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_suffix(f".{np.random.SeedSequence().entropy}.tmp")
    try:
        marks = np.lib.format.open_memmap(temporary, mode="w+", dtype=np.uint8, shape=(corpus.total_bytes,))
        starts = np.cumsum(corpus.lengths) - corpus.lengths
        cut, said = Cut(rule), time.monotonic()
        for document, begin, entropy in entropies(corpus, rule, params):
            first = int(starts[document]) + begin
            marks[first : first + len(entropy) - 1] = cut(begin, entropy)
            if time.monotonic() - said > 30:
                said = time.monotonic()
                note(f"patches: {first / corpus.total_bytes:.0%} of the text")
        marks.flush()
        temporary.replace(path)
    except OSError as e:
        raise ConfigError(
            f"{path}: cannot be written: {e}; name another data.cache_dir, or set data.marks=step"
        ) from None
    finally:
        temporary.unlink(missing_ok=True)
    return path


@partial(jax.jit, static_argnames="graph")
def _row_entropies(graph, params, rows):
    return nnx.merge(graph, params).entropies(rows)


def entropies(corpus: Corpus, rule: EntropyConfig, params: Params) -> Iterator[Stretch]:
    """The entropies of all documents, in order."""
    graph, _ = nnx.split(nnx.eval_shape(lambda: Patcher(rule, rngs=nnx.Rngs(0))), nnx.Param)
    before = rule.reach + 1
    step = max(2 * before, 1024)
    width = before + 1 + step
    count = max(ROWS_BYTES // width, 1)
    here = make_mesh(MeshConfig(data=1), jax.local_devices()[:1])  # each process finds them for itself
    waiting: list[tuple[int, int, int, NDArray[np.int32]]] = []

    def flush() -> Iterator[Stretch]:
        rows = np.zeros((count, width), np.int32)
        for row, (_, _, _, ids) in zip(rows, waiting):
            row[: len(ids)] = ids
        with jax.set_mesh(here):
            found = np.asarray(_row_entropies(graph, params, rows))
        for line, (document, begin, kept, ids) in zip(found, waiting):
            yield document, begin, line[len(ids) - kept - 1 : len(ids)]
        waiting.clear()

    for document, size in enumerate(corpus.lengths.tolist()):
        for begin in range(0, size, step):
            end, first = min(begin + step, size), max(begin - before, 0)
            ids = np.frombuffer(corpus.read(document, first, end), np.uint8).astype(np.int32)
            if first == 0:
                ids = np.concatenate([[np.int32(FLAT_IDS.start)], ids])
            waiting.append((document, begin, end - begin, ids))
            if len(waiting) == count:
                yield from flush()
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


def choose(rule: EntropyConfig, size: float, found: list[NDArray[np.float32]]) -> EntropyConfig:
    """The rule with the threshold (for `rise`: the rise) that gives patches of `size` bytes on average, over the
    entropies of some stretches, each with that of the place before it. Raises ConfigError where none does."""
    now = np.concatenate([entropy[1:] for entropy in found])
    rising = np.concatenate([np.diff(entropy) for entropy in found])
    score = rising if rule.rule == "rise" else now
    if rule.rule == "both":
        score = np.where(rising > rule.rise, now, -np.inf)
    wanted = round(len(now) / size)
    order = np.sort(score)[::-1]
    if not 0 < wanted < len(order) or not np.isfinite(order[wanted]):
        most = len(order) / max(int(np.isfinite(order).sum()), 1)
        raise ConfigError(f"--size {size:g}: this rule makes patches of {most:.2f} to {len(order):,} bytes here")
    at = float(f"{(float(order[wanted - 1]) + float(order[wanted])) / 2:.7g}")
    return dataclasses.replace(rule, rise=at) if rule.rule == "rise" else dataclasses.replace(rule, threshold=at)


def patch_lengths(rule: EntropyConfig, found: list[Stretch]) -> NDArray[np.int64]:
    """Bytes of each patch of some stretches of documents, in order; the last of a document is left out."""
    cut, lengths, since = Cut(rule), [], 0
    for _, begin, entropy in found:
        at = np.flatnonzero(cut(begin, entropy)) + begin
        if begin == 0:
            since = 0
        lengths.append(np.diff(at, prepend=since - 1))
        since = int(at[-1]) + 1 if len(at) else since
    return np.concatenate(lengths) if lengths else np.zeros(0, np.int64)
