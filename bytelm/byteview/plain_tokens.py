"""A tokenized model asked as token models usually are: a text's tokens behind those of its context, each read alone.
Beside the byte view it shows what cutting texts into tokens costs."""

from collections.abc import Iterator, Sequence

import numpy as np
from numpy.typing import NDArray

from bytelm.byteview.byte_view import BLOCK, TokenizedLM
from bytelm.byteview.cover import Node, log_sum
from bytelm.byteview.readings import State
from bytelm.config import ConfigError
from bytelm.protocol import ByteLM, Score, Text, in_context, no_inputs
from bytelm.windows import scoring_windows


class PlainTokens(ByteLM):
    """Scores and samples of a tokenized model through its own tokens, as lm-evaluation-harness asks for them: of
    context and text together, the tokens beyond as many as the context alone has; white space that ends a context is
    counted with the text. It says nothing of single bytes."""

    def __init__(self, lm: TokenizedLM):
        self.lm, self.window = lm, lm.window

    def logprobs_batch(self, prefixes: Sequence[Text], *, inputs: Sequence[Text] | None = None) -> NDArray[np.float64]:
        raise ConfigError("plain tokens have no probabilities of next bytes: ask the byte view")

    def score_batch(
        self,
        texts: Sequence[Text],
        contexts: Sequence[Text] | None = None,
        window: int | None = None,
        *,
        inputs: Sequence[Text] | None = None,
    ) -> list[Score]:
        """Only totals: `per_byte` has all of it at the text's last byte. What does not fit the model's positions is
        scored in windows, as `score` does. Neighbouring texts with one context share its pass."""
        no_inputs(inputs)
        if window is not None:
            raise ConfigError(f"window={window}: plain tokens are read in windows of the model's positions")
        totals: list[float] = []
        pairs = in_context(texts, contexts)
        for context, group in _runs(pairs):
            if context:
                totals += self._behind(context, group)
            else:
                totals += self.lm.score_tokens(group)
        scores = []
        for total, (_, text) in zip(totals, pairs):
            logs = np.zeros(len(text))
            logs[-1:] = total
            scores.append(Score(total, logs))
        return scores

    def _behind(self, context: bytes, texts: list[bytes]) -> list[float]:
        """ln p of each text after a context that is not empty."""
        body = context.rstrip() or context
        start = len(self.lm.trunk) + len(self.lm.token_ids(body))
        rows, firsts, owners = [], [], []
        for n, text in enumerate(texts):
            row = [*self.lm.trunk, *self.lm.token_ids(context + text)]
            for first, end, scored in scoring_windows(start - 1, len(row) - 1, self.lm.model.config.context):
                rows.append(row[first : end + 1])
                firsts.append(scored - first + 1)
                owners.append(n)
        totals = [0.0] * len(texts)
        for owner, total in zip(owners, self._read(rows, firsts)):
            totals[owner] += total
        return totals

    def _read(self, rows: list[list[int]], firsts: list[int]) -> list[float]:
        """ln p of each row's tokens from place `first` on; what rows begin with alike is read once."""
        known: dict[tuple[int, int], Node] = {}
        nodes: list[Node] = []
        wanted: dict[int, list[tuple[int, int]]] = {}  # node -> (row, the token behind it there)
        for r, (row, first) in enumerate(zip(rows, firsts)):
            node: Node | None = None
            for place, token in enumerate(row[:-1]):
                key = (id(node), token)
                if key not in known:
                    known[key] = Node(token, node, -1, place, State(), (), (), [])
                    nodes.append(known[key])
                node = known[key]
                if place + 1 >= first:
                    wanted.setdefault(id(node), []).append((r, row[place + 1]))
        totals = [0.0] * len(rows)
        session = self.lm.model.session(1 << max(len(nodes) - 1, 1).bit_length())
        for begin in range(0, len(nodes), BLOCK):
            part = nodes[begin : begin + BLOCK]
            for node, logits in zip(part, session.read(part)):
                if id(node) in wanted:
                    logits = logits.astype(np.float64)
                    below = log_sum(logits)
                    for r, token in wanted[id(node)]:
                        totals[r] += float(logits[token] - below)
        return totals

    def _continue(self, prompts, inputs, max_bytes, sampling, seed, stop, block) -> Iterator[list[bytes]]:
        """Tokens behind those of each prompt; temperature, top_k and top_p are of tokens."""
        no_inputs(inputs)
        out = []
        for n, prompt in enumerate(prompts):
            ids = self.lm.token_ids(prompt)
            room = self.lm.model.config.context - len(self.lm.trunk) - max_bytes
            behind = self.lm.fixed([*self.lm.trunk, *ids[max(len(ids) - room, 0) :]], b"")
            out += behind.generate_tokens([b""], max_bytes, temperature=sampling.temperature, top_k=sampling.top_k,
                                          top_p=sampling.top_p, stop=stop, seed=seed + n)  # fmt: skip
        yield out


def _runs(pairs: Sequence[tuple[bytes, bytes]]) -> Iterator[tuple[bytes, list[bytes]]]:
    """Neighbours with one context: (context, texts)."""
    group: list[bytes] = []
    for n, (context, text) in enumerate(pairs):
        group.append(text)
        if n + 1 == len(pairs) or pairs[n + 1][0] != context:
            yield context, group
            group = []
