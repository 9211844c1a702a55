"""What a run measures of its current weights: held-out bits per byte, and where they cut a text."""

from collections.abc import Iterable
from dataclasses import replace
from typing import Any

import numpy as np
from jax.sharding import Mesh

from bytelm.boundaries import Boundaries, first_rows, text_boundaries
from bytelm.config import Config, T5Config, longest_row
from bytelm.data.corpus import Corpus
from bytelm.data.seq2seq import heldout_examples, heldout_rows
from bytelm.evals.bpb import BitsPerByte, LogProbs, bits_per_byte, first_bytes, row_scorer, window_scorer
from bytelm.evals.seq2seq import TargetScore, score_targets
from bytelm.models.build import byte_ids
from bytelm.models.t5_report import SCORED
from bytelm.parallel.hosts import rows_here
from bytelm.train.state import Setup
from bytelm.train.step import make_eval_step, make_report_step, place_batch
from bytelm.train.tokens import Tokenizer
from bytelm.vocab import complete_prefix
from bytelm.windows import DEFAULT_WINDOW

WATCHED_BYTES = 600  # of the held-out text, for the report on chunks


class Evaluation:
    """Scores texts with a run's jitted evaluation step. Every process must call it at the same point."""

    def __init__(self, config: Config, mesh: Mesh, eval_step: Any, text: Corpus):
        self.config, self.mesh, self.eval_step, self.text = config, mesh, eval_step, text
        window = config.eval.window or min(config.data.seq_len, DEFAULT_WINDOW)
        self.window = min(window, longest_row(config.model, window))
        self.rows = config.eval.batch_size or config.data.batch_size
        self._mine = rows_here(mesh, self.rows)

    def bits_per_byte(self, params: Any, max_bytes: int) -> BitsPerByte | None:
        """Of the held-out text; None when there is none."""
        if len(self.text) == 0:
            return None

        def logprobs(inputs: np.ndarray, targets: np.ndarray) -> np.ndarray:
            return np.asarray(self._step(params, inputs, targets)[0])

        return self._measure(logprobs, first_bytes(self.text, max_bytes))

    def _measure(self, logprobs: LogProbs, documents: Iterable[bytes]) -> BitsPerByte:
        ids = byte_ids(self.config.model, self.config.data.reserved)
        score = window_scorer(logprobs, ids, window=self.window, batch_size=self.rows)
        return bits_per_byte(score, documents, self.window)

    def boundaries(self, params: Any, text: bytes) -> list[Boundaries]:
        """Where the weights cut a text; no levels for a model without chunks."""

        def levels_of(row):
            inputs = np.zeros((self.rows, self.window), np.int32)
            inputs[0, : len(row)] = row
            return first_rows(self._step(params, inputs, inputs)[1])

        ids = byte_ids(self.config.model, self.config.data.reserved)
        return text_boundaries(levels_of, text, ids, self.window)

    def watched_text(self) -> bytes:
        """The text whose chunks the report follows: train.watch_text, or the start of the held-out text."""
        given = self.config.train.watch_text.encode("utf-8", "surrogateescape")
        text = given or b"".join(first_bytes(self.text, WATCHED_BYTES))
        return text[: complete_prefix(text)]

    def _step(self, params: Any, inputs: np.ndarray, targets: np.ndarray) -> tuple:
        batch = {"inputs": inputs[self._mine], "targets": targets[self._mine]}
        placed = place_batch(batch, self.mesh, self._mine, self.rows)
        return self.eval_step(params, placed["inputs"], placed["targets"])


class TokenEvaluation(Evaluation):
    """The same for a model of tokens: bits of the tokenizer's own tokens over the bytes of the text. The window counts
    tokens."""

    def __init__(self, config: Config, mesh: Mesh, eval_step: Any, text: Corpus, tokenizer: Tokenizer):
        """Raises DataError where the text is none that the tokenizer reads."""
        super().__init__(config, mesh, eval_step, text)
        self.tokenizer = tokenizer
        for document in range(len(text)):
            name, offset = text.place(document)
            data = text.read(document)
            tokenizer.characters(data, f"{name}[{offset}:{offset + len(data)}]")

    def _measure(self, logprobs: LogProbs, documents: Iterable[bytes]) -> BitsPerByte:
        def targets_of(text: bytes) -> np.ndarray:
            return np.array(self.tokenizer.encode(text, "the held-out text"), np.int32)

        score = row_scorer(logprobs, targets_of, self.tokenizer.ids.start, window=self.window, batch_size=self.rows)
        return bits_per_byte(score, (text[: complete_prefix(text)] for text in documents), self.window)


class TargetEvaluation:
    """The same for an encoder-decoder: scores held-out examples, with hard deletion and with the gate's values."""

    def __init__(self, config: Config, mesh: Mesh, report_step: Any, text: Corpus):
        self.config, self.mesh = config, mesh
        self.examples = heldout_examples(text, config.data)
        self.rows = config.eval.batch_size or config.data.batch_size
        self._mine = rows_here(mesh, self.rows)
        self._report = report_step

    def bits_per_byte(self, params: Any, max_bytes: int) -> TargetScore | None:
        """Bits per target id of the first examples of the held-out text; None when there are none."""

        def score(mode: str) -> TargetScore | None:
            def report(batch):
                mine = {name: batch[name][self._mine] for name in SCORED}
                return self._report(params, place_batch(mine, self.mesh, self._mine, self.rows), mode)

            return score_targets(report, heldout_rows(self.examples, self.config.data, max_bytes), self.rows)

        assert isinstance(self.config.model, T5Config)
        hard = score("masked_hard")
        if hard is None or not self.config.model.deletion.gated:
            return hard
        soft = score("soft")
        return hard if soft is None else replace(hard, soft_bpb=soft.bpb)

    def watched_text(self) -> bytes:
        return b""

    def boundaries(self, params: Any, text: bytes) -> list[Boundaries]:
        return []


def make_evaluation(
    config: Config, mesh: Mesh, setup: Setup, text: Corpus, tokenizer: Tokenizer | None = None
) -> Evaluation | TargetEvaluation:
    """What measures the weights of a run."""
    if tokenizer is not None:
        return TokenEvaluation(config, mesh, make_eval_step(config, setup), text, tokenizer)
    if isinstance(config.model, T5Config):
        return TargetEvaluation(config, mesh, make_report_step(config, setup), text)
    return Evaluation(config, mesh, make_eval_step(config, setup), text)
