"""The models of an evaluation, each as a byte language model that goes on with a text."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import jax
import numpy as np
from numpy.typing import NDArray

from bytelm.byteview.byte_view import TokenizedLM
from bytelm.byteview.plain_tokens import PlainTokens
from bytelm.protocol import ByteLM, Score, Text, in_context, no_inputs
from bytelm.seq2seq_lm import Seq2SeqLM
from bytelm.vocab import encode

SENTINEL, NEXT_SENTINEL = b"\xff", b"\xfe"  # the bytes of ByT5's first two


class Continuing(ByteLM):
    """An encoder-decoder that was trained on corrupted spans, as a model that goes on with a text: the text is its
    input, with the first sentinel where it should go on; its target begins with that sentinel."""

    def __init__(self, lm: Seq2SeqLM):
        self.lm, self.window = lm, lm.window

    def _input(self, context: bytes) -> bytes:
        return context[max(len(context) - self.window + 2, 0) :] + SENTINEL

    def logprobs_batch(self, prefixes: Sequence[Text], *, inputs: Sequence[Text] | None = None) -> NDArray[np.float64]:
        no_inputs(inputs)
        return self.lm.logprobs_batch([SENTINEL] * len(prefixes), inputs=[self._input(encode(p)) for p in prefixes])

    def score_batch(
        self,
        texts: Sequence[Text],
        contexts: Sequence[Text] | None = None,
        window: int | None = None,
        *,
        inputs: Sequence[Text] | None = None,
    ) -> list[Score]:
        no_inputs(inputs)
        pairs = in_context(texts, contexts)
        return self.lm.score_batch([t for _, t in pairs], [SENTINEL] * len(pairs), window,
                                   inputs=[self._input(c) for c, _ in pairs])  # fmt: skip

    def _continue(self, prompts, inputs, max_bytes, sampling, seed, stop, block) -> Iterator[list[bytes]]:
        no_inputs(inputs)
        sources = [self._input(p) for p in prompts]
        stop = (*stop, NEXT_SENTINEL)
        return self.lm._continue([SENTINEL] * len(prompts), sources, max_bytes, sampling, seed, stop, block)


@dataclass(frozen=True)
class Entrant:
    """A way to ask a model; a tokenized one has two."""

    name: str
    lm: ByteLM
    bits: bool = True  # whether its scores of a text without context are bits per byte of it


def entrants(name: str, lm: ByteLM) -> list[Entrant]:
    """The ways to ask a loaded model."""
    if isinstance(lm, TokenizedLM):
        return [Entrant(f"{name} (tokens)", PlainTokens(lm)), Entrant(f"{name} (bytes)", lm)]
    if isinstance(lm, Seq2SeqLM):
        return [Entrant(name, Continuing(lm), bits=False)]
    return [Entrant(name, lm)]


def parameters(lm: ByteLM) -> int:
    """Numbers in a model's weights; 0 for one without weights of its own."""
    if isinstance(lm, (PlainTokens, Continuing)):
        return parameters(lm.lm)
    weights = lm.model.params if isinstance(lm, TokenizedLM) else getattr(lm, "params", None)
    return sum(int(leaf.size) for leaf in jax.tree.leaves(weights))


def longer(lm: ByteLM, text: bytes) -> bool:
    """Whether a model does not see all of a text at once."""
    if not isinstance(lm, PlainTokens):
        return len(text) > lm.window
    context, trunk = lm.lm.model.config.context, len(lm.lm.trunk)
    return len(text) > context - trunk and trunk + len(lm.lm.token_ids(text)) > context
