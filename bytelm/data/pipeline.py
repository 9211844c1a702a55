"""Grain pipeline: records -> shuffle -> virtual streams -> packing -> batches.

The corpus is cut into `data.shards` virtual streams; row r of every batch comes from stream r mod shards. Worker
processes only divide the streams among them, and every row carries its stream's state after it, so batches and resume
do not depend on how many workers there are.
"""

import contextlib
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
from bytelm.data.jobs import exit_with
from bytelm.data.marks import Marks
from bytelm.data.pieces import Pieces
from bytelm.data.prepared import is_prepared
from bytelm.data.readers import DataError
from bytelm.data.seq2seq import Examples, make_row, target_length, training_examples
from bytelm.data.sources import open_corpus, split_validation
from bytelm.data.tokens import Recut, Recutting, TokenPieces, TokenText
from bytelm.vocab import ByteIds

# inputs, targets, segments (0 is padding), pieces (which piece of the text a position is of): each [b, t]; for
# encoder-decoder models also source [b, s], for models whose units are found before training marks [b, t], for models
# of tokens widths [b, t], the bytes of each target
Batch = dict[str, NDArray[np.int32]]


class PipelineError(DataError):
    """The reading itself failed, most likely a worker process that died."""


def load_text(config: DataConfig) -> tuple[list[Corpus], Corpus]:
    """Training sources (one, or one per weight) and the held-out corpus. Raises ConfigError or DataError."""
    options = {"text_field": config.text_field, "cache_dir": config.cache_dir}
    groups = [(entry,) for entry in config.train] if config.weights else [config.train]
    if config.task == "pairs" and not config.valid:  # whose lines, not bytes, are held out
        sources = [open_corpus(group, **options) for group in groups]
        return sources, concatenate(sources)
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


def cut(sources: list[Corpus], config: DataConfig, ids: ByteIds, marks: Sequence[Marks] = ()) -> list[Pieces]:
    """The pieces of each source, numbered through; with its `marks`, where there are some."""
    pieces: list[Pieces] = []
    for corpus, own in zip(sources, marks or [None] * len(sources), strict=True):
        pieces.append(Pieces(corpus, _piece(config), ids, sum(map(len, pieces)), config.cache_dir, own))
    return pieces


def cut_tokens(sources: list[Corpus], config: DataConfig, tokens: Sequence[TokenText]) -> list[TokenPieces]:
    """The same of the tokens of each source."""
    pieces: list[TokenPieces] = []
    for corpus, own in zip(sources, tokens, strict=True):
        pieces.append(TokenPieces(corpus, own, _piece(config), sum(map(len, pieces))))
    return pieces


class _ToRow(grain.transforms.RandomMap):
    """An item of a task as a row."""

    def __init__(self, examples: Examples, config: DataConfig):
        self.examples, self.config = examples, config

    def random_map(self, element: Any, rng: np.random.Generator) -> Any:
        return make_row(*self.examples.example(element, rng), self.config, element["piece"])


def records(
    pieces: Sequence[Pieces | TokenPieces | Examples], config: DataConfig, seed: int, recut: Recut | None = None
) -> grain.MapDataset:
    """The endless, shuffled, mixed sequence of pieces, or of rows of a task. Weights count pieces, not bytes. `recut`
    cuts tokens anew."""

    def one(source: Pieces | TokenPieces | Examples, index: int) -> grain.MapDataset:
        dataset = grain.MapDataset.source(source).seed(seed + index)
        dataset = (dataset.shuffle() if config.shuffle else dataset).repeat(None)
        if isinstance(source, TokenPieces):
            return dataset if recut is None else dataset.random_map(Recutting(recut, source.text.ids))
        return dataset if isinstance(source, Pieces) else dataset.random_map(_ToRow(source, config))

    datasets = [one(source, i) for i, source in enumerate(pieces)]
    if len(datasets) == 1:
        return datasets[0]
    return grain.MapDataset.mix(datasets, weights=[float(w) for w in config.weights])


class StreamRows(grain.IterDataset):
    """Rows of some virtual streams, in turn; stream s reads records s, s + shards, s + 2 shards, ... and packs them,
    where they are pieces of text.

    Elements are {"row": what a batch has of it, "stream": s, "state": JSON of the stream after this row}.
    """

    def __init__(self, source: grain.MapDataset, config: DataConfig, streams: list[int], states: dict[int, Any],
                 fourth: str = "marks"):  # fmt: skip
        """`fourth`: what a piece's fourth column is, where it has one."""
        super().__init__()
        self.source, self.config, self.streams, self.states, self.fourth = source, config, streams, states, fourth

    def set_slice(self, sl: slice, sequential_slice: bool = False) -> None:
        """Grain's hook for worker processes: worker i of n takes every n-th stream."""
        self.streams = self.streams[sl]

    def _open(self, stream: int) -> grain.DatasetIterator:
        dataset = self.source[stream :: self.config.streams].to_iter_dataset(
            grain.ReadOptions(num_threads=0, prefetch_buffer_size=0)
        )
        length = {"columns": self.config.seq_len}
        if self.config.task == "text" and self.config.packing == "best_fit":
            dataset = grain.experimental.BestFitPackIterDataset(
                dataset, length_struct=length, num_packing_bins=self.config.packing_bins
            )
        elif self.config.task == "text":
            dataset = grain.experimental.ConcatThenSplitIterDataset(dataset, length_struct=length)
        iterator = iter(dataset)
        if self.states.get(stream) is not None:
            iterator.set_state(_from_json(self.states[stream]))
        return iterator

    def __iter__(self) -> "_StreamRowsIterator":
        parent = multiprocessing.parent_process()
        if parent is not None:  # a worker ends with the training process, even if that is killed
            threading.Thread(target=exit_with, args=(parent.sentinel,), daemon=True).start()
        return _StreamRowsIterator({stream: self._open(stream) for stream in self.streams}, self.fourth)


def _from_json(state: dict[str, Any]) -> dict[str, Any]:
    """A packer's state as it was before JSON made lists of its tuples: grain 0.2.18 compares them with `(-1, -1)` to
    see whether a piece was cut, and would resume one piece too far."""
    slices = state.get("remainder_slices")
    return state if slices is None else {**state, "remainder_slices": {k: tuple(v) for k, v in slices.items()}}


class _StreamRowsIterator(grain.DatasetIterator):
    def __init__(self, iterators: dict[int, grain.DatasetIterator], fourth: str):
        super().__init__()
        self._iterators, self._names = list(iterators.items()), ("inputs", "targets", "pieces", fourth)
        self._turn = 0

    def __next__(self) -> dict[str, Any]:
        stream, iterator = self._iterators[self._turn]
        self._turn = (self._turn + 1) % len(self._iterators)
        row = next(iterator)
        if "columns" in row:
            columns = dict(zip(self._names, row["columns"].T))
            row = {**columns, "segments": row["columns_segment_ids"].astype(np.int32)}
        return {"row": row, "stream": stream, "state": json.dumps(iterator.get_state())}

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
        ids: ByteIds | None,
        *,
        seed: int,
        state: dict[str, Any] | None = None,
        rows: Sequence[int] | None = None,
        marks: Sequence[Marks] = (),
        tokens: Sequence[TokenText] = (),
        recut: Recut | None = None,
    ):
        """`rows`: which rows of each batch to yield, in this order (several processes share them); None = all. `marks`:
        those of each source, for a model that needs some. For a model of tokens there are no `ids` of bytes but the
        `tokens` of each source, which `recut` cuts anew each time.

        Raises ConfigError when the state was saved with another number of streams or the rows split a stream.
        """
        shards = config.streams
        if ids is not None and ids.replace and config.packing == "best_fit":
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
        shape: list[Any] = [config.packing, config.seq_len, _piece(config), config.packing_bins, config.shuffle, seed]
        if config.task != "text":
            shape += [config.task, target_length(config), config.noise_density, config.mean_span]
        if tokens:
            shape += [text.path.stem for text in tokens] + [config.token_splits, config.merge_dropout]
        self._packing = shape
        if state is not None and state["packing"] != self._packing:
            raise ConfigError(
                "data.packing, seq_len, piece_bytes, packing_bins, shuffle, task, train.seed, or what cuts words into "
                "tokens (the tokenizer, token_splits, merge_dropout) have changed since the "
                f"checkpoint ({state['packing']} -> {self._packing}): its data position does not fit; set them back, "
                "or start a new run from its weights with train.init_from"
            )
        saved = state["streams"] if state else [None] * shards
        self._states = {stream: saved[stream] for stream in mine}
        if ids is None:
            self._pieces = cut_tokens(sources, config, tokens)
        elif config.task == "text":
            self._pieces = cut(sources, config, ids, marks)
        else:
            self._pieces = training_examples(sources, config)
        source, fourth = records(self._pieces, config, seed, recut), "widths" if tokens else "marks"
        self._rows = _start(StreamRows(source, config, mine, dict(self._states), fourth), config)
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
        return {name: np.stack([row["row"][name] for row in rows]) for name in rows[0]["row"]}

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
