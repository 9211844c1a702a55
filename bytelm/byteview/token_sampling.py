"""Going on with a prompt token by token: one cover of the prompt is drawn, then tokens behind it.

Drawn as they come (temperature 1), the bytes have the law of drawing byte by byte, for one model call a token instead
of one a byte. At another temperature, or with top_k or top_p, they do not: these mean other things of tokens than of
bytes.
"""

from collections.abc import Iterator, Sequence

import numpy as np
from numpy.typing import NDArray

from bytelm.byteview.cover import Node, Tree
from bytelm.byteview.token_model import Session
from bytelm.following import choose, emit
from bytelm.generate import Sampling


class _Row:
    """One text: what it is so far, and its last token."""

    def __init__(self, tree: Tree, sampling: Sampling, rng: np.random.Generator):
        self.tree, self.sampling, self.rng = tree, sampling, rng
        self.text, self.node = tree.text, tree.root

    def first(self) -> bytes | None:
        """Draws a cover: what it has behind the prompt; None for the end of the text."""
        v, n = self.tree.grammar.vocabulary, len(self.text)
        nodes, ids, logs = [], [], []
        for node in self.tree.open:
            low, high = node.ranges[-1]
            found = v.order[low:high][v.lengths[low:high] > n - node.end]
            if node.end == n:
                found = np.concatenate([found, np.array(v.ends, found.dtype)])
            assert node.row is not None
            mask = self.tree.mask(node)
            row = node.row[found] if mask is None else np.where(mask[found], node.row[found], -np.inf)
            nodes += [node] * len(found)
            ids.append(found)
            logs.append(row + node.logp)
        place = choose(np.concatenate(logs), self.sampling, self.rng)
        return self._take(nodes[place], int(np.concatenate(ids)[place]))

    def next(self, logits: NDArray[np.floating]) -> bytes | None:
        """Draws the token behind the last one: its bytes; None for the end of the text."""
        v = self.tree.grammar.vocabulary
        mask = self.tree.mask(self.node)
        logs = np.where(v.spoken if mask is None else mask, np.asarray(logits, np.float64), -np.inf)
        return self._take(self.node, choose(logs, self.sampling, self.rng))

    def _take(self, node: Node, token: int) -> bytes | None:
        v = self.tree.grammar.vocabulary
        if token in v.ends:
            return None
        new = (v.tokens[token] or b"")[len(self.text) - node.end :]
        self.text += new
        self.tree.text = self.text
        child = self.tree.child(node, token, self.text)
        assert child is not None, "a token that the mask allows has a node"
        self.node = child
        return new


def draw_tokens(
    session: Session,
    trees: Sequence[Tree],
    max_bytes: int,
    sampling: Sampling,
    seed: int,
    stop: tuple[bytes, ...],
    block: int,
) -> Iterator[list[bytes]]:
    """New bytes of each text, about every `block` bytes and at the end. The trees are those of the prompts, read in the
    session. Row i draws with a generator of (seed, i)."""
    rows = [_Row(tree, sampling, np.random.default_rng([seed, i])) for i, tree in enumerate(trees)]
    begun = False

    def step(done: list[bool]) -> list[bytes | None]:
        nonlocal begun
        out: list[bytes | None] = [None] * len(rows)
        live = [i for i in range(len(rows)) if not done[i]]
        if not begun:
            begun = True
            for i in live:
                out[i] = rows[i].first()
                keep = {id(node) for node in rows[i].node.ancestors()}
                session.forget([node for node in trees[i].held() if id(node) not in keep])
            return out
        for i, logits in zip(live, session.read([rows[i].node for i in live])):
            out[i] = rows[i].next(logits)
        return out

    return emit(step, len(rows), max_bytes, stop, block)
