"""Grain pipeline: records -> shuffle -> virtual streams -> packing -> batches.

The corpus is cut into `data.shards` virtual streams; row r of every batch comes from stream r mod shards. Worker
processes only divide the streams among them, and every row carries its stream's state after it, so batches and resume
do not depend on how many workers there are.
"""

import contextlib
import hashlib
import json
import multiprocessing
import os
import threading
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import grain
import numpy as np
from absl import flags
from numpy.typing import NDArray

from bytelm.config import ConfigError, DataConfig
from bytelm.data.corpus import Corpus, PreparedCorpus, concatenate
from bytelm.data.functional import count_pieces, document_piece, locate_piece
from bytelm.data.jobs import exit_with
from bytelm.data.prepared import is_prepared, mapped_table
from bytelm.data.readers import DataError
from bytelm.data.sources import cache_folder, open_corpus, split_validation
from bytelm.vocab import ByteIds, ReservedByteError

# inputs, targets, segments (0 is padding), pieces (which piece of the text a position is of): each [b, t]
Batch = dict[str, NDArray[np.int32]]


class PipelineError(DataError):
    """The reading itself failed, most likely a worker process that died."""


class Pieces:
    """Random-access source of document pieces: item i is {"columns": int32 [n, 3]}: inputs, targets, `first` + i.

    The third column stays with the positions through packing, so that a batch can say where it came from.
    """

    def __init__(self, corpus: Corpus, piece: int, ids: ByteIds, first: int = 0, cache_dir: str = ""):
        self._arguments = (corpus, piece, ids, first, cache_dir)
        self.corpus, self.piece, self.ids, self.first = corpus, piece, ids, first
        self.ends = _piece_ends(corpus, piece, cache_dir)
        if first + len(self) > np.iinfo(np.int32).max:
            raise ConfigError(f"the training text makes over 2^31 pieces of {piece:,} bytes: raise data.piece_bytes")

    def __reduce__(self):  # tables do not travel to worker processes
        return Pieces, self._arguments

    def __len__(self) -> int:
        return int(self.ends[-1])

    def where(self, index: int) -> str:
        """File and bytes of an item, for messages."""
        document, start = locate_piece(self.ends, index, self.piece)
        size = int(self.corpus.stop[document] - self.corpus.start[document])
        name, offset = self.corpus.place(document)
        return f"{name}[{offset + start}:{offset + min(start + self.piece, size)}]"

    def __getitem__(self, index: int) -> dict[str, NDArray[np.int32]]:
        document, start = locate_piece(self.ends, index, self.piece)
        data = self.corpus.read(document, max(start - 1, 0), start + self.piece)
        before = data[0] if start > 0 else None
        last = start + self.piece > int(self.corpus.lengths[document])
        body = data[1:] if start > 0 else data
        try:
            pair = document_piece(body, before, last, self.ids)
        except ReservedByteError as e:
            raise DataError(f"{self.where(index)}: {e} (data.reserved)") from None
        return {"columns": np.column_stack([pair, np.full(len(pair), self.first + index, np.int32)])}


def _piece_ends(corpus: Corpus, piece: int, cache_dir: str) -> NDArray[np.int64]:
    """Where the pieces of each document end, numbered through. That of a prepared corpus is kept on disk."""
    if not isinstance(corpus, PreparedCorpus):
        return np.cumsum(count_pieces(corpus.lengths, piece))

    def fill(table: NDArray[np.int64]) -> None:
        before, some = 0, 1 << 20
        for i in range(0, len(table), some):
            table[i : i + some] = before + np.cumsum(
                count_pieces(corpus.stop[i : i + some] - corpus.start[i : i + some], piece)
            )
            before = int(table[min(i + some, len(table)) - 1])

    name = hashlib.sha256(f"{corpus.described['sha256']} {piece}".encode()).hexdigest()[:16]
    return mapped_table(cache_folder(cache_dir) / "pieces" / f"{name}.npy", len(corpus), fill)


def load_text(config: DataConfig) -> tuple[list[Corpus], Corpus]:
    """Training sources (one, or one per weight) and the held-out corpus. Raises ConfigError or DataError."""
    options = {"text_field": config.text_field, "cache_dir": config.cache_dir}
    groups = [(entry,) for entry in config.train] if config.weights else [config.train]
    if config.valid:
        sources = [open_corpus(group, **options) for group in groups]
        return sources, open_corpus(config.valid, **options, where="data.valid")
    prepared = [entry for entry in config.train if is_prepared(Path(entry).expanduser())]  # each brings its own
    plain = tuple(entry for entry in config.train if entry not in prepared)
    if config.weights and plain and len(config.train) > 1:
        raise ConfigError("data.weights mixes several sources: name the held-out text in data.valid")
    train: list[Corpus] = [PreparedCorpus(Path(entry).expanduser(), "train") for entry in prepared]
    valid: list[Corpus] = [PreparedCorpus(Path(entry).expanduser(), "valid") for entry in prepared]
    if plain:
        kept, held = split_validation(open_corpus(plain, **options), config.valid_fraction)
        if len(kept) == 0:
            raise ConfigError(f"data.valid_fraction={config.valid_fraction} leaves no training text")
        train, valid = [*train, kept], [*valid, held]
    return (train if config.weights else [concatenate(train)]), concatenate(valid)


def _piece(config: DataConfig) -> int:
    """Positions of a document that are shuffled as one; best_fit cannot pack more than a row."""
    return config.seq_len if config.packing == "best_fit" else config.piece_length


def cut(sources: list[Corpus], config: DataConfig, ids: ByteIds) -> list[Pieces]:
    """The pieces of each source, numbered through."""
    pieces: list[Pieces] = []
    for corpus in sources:
        pieces.append(Pieces(corpus, _piece(config), ids, sum(map(len, pieces)), config.cache_dir))
    return pieces


def records(pieces: list[Pieces], config: DataConfig, seed: int) -> grain.MapDataset:
    """The endless, shuffled, mixed sequence of pieces. Weights count pieces, not bytes."""

    def one(source: Pieces, index: int) -> grain.MapDataset:
        dataset = grain.MapDataset.source(source).seed(seed + index)
        return (dataset.shuffle() if config.shuffle else dataset).repeat(None)

    datasets = [one(source, i) for i, source in enumerate(pieces)]
    if len(datasets) == 1:
        return datasets[0]
    return grain.MapDataset.mix(datasets, weights=[float(w) for w in config.weights])


class StreamRows(grain.IterDataset):
    """Packed rows of some virtual streams, in turn; stream s reads records s, s + shards, s + 2 shards, ...

    Elements are {"columns": [t, 3], "segments": [t], "stream": s, "state": JSON of the stream after this row}.
    """

    def __init__(self, source: grain.MapDataset, config: DataConfig, streams: list[int], states: dict[int, Any]):
        super().__init__()
        self.source, self.config, self.streams, self.states = source, config, streams, states

    def set_slice(self, sl: slice, sequential_slice: bool = False) -> None:
        """Grain's hook for worker processes: worker i of n takes every n-th stream."""
        self.streams = self.streams[sl]

    def _open(self, stream: int) -> grain.DatasetIterator:
        dataset = self.source[stream :: self.config.streams].to_iter_dataset(
            grain.ReadOptions(num_threads=0, prefetch_buffer_size=0)
        )
        length = {"columns": self.config.seq_len}
        if self.config.packing == "best_fit":
            dataset = grain.experimental.BestFitPackIterDataset(
                dataset, length_struct=length, num_packing_bins=self.config.packing_bins
            )
        else:
            dataset = grain.experimental.ConcatThenSplitIterDataset(dataset, length_struct=length)
        iterator = iter(dataset)
        if self.states.get(stream) is not None:
            iterator.set_state(_from_json(self.states[stream]))
        return iterator

    def __iter__(self) -> "_StreamRowsIterator":
        parent = multiprocessing.parent_process()
        if parent is not None:  # a worker ends with the training process, even if that is killed
            threading.Thread(target=exit_with, args=(parent.sentinel,), daemon=True).start()
        return _StreamRowsIterator({stream: self._open(stream) for stream in self.streams})


def _from_json(state: dict[str, Any]) -> dict[str, Any]:
    """A packer's state as it was before JSON made lists of its tuples: grain 0.2.18 compares them with `(-1, -1)` to
    see whether a piece was cut, and would resume one piece too far."""
    slices = state.get("remainder_slices")
    return state if slices is None else {**state, "remainder_slices": {k: tuple(v) for k, v in slices.items()}}


class _StreamRowsIterator(grain.DatasetIterator):
    def __init__(self, iterators: dict[int, grain.DatasetIterator]):
        super().__init__()
        self._iterators = list(iterators.items())
        self._turn = 0

    def __next__(self) -> dict[str, Any]:
        stream, iterator = self._iterators[self._turn]
        self._turn = (self._turn + 1) % len(self._iterators)
        row = next(iterator)
        return {
            "columns": row["columns"],
            "segments": row["columns_segment_ids"],
            "stream": stream,
            "state": json.dumps(iterator.get_state()),
        }

    def get_state(self) -> dict[str, Any]:
        return {"turn": self._turn, "streams": [iterator.get_state() for _, iterator in self._iterators]}

    def set_state(self, state: dict[str, Any]) -> None:
        self._turn = state["turn"]
        for (_, iterator), saved in zip(self._iterators, state["streams"]):
            iterator.set_state(saved)


class Batches:
    """Endless batches of int32 [b, t]. `state()` is plain JSON and resumes exactly."""

    def __init__(
        self,
        sources: list[Corpus],
        config: DataConfig,
        ids: ByteIds,
        *,
        seed: int,
        state: dict[str, Any] | None = None,
        rows: Sequence[int] | None = None,
    ):
        """`rows`: which rows of each batch to yield, in this order (several processes share them); None = all.

        Raises ConfigError when the state was saved with another number of streams or the rows split a stream.
        """
        shards = config.streams
        if ids.replace and config.packing == "best_fit":
            raise ConfigError(
                "data.reserved=replace makes documents longer, which data.packing=best_fit cannot have: use concat, or "
                "clean the text first"
            )
        rows = range(config.batch_size) if rows is None else rows
        mine = list(dict.fromkeys(row % shards for row in rows))
        whole = len(rows) * shards == len(mine) * config.batch_size
        if not rows or not whole or any(row % shards != mine[i % len(mine)] for i, row in enumerate(rows)):
            raise ConfigError(
                f"data.shards={shards} with several processes: each must own whole rows and streams, this one has rows "
                f"{list(rows)}; set data.shards=0 and a data.batch_size that the number of processes divides"
            )
        if config.workers and len(mine) % config.workers:
            raise ConfigError(f"data.workers={config.workers} does not divide the {len(mine)} streams of this process")
        if state is not None and len(state["streams"]) != shards:
            raise ConfigError(f"data.shards={shards}, but the saved data position has {len(state['streams'])} streams")
        self._text = [[len(corpus), corpus.total_bytes, *corpus.identities()] for corpus in sources]
        if state is not None and state["text"] != self._text:
            raise ConfigError(
                f"the training text has changed since the checkpoint: documents, bytes, hashes were {state['text']}, "
                f"are {self._text}; its data position does not fit"
            )
        self._packing = [config.packing, config.seq_len, _piece(config), config.packing_bins, config.shuffle, seed]
        if state is not None and state["packing"] != self._packing:
            raise ConfigError(
                "data.packing, seq_len, piece_bytes, packing_bins, shuffle or train.seed have changed since the "
                f"checkpoint ({state['packing']} -> {self._packing}): its data position does not fit; set them back, "
                "or start a new run from its weights with train.init_from"
            )
        saved = state["streams"] if state else [None] * shards
        self._states = {stream: saved[stream] for stream in mine}
        self._pieces = cut(sources, config, ids)
        self._rows = _start(StreamRows(records(self._pieces, config, seed), config, mine, dict(self._states)), config)
        self._count, self._workers = len(rows), config.workers

    def __iter__(self) -> Iterator[Batch]:
        return self

    def __next__(self) -> Batch:
        try:
            rows = [next(self._rows) for _ in range(self._count)]
        except DataError:
            raise
        except Exception as e:  # grain wraps what a worker raised, and says in its own ways that one died
            raise PipelineError(f"the data pipeline failed (data.workers={self._workers}): {e}") from e
        for row in rows:
            self._states[int(row["stream"])] = row["state"]
        columns = np.stack([row["columns"] for row in rows])
        names = ("inputs", "targets", "pieces")
        batch = {name: np.ascontiguousarray(columns[..., i]) for i, name in enumerate(names)}
        return {**batch, "segments": np.stack([row["segments"] for row in rows]).astype(np.int32)}

    def where(self, batch: Batch) -> list[str]:
        """The stretches of files that a batch was made of, as FILE[a:b], in order."""
        found = np.unique(batch["pieces"][batch["segments"] > 0])
        firsts = [pieces.first for pieces in self._pieces]
        owners = np.searchsorted(firsts, found, side="right") - 1
        return [self._pieces[owner].where(int(index) - firsts[owner]) for owner, index in zip(owners, found)]

    def state(self) -> dict[str, Any]:
        """Where each stream stands after the last batch; of rows shared among processes, see `join_states`."""
        streams = {s: json.loads(state) if isinstance(state, str) else state for s, state in self._states.items()}
        return {"text": self._text, "packing": self._packing, "streams": [streams[s] for s in sorted(streams)],
                "mine": sorted(streams)}  # fmt: skip

    def close(self) -> None:
        """Ends the worker processes."""
        self._rows.close()


def join_states(states: list[dict[str, Any]]) -> dict[str, Any]:
    """The state of all streams from those of the processes that share them."""
    streams = {s: stream for state in states for s, stream in zip(state["mine"], state["streams"])}
    return {**states[0], "streams": [streams[s] for s in sorted(streams)], "mine": sorted(streams)}


def _start(rows: StreamRows, config: DataConfig) -> grain.DatasetIterator:
    if not config.workers:
        return iter(rows)
    if not flags.FLAGS.is_parsed():  # grain's workers read absl flags
        flags.FLAGS.mark_as_parsed()
    options = grain.MultiprocessingOptions(num_workers=config.workers, per_worker_buffer_size=config.prefetch)
    with _environment(JAX_PLATFORMS="cpu"):  # a worker must not take the accelerator
        iterator = iter(rows.mp_prefetch(options))
        iterator.start_prefetch()
    return iterator


@contextlib.contextmanager
def _environment(**variables: str):
    before = {name: os.environ.get(name) for name in variables}
    os.environ.update(variables)
    try:
        yield
    finally:
        for name, value in before.items():
            os.environ.pop(name) if value is None else os.environ.__setitem__(name, value)
