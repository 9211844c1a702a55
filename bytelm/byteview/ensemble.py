"""Several byte language models as one: tokenized ones with different vocabularies, and byte-trained ones among them."""

from collections.abc import Sequence
from typing import Literal, get_args

import numpy as np
from numpy.typing import NDArray

from bytelm.config import ConfigError
from bytelm.following import Follower, score_steps
from bytelm.protocol import ByteLM, ImpossibleText, Score, Text, in_context
from bytelm.vocab import END

Kind = Literal["mixture", "bayes", "product"]


class Ensemble(ByteLM):
    """`mixture`: the weighted mean of the members' probabilities; `bayes`: the same, with weights that follow how well
    each member has predicted the text so far (the probability of a whole text is then the weighted mean of theirs);
    `product`: the product of powers of them, renormalised (a member that is sure of a byte's absence forbids it, unless
    `floor` > 0 mixes so much of the uniform distribution into each; one with a negative weight needs it).
    """

    def __init__(
        self,
        members: Sequence[ByteLM],
        weights: Sequence[float] | None = None,
        kind: str = "mixture",
        floor: float = 0.0,
    ):
        if kind not in get_args(Kind):
            raise ConfigError(f"kind={kind!r}: choose {', '.join(get_args(Kind))}")
        if not members:
            raise ConfigError("an ensemble needs at least one member")
        weights = [1 / len(members)] * len(members) if weights is None else list(weights)
        if len(weights) != len(members):
            raise ConfigError(f"{len(members)} members but {len(weights)} weights")
        if not np.isfinite(weights).all():
            raise ConfigError(f"weights={weights}: must be numbers")
        if kind != "product" and (min(weights) < 0 or sum(weights) <= 0):
            raise ConfigError(f"weights={weights}: a mixture's must not be negative, nor all 0")
        if kind == "product" and min(weights) < 0 and not floor:
            raise ConfigError(
                "a product with a negative weight needs a floor: it divides by that member's probabilities"
            )
        if not 0 <= floor < 1:
            raise ConfigError(f"floor={floor}: must be in [0, 1)")
        self.members, self.kind, self.floor = tuple(members), kind, floor
        total = sum(weights) if kind != "product" else 1.0
        self.weights = np.array(weights, np.float64) / total
        self.window = min(member.window for member in members)

    def _join(self, rows: NDArray[np.float64], weights: NDArray[np.float64]) -> NDArray[np.float64]:
        """ln p of each symbol from the members' [members, n, 257], with weights [members] or [members, n]."""
        if self.floor:
            rows = np.logaddexp(rows + np.log1p(-self.floor), np.log(self.floor / (END + 1)))
        weights = weights.reshape(len(self.members), -1, 1)
        with np.errstate(divide="ignore", invalid="ignore"):
            if self.kind == "product":
                out = np.where(weights == 0, 0.0, rows * weights).sum(axis=0)
                out = np.where(np.isnan(out), -np.inf, out)
            else:
                out = np.logaddexp.reduce(rows + np.log(weights), axis=0)
            top = out.max(axis=-1, keepdims=True)
            if not np.isfinite(top).all():
                raise ConfigError("the members leave no symbol possible (one gives probability 0 to what another "
                                  "needs): set floor, or mix")  # fmt: skip
            return out - top - np.log(np.exp(out - top).sum(axis=-1, keepdims=True))

    @classmethod
    def proxy_tuned(
        cls, base: ByteLM, expert: ByteLM, anti: ByteLM, alpha: float = 1.0, floor: float = 1e-9
    ) -> "Ensemble":
        """`base` moved by what a small model's training changed: base * (expert / anti) ^ alpha, where `expert` is the
        small model after it and `anti` before it (Liu et al. 2024, of bytes here, so that vocabularies may differ)."""
        return cls([base, expert, anti], [1.0, alpha, -alpha], "product", floor)

    def logprobs_batch(self, prefixes: Sequence[Text], *, inputs: Sequence[Text] | None = None) -> NDArray[np.float64]:
        rows = np.stack([_rows(member, prefixes, inputs) for member in self.members])
        weights = self.weights
        if self.kind == "bayes":
            seen = np.array([[s.total for s in m.score_batch(prefixes, inputs=inputs)] for m in self.members])
            weights = _posterior(self.weights[:, None], seen)
        return self._join(rows, weights)

    def score_batch(
        self,
        texts: Sequence[Text],
        contexts: Sequence[Text] | None = None,
        window: int | None = None,
        *,
        inputs: Sequence[Text] | None = None,
    ) -> list[Score]:
        if self.kind == "product":
            return self._product_scores(texts, contexts, window, inputs)
        window = window or self.window
        scored = [member.score_batch(texts, contexts, window, inputs=inputs) for member in self.members]
        before = np.zeros((len(self.members), len(texts)))
        if self.kind == "bayes" and contexts is not None:
            before = np.array([[s.total for s in m.score_batch(contexts, window=window)] for m in self.members])
        out = []
        for n in range(len(texts)):
            rows = np.stack([member[n].per_byte for member in scored])
            if self.floor:
                rows = np.logaddexp(rows + np.log1p(-self.floor), np.log(self.floor / (END + 1)))
            weights = np.repeat(self.weights[:, None], rows.shape[1], axis=1)
            alive = np.cumsum(np.isneginf(rows), axis=1) - np.isneginf(rows) == 0  # so far
            if self.kind == "mixture":  # a member that thought the text so far impossible has no say in what follows
                left = np.where(alive, weights, 0.0)
                total = left.sum(axis=0)
                weights = np.where(total > 0, left / np.where(total > 0, total, 1.0), weights)
            if self.kind == "bayes":
                seen = before[:, n, None] + np.concatenate(
                    [np.zeros((len(rows), 1)), np.cumsum(rows, axis=1)[:, :-1]], 1
                )
                weights = _posterior(self.weights[:, None], seen[:, : rows.shape[1]])
            with np.errstate(divide="ignore"):
                logs = np.logaddexp.reduce(rows + np.log(weights), axis=0)
            out.append(Score(float(logs.sum()), logs))
        return out

    def _product_scores(self, texts, contexts, window, inputs) -> list[Score]:
        if window is not None:
            raise ConfigError("window: a product is scored byte by byte, over the whole text")
        out = []
        for n, (context, text) in enumerate(in_context(texts, contexts)):
            one = None if inputs is None else [inputs[n]]
            per_byte = score_steps(self.follow([context], inputs=one), text)
            out.append(Score(float(per_byte.sum()), per_byte))
        return out

    def follow(self, prompts: Sequence[Text], *, inputs: Sequence[Text] | None = None) -> Follower:
        return _Joint(self, prompts, inputs)


class _Joint(Follower):
    """The members' followers side by side."""

    def __init__(self, ensemble: Ensemble, prompts: Sequence[Text], inputs: Sequence[Text] | None):
        self._ensemble = ensemble
        self._followers = [member.follow(prompts, inputs=inputs) for member in ensemble.members]
        self._weights = np.repeat(ensemble.weights[:, None], len(prompts), axis=1)
        self._ended = np.zeros(len(prompts), bool)
        self._rows: NDArray[np.float64] | None = None
        if ensemble.kind == "bayes":
            seen = [[s.total for s in m.score_batch(prompts, inputs=inputs)] for m in ensemble.members]
            self._weights = _posterior(self._weights, np.array(seen))

    def logprobs(self) -> NDArray[np.float64]:
        rows = self._asked()
        out = np.full(rows.shape[1:], -np.inf)
        live = ~self._ended
        out[live] = self._ensemble._join(rows[:, live], self._weights[:, live])
        return out

    def push(self, symbols: Sequence[int]) -> None:
        self._ended |= np.array(symbols) == END
        if self._ensemble.kind == "bayes":
            seen = self._asked()[:, np.arange(len(symbols)), symbols]
            live = ~self._ended
            self._weights[:, live] = _posterior(self._weights[:, live], seen[:, live])
        for follower in self._followers:
            follower.push(symbols)
        self._rows = None

    def _asked(self) -> NDArray[np.float64]:
        """What the members say of the next symbols, [members, n, 257]."""
        if self._rows is None:
            self._rows = np.stack([follower.logprobs() for follower in self._followers])
        return self._rows


def _rows(member: ByteLM, prefixes: Sequence[Text], inputs: Sequence[Text] | None) -> NDArray[np.float64]:
    """What a member says behind each prefix, [n, 257]; -inf behind what it thinks impossible."""
    try:
        return member.logprobs_batch(prefixes, inputs=inputs)
    except ImpossibleText:
        if len(prefixes) == 1:
            return np.full((1, END + 1), -np.inf)
        parts = [_rows(member, [p], None if inputs is None else [inputs[n]]) for n, p in enumerate(prefixes)]
        return np.concatenate(parts)


def _posterior(weights: NDArray[np.float64], logs: NDArray[np.float64]) -> NDArray[np.float64]:
    """Weights after members gave the probabilities exp(logs), [members, n]; where all gave 0, as before."""
    with np.errstate(divide="ignore"):
        out = np.log(weights) + logs
    top = out.max(axis=0, keepdims=True)
    alive = np.isfinite(top)
    out = np.exp(out - np.where(alive, top, 0.0))
    return np.where(alive, out / np.maximum(out.sum(axis=0, keepdims=True), 1e-300), weights)
