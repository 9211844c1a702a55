"""A byte language model whose texts match a regular expression or a grammar, by llguidance's incremental parser."""

from collections.abc import Sequence
from functools import cache
from typing import Any

import numpy as np
from numpy.typing import NDArray

from bytelm.config import ConfigError
from bytelm.following import Follower, score_steps
from bytelm.protocol import ByteLM, Score, Text, in_context
from bytelm.vocab import END, encode


class _Bytes:
    """The bytes as the tokens that the parser knows."""

    eos_token_id, bos_token_id, special_token_ids = END, None, (END,)
    tokens = (*(bytes([b]) for b in range(256)), b"<end>")

    def __call__(self, text: Text) -> list[int]:
        return list(encode(text))


@cache
def _library() -> tuple[Any, Any]:
    """(the module, its tokenizer of bytes)."""
    try:
        import llguidance
    except ImportError:
        raise ConfigError("constraints need the package llguidance: pip install 'bytelm[constraints]'") from None
    wrapper = llguidance.TokenizerWrapper(_Bytes())
    return llguidance, llguidance.LLTokenizer(wrapper, n_vocab=END + 1)


class Constrained(ByteLM):
    """`lm` with only those texts possible that match as a whole: each step keeps to bytes with which some match goes
    on, renormalised. `prompt` stands before every text and need not match.

    One of `regex` (Rust's syntax, over characters) and `grammar` (Lark's, as llguidance reads it) is given. Raises
    ConfigError for one that cannot be read.
    """

    def __init__(self, lm: ByteLM, *, regex: str | None = None, grammar: str | None = None, prompt: Text = b""):
        if (regex is None) == (grammar is None):
            raise ConfigError("a constraint is a regex or a grammar: give one")
        library, _ = _library()
        matcher = library.LLMatcher
        self._source = matcher.grammar_from_regex(regex) if regex is not None else matcher.grammar_from_lark(grammar)
        self.lm, self.prompt = lm, encode(prompt)
        self.window = lm.window
        found = self.matcher()
        if found.is_error():
            raise ConfigError(f"the constraint cannot be read: {found.get_error()}")

    def matcher(self) -> Any:
        """A parser in front of a text."""
        library, tokenizer = _library()
        return library.LLMatcher(tokenizer, self._source)

    def logprobs_batch(self, prefixes: Sequence[Text], *, inputs: Sequence[Text] | None = None) -> NDArray[np.float64]:
        one = inputs if inputs is None or len(set(map(encode, inputs))) > 1 else inputs[:1]
        return self.follow(prefixes, inputs=one).logprobs() if prefixes else np.zeros((0, END + 1))

    def score_batch(
        self,
        texts: Sequence[Text],
        contexts: Sequence[Text] | None = None,
        window: int | None = None,
        *,
        inputs: Sequence[Text] | None = None,
    ) -> list[Score]:
        """Byte by byte. A byte that does not match has -inf, and so have those behind it. Raises ConfigError where a
        context does not match."""
        if window is not None:
            raise ConfigError("window: a constrained model is scored byte by byte, over the whole text")
        out = []
        for n, (context, text) in enumerate(in_context(texts, contexts)):
            logs = score_steps(self.follow([context], inputs=None if inputs is None else [inputs[n]]), text)
            out.append(Score(float(logs.sum()), logs))
        return out

    def follow(self, prompts: Sequence[Text], *, inputs: Sequence[Text] | None = None) -> Follower:
        """Texts that grow. Raises ConfigError where a prompt does not match."""
        return _Matching(self, [encode(p) for p in prompts], inputs)


class _Matching(Follower):
    def __init__(self, lm: Constrained, prompts: list[bytes], inputs: Sequence[Text] | None):
        self._follower = lm.lm.follow([lm.prompt + p for p in prompts], inputs=inputs)
        self._matchers: list[Any] = [lm.matcher() for _ in prompts]  # None: the text has ended
        for matcher, prompt in zip(self._matchers, prompts):
            for place, byte in enumerate(prompt):
                if not _allowed(matcher)[byte]:
                    raise ConfigError(f"no text that matches the constraint begins with {prompt[: place + 1]!r}")
                matcher.consume_token(byte)

    def logprobs(self) -> NDArray[np.float64]:
        rows = self._follower.logprobs()
        for row, matcher in zip(rows, self._matchers):
            if matcher is None:
                continue
            row[~_allowed(matcher)] = -np.inf
            total = np.logaddexp.reduce(row)
            if not total > -np.inf:
                raise ConfigError("the model gives probability 0 to all that the constraint allows here")
            row -= total
        return rows

    def push(self, symbols: Sequence[int]) -> None:
        for i, symbol in enumerate(symbols):
            matcher = self._matchers[i]
            if symbol == END:
                self._matchers[i] = None
            elif matcher is not None and not matcher.consume_token(symbol):
                raise ConfigError(f"byte 0x{symbol:02X} does not match the constraint here")
        self._follower.push(symbols)


def _allowed(matcher: Any) -> NDArray[np.bool_]:
    """Which symbols may come next, [257]."""
    bits = np.frombuffer(matcher.compute_bitmask(), np.uint8)
    return np.unpackbits(bits, bitorder="little")[: END + 1].astype(bool)
