"""The byte language model protocol: what every model answers."""

import dataclasses
from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence

import numpy as np
from numpy.typing import NDArray

from bytelm.boundaries import Boundaries
from bytelm.config import ConfigError
from bytelm.following import Follower, Rereading, draw_rows
from bytelm.generate import Sampling
from bytelm.vocab import complete_prefix, encode

Text = str | bytes


class ImpossibleText(ValueError):
    """A text that no text of a model's tokenizer begins with; the message says where and why."""


@dataclasses.dataclass(frozen=True)
class Score:
    """Natural log-probability of a text: the sum, and of each byte. The end symbol is not scored. `greedy`: whether
    each byte was the most probable symbol, where the model says so."""

    total: float
    per_byte: NDArray[np.float64]
    greedy: NDArray[np.bool_] | None = None


class ByteLM(ABC):
    """A distribution over byte strings: next-byte probabilities, scores and samples.

    Symbols 0-255 are bytes, 256 is the end of the text. Texts are bytes, or str read as UTF-8. An encoder-decoder needs
    an `input` beside them, which others refuse. Subclasses give the batched forms; the single ones are written once,
    here.
    """

    window: int  # bytes of context the model was made for

    @abstractmethod
    def logprobs_batch(self, prefixes: Sequence[Text], *, inputs: Sequence[Text] | None = None) -> NDArray[np.float64]:
        """ln p of each of the 257 symbols after each prefix: [n, 257]."""

    @abstractmethod
    def score_batch(
        self,
        texts: Sequence[Text],
        contexts: Sequence[Text] | None = None,
        window: int | None = None,
        *,
        inputs: Sequence[Text] | None = None,
    ) -> list[Score]:
        """Log-probability of each text after its context (none: after the start of a document).

        What is longer than `window` (default: min(8192, the trained length)) is scored by the rolling rule.
        """

    def _continue(
        self,
        prompts: list[bytes],
        inputs: list[bytes] | None,
        max_bytes: int,
        sampling: Sampling,
        seed: int,
        stop: tuple[bytes, ...],
        block: int,
    ) -> Iterator[list[bytes]]:
        """New bytes of each row, block by block."""
        return draw_rows(self.follow(prompts, inputs=inputs), len(prompts), max_bytes, sampling, seed, stop, block)

    def follow(self, prompts: Sequence[Text], *, inputs: Sequence[Text] | None = None) -> Follower:
        """Texts that grow byte by byte from the prompts. A model that keeps nothing between questions reads them from
        the beginning at every step."""

        def ask(texts: list[bytes]) -> NDArray[np.float64]:
            return self.logprobs_batch(texts, inputs=inputs)

        if inputs is not None and len(inputs) > 1:
            raise ConfigError("follow: one input at a time")
        return Rereading(ask, [encode(p) for p in prompts])

    def reopen(self, text: bytes, first: int) -> Follower:
        """One text that grows, read as `score` reads a window that begins at byte `first` of it."""
        return self.follow([text[first:]])

    def logprobs(self, prefix: Text = b"", *, input: Text | None = None) -> NDArray[np.float64]:
        """ln p of each of the 257 symbols after `prefix`: [257]."""
        return self.logprobs_batch([prefix], inputs=_one(input))[0]

    def score(self, text: Text, context: Text = b"", window: int | None = None, *, input: Text | None = None) -> Score:
        """Log-probability of `text` after `context`."""
        return self.score_batch([text], [context], window, inputs=_one(input))[0]

    def generate_batch(
        self,
        prompts: Sequence[Text] | None = None,
        max_bytes: int = 200,
        *,
        inputs: Sequence[Text] | None = None,
        temperature: float = 1.0,
        top_k: int = 0,
        top_p: float = 1.0,
        stop: Sequence[Text] = (),
        seed: int = 0,
    ) -> list[bytes]:
        """Continuations of the prompts, without them; each ends with the end of the text, in front of a `stop` string,
        or after `max_bytes`. Row i depends on its prompt, the seed and i only. Raises ConfigError for a bad option."""
        prompts = [b""] * len(inputs or ()) if prompts is None else prompts
        out = [b""] * len(prompts)
        if not prompts:
            return out
        request = self._request(prompts, inputs, max_bytes, temperature, top_k, top_p, stop, seed)
        for new in self._continue(*request, block=32):
            out = [a + b for a, b in zip(out, new)]
        return out

    def generate(self, prompt: Text = b"", max_bytes: int = 200, *, input: Text | None = None, **options) -> bytes:
        """One continuation; options as in `generate_batch`."""
        return self.generate_batch([prompt], max_bytes, inputs=_one(input), **options)[0]

    def stream(
        self,
        prompt: Text = b"",
        max_bytes: int = 200,
        *,
        input: Text | None = None,
        temperature: float = 1.0,
        top_k: int = 0,
        top_p: float = 1.0,
        stop: Sequence[Text] = (),
        seed: int = 0,
    ) -> Iterator[bytes]:
        """The bytes of `generate` as they come, in pieces that never end inside a UTF-8 character (the last may)."""
        pending = b""
        request = self._request([prompt], _one(input), max_bytes, temperature, top_k, top_p, stop, seed)
        for (new,) in self._continue(*request, block=8):
            pending += new
            whole = complete_prefix(pending)
            if whole:
                yield pending[:whole]
            pending = pending[whole:]
        if pending:
            yield pending

    def boundaries(self, text: Text) -> list[Boundaries]:
        """Where a chunking model may cut a text and where it does, level by level, outermost first; no levels for a
        model without chunks. The start of the document is not counted."""
        return []

    def chunks(self, text: Text) -> list[NDArray[np.int64]]:
        """Byte offsets of chunk starts at every level; a model without chunks has no levels."""
        return [level.starts for level in self.boundaries(text)]

    @staticmethod
    def _request(prompts, inputs, max_bytes, temperature, top_k, top_p, stop, seed):
        if max_bytes < 0:
            raise ConfigError(f"max_bytes={max_bytes}: must not be negative")
        stops = tuple(encode(s) for s in ([stop] if isinstance(stop, (str, bytes)) else stop))
        if b"" in stops:
            raise ConfigError("stop: an empty string would stop everything")
        sampling = Sampling(temperature=temperature, top_k=top_k, top_p=top_p)
        texts = None if inputs is None else [encode(x) for x in inputs]
        if texts is not None and len(texts) != len(prompts):
            raise ValueError(f"{len(prompts)} prompts but {len(texts)} inputs")
        return [encode(p) for p in prompts], texts, max_bytes, sampling, seed, stops


def _one(input: Text | None) -> list[Text] | None:
    return None if input is None else [input]


def log_softmax(logits: NDArray, possible: NDArray[np.bool_] | None = None) -> NDArray[np.float64]:
    """ln softmax over the last axis, in float64 on the host; -inf for symbols that are not `possible`."""
    logits = np.asarray(logits, np.float64)
    if possible is not None:
        logits = np.where(possible, logits, -np.inf)
    top = logits.max(axis=-1, keepdims=True)
    return logits - top - np.log(np.exp(logits - top).sum(axis=-1, keepdims=True))


def no_inputs(inputs: Sequence[Text] | None) -> None:
    """Raises ConfigError where a model that reads no input is given one."""
    if inputs is not None:
        raise ConfigError("this model only goes on with a text: it reads no input (input=, inputs=)")


def in_context(texts: Sequence[Text], contexts: Sequence[Text] | None) -> list[tuple[bytes, bytes]]:
    """(context, text) of each text to be scored; no contexts: empty ones. Raises ValueError for another number."""
    if contexts is not None and len(contexts) != len(texts):
        raise ValueError(f"{len(texts)} texts but {len(contexts)} contexts")
    return [(encode(c), encode(t)) for c, t in zip(contexts or [b""] * len(texts), texts)]
