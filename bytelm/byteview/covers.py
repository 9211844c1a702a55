"""Texts that grow: their trees of covers, and what the model reads of them."""

from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from bytelm.byteview.beam import LazyTree
from bytelm.byteview.cover import Node, Tree
from bytelm.following import Follower
from bytelm.vocab import END

if TYPE_CHECKING:
    from bytelm.byteview.byte_view import TokenizedLM


class Covers(Follower):
    """The covers of some texts that grow. A text longer than the model has room for is read again from its later half
    where the model slides; else ConfigError."""

    def __init__(self, lm: "TokenizedLM", prompts: list[bytes], skip: float):
        self._lm, self._skip = lm, skip
        self.session = lm.model.session(lanes=max(len(prompts), 1))
        self._texts, self._from = list(prompts), [0] * len(prompts)  # and which byte of each its tree begins with
        self.trees: list[Tree | None] = [None] * len(prompts)  # None: the text has ended
        self._begin(list(range(len(prompts))))

    def _begin(self, which: list[int]) -> None:
        """Reads some of the texts from their beginning."""
        lm, lazy = self._lm, self._lm.semantics == "all" or self._skip > 0
        for i in which:
            self._from[i] = lm.seen_from(self._texts[i]) if lm.slides else 0
        texts = {i: self._texts[i][self._from[i] :] for i in which}
        if not lazy:
            for i, text in texts.items():
                self.trees[i] = lm.tree(text, i)
            return
        texts = {i: lm.before + text for i, text in texts.items()}
        eager, options = lm.semantics != "all", dict(skip=self._skip, beam=lm.beam)
        new = {i: LazyTree(lm.grammar, lm.semantics, lm.trunk, i, eager=eager, **options) for i in texts}
        for n in range(max(map(len, texts.values()), default=0)):
            growing = {i: tree for i, tree in new.items() if n < len(texts[i])}
            if not eager:
                self._settle(list(growing.values()))
            for i, tree in growing.items():
                gone = tree.push(texts[i][n])
                self.session.forget([] if eager else tree.drop(gone))
        if eager:
            lm.read(self.session, list(new.values()))
            for tree in new.values():
                tree.eager = False
        for i, tree in new.items():
            self.trees[i] = tree

    def possible(self) -> list[bool]:
        """Whether some text begins with each text."""
        self._settle([tree for tree in self.trees if isinstance(tree, LazyTree)])
        return [tree is None or tree.possible() for tree in self.trees]

    def _settle(self, trees: Sequence[Tree]) -> None:
        """Reads what must be read."""
        while True:
            self._lm.read(self.session, trees)
            for tree in trees:
                if isinstance(tree, LazyTree):
                    tree.new = tree.choose()
            if not any(tree.new for tree in trees):
                break
        for tree in trees:
            if isinstance(tree, LazyTree):
                self.session.forget(tree.prune())

    def logprobs(self) -> NDArray[np.float64]:
        self._settle([tree for tree in self.trees if tree is not None])
        out = np.full((len(self.trees), END + 1), -np.inf)
        for row, tree in zip(out, self.trees):
            if tree is not None:
                row[:] = tree.logprobs()
        return out

    def bounds(self) -> NDArray[np.float64]:
        """How far each text's distribution may be from the true one (total variation), [n]. After `logprobs`."""
        return np.array([tree.bound() if isinstance(tree, LazyTree) else 0.0 for tree in self.trees])

    def intervals(self) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
        """Least and greatest probability of each next symbol of each text, [n, 257] each. After `logprobs`."""
        pairs = []
        for tree in self.trees:
            if isinstance(tree, LazyTree):
                pairs.append(tree.interval())
            else:
                row = np.zeros(END + 1) if tree is None else np.exp(tree.logprobs())
                pairs.append((row, row))
        return np.stack([low for low, _ in pairs]), np.stack([high for _, high in pairs])

    def look(self, guesses: Sequence[bytes]) -> list[list[NDArray[np.float64]]]:
        """ln p of the symbol behind each text and behind each byte of what is guessed to follow it, all read at once.
        `keep` must come next. For eager trees."""
        self._guessed = []
        for tree, guess in zip(self.trees, guesses):
            steps: list[tuple[list[Node], list[Node]]] = []  # before each byte: the open nodes; those it closes
            if tree is not None:
                for byte in guess:
                    opened = tree.open
                    steps.append((opened, tree.push(byte)))
            self._guessed.append(steps)
        trees = [tree for tree in self.trees if tree is not None]
        self._lm.read(self.session, trees)
        out = []
        for tree, steps in zip(self.trees, self._guessed):
            if tree is None:
                out.append([np.full(END + 1, -np.inf)])
                continue
            places = [*(opened for opened, _ in steps), tree.open]
            first = len(tree.text) - len(steps)
            out.append([tree.logprobs_at(opened, first + n) for n, opened in enumerate(places)])
        return out

    def keep(self, counts: Sequence[int]) -> None:
        """Goes back to the first `counts` bytes of what was guessed for each text."""
        for i, (tree, steps, count) in enumerate(zip(self.trees, self._guessed, counts)):
            if tree is None:
                continue
            self._texts[i] += tree.text[len(tree.text) - len(steps) :][:count]
            for opened, _ in reversed(steps[count:]):
                self.session.forget(tree.back(opened))
            for _, closed in steps[:count]:
                self.session.forget(tree.drop(closed))

    def push(self, symbols: Sequence[int]) -> None:
        for i, (tree, symbol) in enumerate(zip(self.trees, symbols)):
            if tree is None:
                continue
            if symbol != END:
                self._texts[i] += bytes([symbol])
                if not self._lm.slides or self._lm.seen_from(self._texts[i]) == self._from[i]:
                    self.session.forget(tree.drop(tree.push(symbol)))
                    continue
            self.session.forget(tree.held())
            self.trees[i] = None
            if symbol != END:
                self._begin([i])
