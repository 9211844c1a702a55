"""An encoder-decoder (ByT5, MrT5) as a byte language model: a distribution over targets, given an input."""

from collections.abc import Iterator, Sequence
from functools import partial
from typing import Literal

import jax
import numpy as np
from flax import nnx
from numpy.typing import NDArray

from bytelm.beams import search_beams
from bytelm.boundaries import Boundaries
from bytelm.config import ConfigError, T5Config
from bytelm.copying import LENGTHS, Counts
from bytelm.drafts import Draft, Drafting, check_draft, drafted_bytes
from bytelm.generate import Decoder, Sampling, bucket, generate_bytes, pad_rows
from bytelm.models.build import Params, structure
from bytelm.models.deletion import PAD, slot_sizes
from bytelm.models.t5 import Encoded, Seen
from bytelm.models.t5_report import SCORED, rows
from bytelm.parallel.rules import cast_matrices
from bytelm.protocol import ByteLM, Score, Text, log_softmax
from bytelm.vocab import T5_IDS, encode

Deletion = Literal["hard", "soft", "none"]
PARTS = 4  # of a batch, by the bytes that its rows keep


@partial(jax.jit, static_argnums=0)
def _look(graph, params, source, threshold):
    return nnx.merge(graph, params).look(source, source != PAD, threshold=threshold)


@partial(jax.jit, static_argnums=(0, 3, 4))
def _finish(graph, params, seen, mode, slots):
    return nnx.merge(graph, params).finish(seen, mode, slots)[0]


@partial(jax.jit, static_argnums=0)
def _decode(graph, params, symbols, inputs, encoded):
    return nnx.merge(graph, params).decode(inputs, encoded)[0][..., symbols]


@partial(jax.jit, static_argnums=0)
def _decode_last(graph, params, symbols, inputs, lengths, encoded):
    logits, _ = nnx.merge(graph, params).decode(inputs, encoded)
    return jax.numpy.take_along_axis(logits, (lengths - 1)[:, None, None], axis=1)[:, 0, symbols]


@partial(jax.jit, static_argnums=0)
def _rows(graph, params, batch, seen, encoded):
    return rows(nnx.merge(graph, params), batch, seen, encoded)


class Seq2SeqLM(ByteLM):
    """Targets given inputs. Every method takes `input=` (batched: `inputs=`), the text that the encoder reads; texts,
    contexts and prompts are of the target. There is no window: an input and a target are read whole."""

    ids = T5_IDS

    def __init__(
        self,
        config: T5Config,
        params: Params,
        context: int,
        batch_bytes: int = 1 << 15,
        deletion: str = "hard",
        threshold: float | None = None,
        draft: Draft = "none",
    ):
        """`context` is the input length it was trained on; a forward pass takes about `batch_bytes` ids of input.

        `deletion`: hard takes deleted bytes out (exactly: the encoder's first blocks say how many slots the batch
        needs), soft adds the gate's values to the scores, as in training, none ignores the gate. `threshold` replaces
        the config's. `draft`: none, or copy as in `NetworkLM`, from the input too.
        """
        if deletion not in ("hard", "soft", "none"):
            raise ConfigError(f"deletion={deletion!r}: choose hard, soft or none")
        self.params = params = cast_matrices(params, config.dtype)
        self.config, self.window, self.deletion = config, context, deletion
        self.threshold = np.float32(config.deletion.threshold if threshold is None else threshold)
        self.graph, abstract = structure(config)
        check_draft(draft, nnx.merge(self.graph, abstract))
        self.decoder = Decoder(self.graph, params)
        self.draft, self.counts = draft, Counts()
        self._symbols, self.batch_bytes = self.ids.symbol_ids(), batch_bytes

    def _source(self, text: bytes) -> NDArray[np.int32]:
        body = np.frombuffer(text, np.uint8).astype(np.int32) + self.ids.offset
        return np.append(body, np.int32(self.ids.end))

    def _target(self, text: bytes) -> NDArray[np.int32]:
        """What the decoder reads to go on with a text: the start symbol and its ids."""
        return np.concatenate([[np.int32(self.ids.start)], self._source(text)[:-1]]).astype(np.int32)

    def look(self, source: NDArray[np.int32]) -> Seen:
        """The encoder's first blocks and gate over padded rows of ids."""
        return _look(self.graph, self.params, source, self.threshold)

    def encode_rows(self, source: NDArray[np.int32]) -> Encoded:
        """The encoder over padded rows of ids, in as few slots as the row that keeps most needs."""
        return self.finish_rows(self.look(source))

    def finish_rows(self, seen: Seen) -> Encoded:
        """The rest of the encoder."""
        if self.deletion != "hard" or seen.keep is None:
            mode = "none" if self.deletion == "none" else "soft"
            return _finish(self.graph, self.params, seen, mode, None)
        longest = int(np.asarray(seen.keep.sum(axis=1)).max())
        slots = next(size for size in slot_sizes(seen.source.shape[1]) if size >= longest)
        return _finish(self.graph, self.params, seen, "compact", slots)

    def _groups(
        self, sources: list[NDArray[np.int32]], targets: list[NDArray[np.int32]], each: int = 1
    ) -> Iterator[tuple[list[int], Encoded, NDArray, NDArray]]:
        """Groups rows of like length: (indices, encoded inputs, target inputs, their lengths). A row counts for its
        longer side; `each` is what its target counts for beside its length."""
        order = sorted(range(len(sources)), key=lambda i: (len(sources[i]), len(targets[i])))
        while order:
            width = bucket(len(sources[order[-1]]), 32)
            widest = max(width, each * bucket(max(len(targets[i]) for i in order), 8))
            count = min(max(self.batch_bytes // widest, 1), bucket(len(order)))
            group, order = order[-count:], order[:-count]
            count = bucket(len(group))
            source, _ = pad_rows([sources[i] for i in group], count, width)
            longest = bucket(max(len(targets[i]) for i in group), 8)
            inputs, lengths = pad_rows([targets[i] for i in group], count, longest)
            for part, encoded in self._finished(self.look(source), len(group)):
                yield [group[i] for i in part if i < len(group)], encoded, inputs[part], lengths[part]

    def _finished(self, seen: Seen, real: int) -> Iterator[tuple[NDArray[np.int64], Encoded]]:
        """(rows, what the encoder makes of them) of rows of which the first `real` are asked for: all at once; where
        bytes are deleted, in PARTS of rows that keep about as many, each in as few slots as it needs."""
        if self.deletion != "hard" or seen.keep is None or real < 2 * PARTS:
            yield np.arange(len(seen.source)), self.finish_rows(seen)
            return
        kept = np.array(seen.keep.sum(axis=1))
        kept[real:] = -1  # rows that fill up come last
        for part in np.split(np.argsort(-kept, kind="stable"), PARTS):
            if part[0] < real:
                yield part, self.finish_rows(jax.tree.map(lambda x, part=part: x[part], seen))

    def logprobs_batch(self, prefixes: Sequence[Text], *, inputs: Sequence[Text] | None = None) -> NDArray[np.float64]:
        sources = self._sources(inputs, len(prefixes))
        out = np.zeros((len(sources), len(self._symbols)))
        for group, encoded, ids, lengths in self._groups(sources, [self._target(encode(p)) for p in prefixes]):
            logits = _decode_last(self.graph, self.params, self._symbols, ids, lengths, encoded)
            out[group] = log_softmax(np.asarray(logits)[: len(group)])
        return out

    def score_batch(
        self,
        texts: Sequence[Text],
        contexts: Sequence[Text] | None = None,
        window: int | None = None,
        *,
        inputs: Sequence[Text] | None = None,
    ) -> list[Score]:
        if window is not None:
            raise ConfigError(f"window={window}: an encoder-decoder reads inputs and targets whole")
        sources = self._sources(inputs, len(texts))
        after = [encode(t) for t in texts]
        before = [b""] * len(after) if contexts is None else [encode(c) for c in contexts]
        if len(before) != len(after):
            raise ValueError(f"{len(after)} texts but {len(before)} contexts")
        scores = [Score(0.0, np.zeros(0), np.zeros(0, bool))] * len(after)
        targets = [self._target((c + t)[:-1]) if t else self._target(c) for c, t in zip(before, after)]
        for group, encoded, ids, _ in self._groups(sources, targets):
            logits = np.asarray(_decode(self.graph, self.params, self._symbols, ids, encoded))
            for line, i in zip(logits, group):
                text, first = np.frombuffer(after[i], np.uint8), len(before[i])
                scored = log_softmax(line[first : first + len(text)])
                logs = scored[np.arange(len(text)), text]
                scores[i] = Score(float(logs.sum()), logs, scored.argmax(axis=1) == text)
        return scores

    def _sources(self, inputs: Sequence[Text] | None, count: int) -> list[NDArray[np.int32]]:
        if inputs is None:
            raise ConfigError("this model is an encoder-decoder: give it an input (input=, inputs=; --input)")
        if len(inputs) != count:
            raise ValueError(f"{count} texts but {len(inputs)} inputs")
        return [self._source(encode(x)) for x in inputs]

    def _continue(self, prompts, inputs, max_bytes, sampling: Sampling, seed, stop, block):
        sources = self._sources(inputs, len(prompts))
        padded, _ = pad_rows(sources, bucket(len(sources)), bucket(max(map(len, sources)), 32))
        if self.draft != "none":
            window = max(map(len, prompts)) + max_bytes + LENGTHS[-1] + 2
            make = partial(
                Drafting, self.decoder, self.ids, prompts, window=window, max_bytes=max_bytes,
                sampling=sampling, seed=seed, draft=self.draft, counts=self.counts, sources=inputs,
                encoded=self.encode_rows(padded),
            )  # fmt: skip
            return drafted_bytes(make, len(prompts), max_bytes, stop, block)
        return generate_bytes(
            self.decoder, self.ids, prompts, window=max(map(len, prompts)) + max_bytes + 2,
            max_bytes=max_bytes, sampling=sampling, seed=seed, stop=stop, block=block,
            encoded=self.encode_rows(padded),
        )  # fmt: skip

    def beam_search(
        self, inputs: Sequence[Text], max_bytes: int = 200, *, beams: int = 4, length_penalty: float = 1.0
    ) -> list[tuple[bytes, float]]:
        """The best target found for each input by beam search, and its score: ln p over its length (the end symbol
        counted) to the power of `length_penalty`. A target of `max_bytes` need not have ended."""
        if beams < 1 or max_bytes < 1:
            raise ConfigError(f"beams={beams}, max_bytes={max_bytes}: must be at least 1")
        out: list[tuple[bytes, float]] = [(b"", 0.0)] * len(inputs)
        start = np.array([self.ids.start], np.int32)
        sources = self._sources(inputs, len(inputs))
        for group, encoded, _, _ in self._groups(sources, [start] * len(sources), beams * max_bytes // 8 or 1):
            found, scores = search_beams(
                self.graph, self.params, self._symbols, encoded, max_bytes, beams, np.float32(length_penalty)
            )
            for row, i in enumerate(group):
                ended = np.flatnonzero(found[row] >= 256)
                text = found[row][: ended[0]] if len(ended) else found[row]
                out[i] = (text.astype(np.uint8).tobytes(), float(scores[row]))
        return out

    def report(self, batch: dict[str, NDArray]) -> dict[str, NDArray]:
        """What `models/t5_report.py` says of each of the rows of examples, in this model's way of deletion."""
        seen = self.look(batch["source"])
        scored = {name: batch[name] for name in SCORED}
        return jax.device_get(_rows(self.graph, self.params, scored, seen, self.finish_rows(seen)))

    def boundaries(self, text: Text) -> list[Boundaries]:
        """Bytes of an input that the gate keeps (`cut`), and how sure it is of each; none for a model that deletes
        nothing. A pooling model's boundaries are the starts of its segments."""
        data = encode(text)
        if self.config.deletion.kind == "none" or not data:
            return []
        source, _ = pad_rows([self._source(data)], 1, bucket(len(data) + 1, 32))
        seen = self.look(source)
        offset = np.arange(len(data))
        if seen.keep is not None:
            sure = 1 - np.asarray(seen.gate)[0, : len(data)] / self.config.deletion.scale
            return [Boundaries(offset, sure.astype(np.float64), np.asarray(seen.keep)[0, : len(data)])]
        encoded = self.finish_rows(seen)
        starts = np.asarray(encoded.position)[0]
        cut = np.isin(offset, starts[starts < len(data)])
        return [Boundaries(offset, cut.astype(np.float64), cut)]
