"""Covers that are read only as far as they matter, with a bound on what was left out.

What a node is worth is known before the model sees it: its parent says how probable its last token is. So nodes wait
until their share of the mass is more than `skip`, and where every way to cut a text counts, only the `beam` most
probable strings of tokens are kept. What waits or was taken away is a mass R beside the mass K of what was read. So
p(b | x) lies between K_b / (K + R) and (K_b + R) / (K + R), and the distribution given, K_b / K, is no further than
R / (K + R) from the true one (total variation).
"""

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from bytelm.byteview.cover import Grammar, Node, Semantics, Tree, log_sum, narrow


class LazyTree(Tree):
    """A tree some of whose nodes wait to be read. While `eager`, all are read, as in `Tree`: for a prompt, whose nodes
    the model can see all at once."""

    def __init__(
        self,
        grammar: Grammar,
        semantics: Semantics,
        trunk: Sequence[int],
        lane: int = 0,
        *,
        skip: float,
        beam: int,
        eager: bool,
    ):
        super().__init__(grammar, semantics, trunk, lane)
        self.skip, self.beam, self.eager = skip, beam, eager
        self.waiting: list[Node] = []  # unread; their parents are read
        self.lost = -np.inf  # ln of the mass taken away
        self._spent: list[Node] = []  # read in vain: nothing stands behind them
        self._known: dict[int, NDArray[np.float64]] = {}  # what the nodes give to the next symbol
        if not eager:
            self.open = []

    def push(self, byte: int) -> list[Node]:
        self._known = {}
        closed = super().push(byte)
        if self.eager:
            return closed
        closed, self._spent = closed + self._spent, []
        # What the model has not seen has no children yet; `new` are those that the last step made.
        self.waiting, self.new, self.open = self.waiting + self.new, [], [n for n in self.open if n.row is not None]
        return closed + self._narrow_waiting()

    def _narrow_waiting(self) -> list[Node]:
        still, closed = [], []
        for node in self.waiting:
            alive = self._catch_up(node)
            (still if alive else closed).append(node)
        self.waiting = still
        return closed

    def _catch_up(self, node: Node) -> bool:
        """Brings an unread node's ranges up to the end of the text; whether anything can stand behind it."""
        v = self.grammar.vocabulary
        while len(node.ranges) <= len(self.text) - node.end:
            depth = len(node.ranges) - 1
            low, high = narrow(v, *node.ranges[-1], self.text[node.end + depth], depth)
            node.ranges.append((low, high))
            node.passed |= low < high and bool(v.lengths[low] == depth + 1)  # the shortest of a range stand first
        return node.passed or node.ranges[-1][0] < node.ranges[-1][1]

    def fill(self, node: Node, row: NDArray[np.floating]) -> None:
        super().fill(node, row)
        if self.eager or node.end < 0:
            return
        v = self.grammar.vocabulary
        self._catch_up(node)
        for depth, (low, high) in enumerate(node.ranges[1:], 1):
            stop = low + int(np.searchsorted(v.lengths[low:high] > depth, True))
            for place in range(low, stop):
                child = self.child(node, int(v.order[place]), self.text[: node.end + depth])
                if child is not None:
                    child.logp = node.logp + float(node.row[child.token])  # type: ignore[index]
                    if child.logp > -np.inf and self._catch_up(child):
                        node.children.append(child)
                        self.waiting.append(child)
        if node.ranges[-1][0] < node.ranges[-1][1]:
            self.open.append(node)
        elif not node.children:
            self._spent.append(node)

    def inside(self, node: Node, n: int) -> NDArray[np.float64]:
        if id(node) not in self._known:
            self._known[id(node)] = super().inside(node, n)
        return self._known[id(node)]

    def choose(self) -> list[Node]:
        """Takes the nodes that the model must see next out of those that wait."""
        masses = np.array([node.logp for node in self.waiting])
        if not len(masses):
            return []
        order = np.argsort(-masses)
        rest = np.logaddexp.accumulate(masses[order][::-1])[::-1]  # of a node and all less probable ones
        total = np.logaddexp(log_sum(self.log_mass()), rest[0])
        with np.errstate(divide="ignore"):
            count = int((rest > np.log(self.skip) + total).sum())
        chosen = [self.waiting[i] for i in order[:count]]
        self.waiting = [self.waiting[i] for i in order[count:]]
        return chosen

    def prune(self) -> list[Node]:
        """Takes away all but the `beam` most probable nodes; gives those that no node stands behind any more."""
        spare = len(self.open) + len(self.waiting) - self.beam
        if not self.beam or spare <= 0:
            return []
        n = len(self.text)
        masses = [(node.logp, node) for node in self.waiting]
        masses += [(node.logp + log_sum(self.inside(node, n)), node) for node in self.open]
        masses.sort(key=lambda pair: pair[0])
        gone = [node for _, node in masses[:spare]]
        self.lost = np.logaddexp(self.lost, log_sum(np.array([mass for mass, _ in masses[:spare]])))
        names = {id(node) for node in gone}
        self.open = [node for node in self.open if id(node) not in names]
        self.waiting = [node for node in self.waiting if id(node) not in names]
        return self.drop(gone)

    def drop(self, closed: list[Node]) -> list[Node]:
        return self._drop(closed, {id(node) for node in (*self.open, *self.waiting)})

    def left_out(self) -> float:
        """ln of the mass R at most that was not read."""
        return float(np.logaddexp(self.lost, log_sum(np.array([node.logp for node in self.waiting]))))

    def bound(self) -> float:
        """Total variation to the true distribution, at most."""
        left = self.left_out()
        total = np.logaddexp(log_sum(self.log_mass()), left)
        return float(np.exp(left - total)) if total > -np.inf else 1.0

    def interval(self) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
        """(least, greatest) probability of each next symbol, [257] each."""
        mass, left = self.log_mass(), self.left_out()
        total = np.logaddexp(log_sum(mass), left)
        if total == -np.inf:
            return np.zeros(257), np.ones(257)
        return np.exp(mass - total), np.minimum(np.exp(np.logaddexp(mass, left) - total), 1.0)

    def possible(self) -> bool:
        """Whether what was read and kept spells the text."""
        return super().possible() if self.eager else log_sum(self.log_mass()) > -np.inf
