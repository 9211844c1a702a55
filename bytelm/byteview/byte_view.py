"""A tokenized language model as a byte language model, by the Byte-Token Representation Lemma (Phan et al. 2024)."""

import unicodedata
from collections.abc import Sequence
from typing import get_args

import numpy as np
from numpy.typing import NDArray

from bytelm.byteview.cover import Grammar, Semantics, Tree, chain, log_sum
from bytelm.byteview.token_model import Session, TokenModel
from bytelm.byteview.vocabulary import Vocabulary
from bytelm.config import ConfigError
from bytelm.following import Follower
from bytelm.protocol import ByteLM, Score, Text, in_context, no_inputs
from bytelm.vocab import END, encode
from bytelm.windows import DEFAULT_WINDOW, scoring_windows, visible_from

BLOCK = 256  # nodes that the model reads at once


class ImpossibleText(ValueError):
    """A text that no text of the tokenizer begins with; the message says where and why."""


class TokenizedLM(ByteLM):
    """Next-byte probabilities of a token model, free of the bias of cutting a prompt into tokens.

    `semantics`: masked (each step keeps to tokens with which some text begins, renormalised: an exact distribution over
    canonical strings of tokens), canonical (the same covers with the model's raw probabilities), lastfree (as
    canonical, the last token of a cover not tested).
    """

    def __init__(self, model: TokenModel, vocabulary: Vocabulary, semantics: str = "masked"):
        if semantics not in get_args(Semantics):
            raise ConfigError(f"semantics={semantics!r}: choose {', '.join(get_args(Semantics))}")
        self.semantics: Semantics = semantics  # type: ignore[assignment]
        if vocabulary.start is None:
            raise ConfigError("the tokenizer has no token that starts a text, so the first one has no probability: "
                              "name one (bos_token in tokenizer_config.json)")  # fmt: skip
        self.model, self.vocabulary = model, vocabulary
        self.grammar = Grammar(vocabulary)
        # A text of so many bytes never has more tokens than the model has positions, the start symbol among them.
        self.window = max(min(DEFAULT_WINDOW, model.config.context - 1 - len(vocabulary.lead)), 1)

    # Trees.

    def tree(self, text: bytes) -> Tree:
        """The covers of a text; the model has seen none of them yet."""
        assert self.vocabulary.start is not None
        tree = Tree(self.grammar, self.semantics, self.vocabulary.start)
        for byte in self.vocabulary.lead + text:
            tree.push(byte)
        return tree

    def read(self, session: Session, trees: Sequence[Tree]) -> None:
        """Lets the model see the new nodes of some trees, all of them at once."""
        todo = [(tree, node) for tree in trees for node in tree.new]
        for first in range(0, len(todo), BLOCK):
            part = todo[first : first + BLOCK]
            for (tree, node), row in zip(part, session.read([node for _, node in part])):
                tree.fill(node, row)
        for tree in trees:
            tree.new.clear()

    def logprobs_batch(self, prefixes: Sequence[Text], *, inputs: Sequence[Text] | None = None) -> NDArray[np.float64]:
        """Raises ImpossibleText where no text begins with a prefix."""
        no_inputs(inputs)
        texts = [encode(p) for p in prefixes]
        for text in texts:
            self._check_normal(text)
        texts = [t[visible_from(len(t), self.window) :] for t in texts]
        trees = [self.tree(t) for t in texts]
        self.read(self.model.session(), trees)
        out = np.stack([tree.logprobs() for tree in trees]) if trees else np.zeros((0, END + 1))
        for text, tree in zip(texts, trees):
            if not tree.possible():
                raise ImpossibleText(self.why(text))
        return out

    def _check_normal(self, text: bytes) -> None:
        """Raises ImpossibleText for a text that the tokenizer would first turn into another."""
        form = self.vocabulary.normal
        if form and not unicodedata.is_normalized(form, text.decode(errors="ignore")):
            raise ImpossibleText(f"the text is not in Unicode's {form}, into which the tokenizer puts every text: "
                                 f"normalise it first (unicodedata.normalize({form!r}, text))")  # fmt: skip

    def why(self, text: bytes) -> str:
        """Why no text of the tokenizer begins with these bytes."""
        end = next(n for n in range(1, len(text) + 1) if not self.tree(text[:n]).possible())
        return (
            f"no text of this tokenizer begins with these bytes: nothing spells byte 0x{text[end - 1]:02X} at offset "
            f"{end - 1} (bytes that are no UTF-8, or a character that its tokens cannot write, have probability 0 "
            f"under semantics={self.semantics})"
        )

    # Scores.

    def score_batch(
        self,
        texts: Sequence[Text],
        contexts: Sequence[Text] | None = None,
        window: int | None = None,
        *,
        inputs: Sequence[Text] | None = None,
    ) -> list[Score]:
        """One pass of the model over the whole tree of a text. A byte that cannot stand where it does has -inf, and so
        have those behind it."""
        no_inputs(inputs)
        if window is not None and not 1 <= window <= self.window:
            raise ConfigError(f"window={window}: must be in 1 .. {self.window} bytes, which this model has room for")
        scores = []
        for context, text in in_context(texts, contexts):
            self._check_normal(context + text)
            logs = np.zeros(len(text))
            for first, end, scored in scoring_windows(len(context), len(context) + len(text), window or self.window):
                part = self._score((context + text)[first:end], scored - first)
                logs[scored - len(context) : end - len(context)] = part
            scores.append(Score(float(logs.sum()), logs))
        return scores

    def _score(self, text: bytes, scored: int) -> NDArray[np.float64]:
        """ln p of each byte of a text from place `scored` on."""
        tree, session = self.tree(text), self.model.session(1 << max(len(text), 1).bit_length())
        lead = len(self.vocabulary.lead)
        total, exact = lead + len(text), self.semantics == "masked"
        mass = np.full(total + 1, -np.inf)  # of the covers of the first n bytes
        symbols = np.full((total, END + 1), -np.inf) if not exact else None
        mass[0] = 0.0
        for first in range(0, len(tree.new), BLOCK):
            nodes = tree.new[first : first + BLOCK]
            for node, row in zip(nodes, session.read(nodes)):
                tree.fill(node, row)
                for n, (low, high) in enumerate(node.ranges, node.end):
                    if low == high:
                        continue
                    if symbols is None and n > node.end:
                        mass[n] = np.logaddexp(mass[n], tree.reaching(node, n) + node.logp)
                    if symbols is not None and n < total:
                        symbols[n] = np.logaddexp(symbols[n], tree.inside(node, n) + node.logp)
                node.row = None  # its children know what it says of them
        with np.errstate(invalid="ignore"):
            if symbols is not None:
                rows = symbols[lead + scored :]
                logs = np.array([row[c] - log_sum(row) for row, c in zip(rows, text[scored:])])
            else:
                logs = np.diff(mass[lead + scored :])
        dead = np.flatnonzero(~np.isfinite(logs))
        if len(dead):
            logs[dead[0] :] = -np.inf
        return logs

    def score_tokens(self, texts: Sequence[Text]) -> list[float]:
        """ln p of the tokens that the tokenizer makes of each text, as token models are usually scored: in windows of
        the model's context, each token once, the first of a later window behind the token before it."""
        out = []
        assert self.vocabulary.start is not None
        for text in map(encode, texts):
            self._check_normal(text)
            try:
                ids = self.vocabulary.encode(text)
            except UnicodeDecodeError as e:
                raise ImpossibleText(f"the text is no UTF-8 at offset {e.start}: it has no tokens") from None
            if ids is None:
                raise ImpossibleText(self.why(text))
            row, total = [self.vocabulary.start, *ids], 0.0
            for first, end, scored in scoring_windows(0, len(ids), self.model.config.context):
                session, nodes = self.model.session(), chain(row[first:end])
                for begin in range(0, len(nodes), BLOCK):
                    part = nodes[begin : begin + BLOCK]
                    for n, logits in enumerate(session.read(part), first + begin):
                        if n >= scored:
                            logits = logits.astype(np.float64)
                            total += float(logits[ids[n]] - log_sum(logits))
            out.append(total)
        return out

    # Samples.

    def _continue(self, prompts, inputs, max_bytes, sampling, seed, stop, block):
        if any(len(p) + max_bytes > self.window for p in prompts):
            raise ConfigError(f"prompt and continuation are longer than the {self.window} bytes that this model has "
                              "room for: shorten the prompt or ask for fewer bytes")  # fmt: skip
        return super()._continue(prompts, inputs, max_bytes, sampling, seed, stop, block)

    def follow(self, prompts: Sequence[Text], *, inputs: Sequence[Text] | None = None) -> Follower:
        """Texts that grow on one cache: about one token read a byte. Raises ImpossibleText."""
        no_inputs(inputs)
        texts = [encode(p) for p in prompts]
        for text in texts:
            self._check_normal(text)
        return _Trees(self, texts)


class _Trees(Follower):
    """The covers of some texts."""

    def __init__(self, lm: TokenizedLM, prompts: list[bytes]):
        self._lm, self._session = lm, lm.model.session()
        self._trees: list[Tree | None] = [lm.tree(p) for p in prompts]
        for tree, prompt in zip(self._trees, prompts):
            if tree is not None and not tree.possible():
                raise ImpossibleText(lm.why(prompt))

    def logprobs(self) -> NDArray[np.float64]:
        self._lm.read(self._session, [tree for tree in self._trees if tree is not None])
        dead = np.full(END + 1, -np.inf)
        return np.stack([dead if tree is None else tree.logprobs() for tree in self._trees])

    def push(self, symbols: Sequence[int]) -> None:
        for i, (tree, symbol) in enumerate(zip(self._trees, symbols)):
            if tree is not None and symbol == END:
                self._session.forget([node for node in tree.held() if node.slot >= 0])
                self._trees[i] = None
            elif tree is not None:
                self._session.forget(tree.drop(tree.push(symbol)))
