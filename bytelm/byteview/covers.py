"""Texts that grow: their trees of covers, and what the model reads of them."""

from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from bytelm.byteview.beam import LazyTree
from bytelm.byteview.cover import Tree
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
