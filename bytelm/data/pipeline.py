"""Grain pipeline: records -> shuffle -> virtual streams -> packing -> batches.

The corpus is cut into `data.shards` virtual streams; row r of every batch comes from stream r mod shards. Worker
processes only divide the streams among them, and every row carries its stream's state after it, so batches and resume
do not depend on how many workers there are.
"""

import contextlib
import json
import multiprocessing.connection
import os
import threading
from collections.abc import Iterator
from typing import Any

import grain
import numpy as np
from absl import flags
from numpy.typing import NDArray

from bytelm.config import ConfigError, DataConfig
from bytelm.data.functional import cut_pieces, document_piece
from bytelm.data.sources import Corpus, DataError, open_corpus, split_validation
from bytelm.vocab import ByteIds, ReservedByteError

Batch = dict[str, NDArray[np.int32]]  # inputs, targets, segments: each [b, t]; segment 0 is padding


class Pieces:
    """Random-access source of document pieces: record i is {"pair": int32 [n, 2]} (inputs, targets)."""

    def __init__(self, corpus: Corpus, piece: int, ids: ByteIds):
        self.corpus, self.piece, self.ids = corpus, piece, ids
        self.document, self.start = cut_pieces(corpus.lengths, piece)

    def __len__(self) -> int:
        return len(self.document)

    def __getitem__(self, index: int) -> dict[str, NDArray[np.int32]]:
        document, start = int(self.document[index]), int(self.start[index])
        data = self.corpus.read(document, max(start - 1, 0), start + self.piece)
        before = data[0] if start > 0 else None
        last = start + self.piece > int(self.corpus.lengths[document])
        body = data[1:] if start > 0 else data
        try:
            return {"pair": document_piece(body, before, last, self.ids)}
        except ReservedByteError as e:
            path = self.corpus.paths[int(self.corpus.file[document])]
            at = int(self.corpus.start[document]) + start
            raise DataError(f"{path}: the stretch at offset {at}: {e} (data.reserved)") from None


def load_text(config: DataConfig) -> tuple[list[Corpus], Corpus]:
    """Training sources (one, or one per weight) and the held-out corpus. Raises ConfigError or DataError."""
    options = {"text_field": config.text_field, "cache_dir": config.cache_dir}
    groups = [(entry,) for entry in config.train] if config.weights else [config.train]
    sources = [open_corpus(group, **options) for group in groups]
    if config.valid:
        return sources, open_corpus(config.valid, **options, where="data.valid")
    if len(sources) > 1:
        raise ConfigError("data.weights mixes several sources: name the held-out text in data.valid")
    train, valid = split_validation(sources[0], config.valid_fraction)
    if len(train) == 0:
        raise ConfigError(f"data.valid_fraction={config.valid_fraction} leaves no training text")
    return [train], valid


def _piece(config: DataConfig) -> int:
    """Positions of a document that are shuffled as one; best_fit cannot pack more than a row."""
    return config.seq_len if config.packing == "best_fit" else config.piece_length


def records(sources: list[Corpus], config: DataConfig, ids: ByteIds, seed: int) -> grain.MapDataset:
    """The endless, shuffled, mixed sequence of pieces. Weights count pieces, not bytes."""
    piece = _piece(config)

    def one(corpus: Corpus, index: int) -> grain.MapDataset:
        dataset = grain.MapDataset.source(Pieces(corpus, piece, ids)).seed(seed + index)
        return (dataset.shuffle() if config.shuffle else dataset).repeat(None)

    datasets = [one(corpus, i) for i, corpus in enumerate(sources)]
    if len(datasets) == 1:
        return datasets[0]
    return grain.MapDataset.mix(datasets, weights=[float(w) for w in config.weights])


class StreamRows(grain.IterDataset):
    """Packed rows of some virtual streams, in turn; stream s reads records s, s + shards, s + 2 shards, ...

    Elements are {"pair": [t, 2], "segments": [t], "stream": s, "state": JSON of the stream after this row}.
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
        length = {"pair": self.config.seq_len}
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
            threading.Thread(target=_exit_with, args=(parent.sentinel,), daemon=True).start()
        return _StreamRowsIterator({stream: self._open(stream) for stream in self.streams})


def _exit_with(sentinel: int) -> None:
    multiprocessing.connection.wait([sentinel])
    os._exit(1)


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
            "pair": row["pair"],
            "segments": row["pair_segment_ids"],
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
    """Endless batches {"inputs", "targets", "segments"}: int32 [b, t]. `state()` is plain JSON and resumes exactly."""

    def __init__(
        self,
        sources: list[Corpus],
        config: DataConfig,
        ids: ByteIds,
        *,
        seed: int,
        state: dict[str, Any] | None = None,
        process: int = 0,
        processes: int = 1,
    ):
        """With several processes, process p yields its contiguous share of each batch's rows.

        Raises ConfigError when the state was saved with another number of streams or the rows do not divide.
        """
        shards = config.streams
        if ids.replace and config.packing == "best_fit":
            raise ConfigError(
                "data.reserved=replace makes documents longer, which data.packing=best_fit cannot have: use concat, or "
                "clean the text first"
            )
        if processes > 1 and (shards != config.batch_size or shards % processes):
            raise ConfigError(
                f"data.shards={shards} with {processes} processes: each process must own whole rows and streams; "
                f"set data.shards=0 and a data.batch_size that {processes} divides"
            )
        if state is not None and len(state["streams"]) != shards:
            raise ConfigError(f"data.shards={shards}, but the saved data position has {len(state['streams'])} streams")
        self._text = [[len(corpus), corpus.total_bytes] for corpus in sources]
        if state is not None and state["text"] != self._text:
            raise ConfigError(
                f"the training text has changed since the checkpoint: (documents, bytes) was {state['text']}, "
                f"is {self._text}; its data position does not fit"
            )
        self._packing = [config.packing, config.seq_len, _piece(config), config.packing_bins, config.shuffle, seed]
        if state is not None and state["packing"] != self._packing:
            raise ConfigError(
                "data.packing, seq_len, piece_bytes, packing_bins, shuffle or train.seed have changed since the "
                f"checkpoint ({state['packing']} -> {self._packing}): its data position does not fit; set them back, "
                "or start a new run from its weights with train.init_from"
            )
        saved = state["streams"] if state else [None] * shards
        share = shards // processes
        self._states = dict(enumerate(saved))
        mine = list(range(process * share, (process + 1) * share))
        rows = StreamRows(records(sources, config, ids, seed), config, mine, dict(self._states))
        self._rows = _start(rows, config)
        self._count, self._workers = config.batch_size // processes, config.workers

    def __iter__(self) -> Iterator[Batch]:
        return self

    def __next__(self) -> Batch:
        try:
            rows = [next(self._rows) for _ in range(self._count)]
        except DataError:
            raise
        except Exception as e:  # grain wraps what a worker raised, and says in its own ways that one died
            raise DataError(f"the data pipeline failed (data.workers={self._workers}): {e}") from e
        for row in rows:
            self._states[int(row["stream"])] = row["state"]
        pairs = np.stack([row["pair"] for row in rows])
        segments = np.stack([row["segments"] for row in rows]).astype(np.int32)
        return {
            "inputs": np.ascontiguousarray(pairs[..., 0]),
            "targets": np.ascontiguousarray(pairs[..., 1]),
            "segments": segments,
        }

    def state(self) -> dict[str, Any]:
        """Where each stream stands after the last batch."""
        decoded = [self._states[s] for s in sorted(self._states)]
        return {
            "text": self._text,
            "packing": self._packing,
            "streams": [json.loads(s) if isinstance(s, str) else s for s in decoded],
        }

    def close(self) -> None:
        """Ends the worker processes."""
        self._rows.close()


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
