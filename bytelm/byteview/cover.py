"""The covers of a byte prefix, as a tree that grows byte by byte.

A cover of x is a string of tokens whose text reaches the end of x with its last token and not before. A node of the
tree is the inside of covers: tokens whose bytes are x[:end] exactly. A node is open while some token spells what comes
behind it. Theory: Phan et al. 2024, "Exact byte-level probabilities from tokenized language models".
"""

import dataclasses
from collections.abc import Sequence
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from bytelm.byteview.readings import State
from bytelm.byteview.segmenter import Kept
from bytelm.byteview.vocabulary import Vocabulary

Semantics = Literal["masked", "canonical", "lastfree", "all"]


@dataclasses.dataclass(eq=False)
class Node:
    """Tokens whose bytes are x[:end], and which tokens may come behind them."""

    token: int  # the last one; the start symbol in the root
    parent: "Node | None"
    end: int  # bytes; -1: it stands before the text
    depth: int  # tokens before it
    state: State
    marks: tuple[int, ...]  # byte offsets of the state's places: its last certain cut, its edges
    tail: tuple[int, ...]  # the last tokens, as many as the segmenter looks at
    ranges: list[tuple[int, int]]  # places in the vocabulary's order of the tokens that spell the next 0, 1, .. bytes
    logp: float = 0.0  # of the tokens under the model, natural log
    lane: int = 0  # which of the texts that the model reads side by side it belongs to
    slot: int = -1  # where the model keeps it, among those of its lane
    row: NDArray[np.float64] | None = None  # ln p of each token behind it, [v]; what is not allowed has -inf
    children: "list[Node]" = dataclasses.field(default_factory=list)  # that are held
    passed: bool = False  # of a node that waits (beam.py): some token behind it ends inside the text

    def ancestors(self) -> "list[Node]":
        """Itself, its parent and so on up to the root."""
        out, node = [], self
        while node is not None:
            out.append(node)
            node = node.parent
        return out


def chain(tokens: Sequence[int], lane: int = 0) -> list[Node]:
    """One node for each of some tokens in a row, the first of which starts the text. For the model only."""
    nodes: list[Node] = []
    for n, token in enumerate(tokens):
        nodes.append(Node(token, nodes[-1] if nodes else None, -1, n, State(), (), (), [], lane=lane))
    return nodes


class Grammar:
    """Which tokens may follow a node. `lead`: what the tokenizer puts in front of the text."""

    def __init__(self, vocabulary: Vocabulary, lead: bytes = b""):
        self.vocabulary, self.lead = vocabulary, lead
        self._masks = Kept(len(vocabulary.tokens))

    def root(self, trunk: Sequence[int], lane: int = 0) -> Node:
        """The empty text behind some tokens."""
        before = chain(trunk[:-1], lane)
        parent = before[-1] if before else None
        ranges = [(0, len(self.vocabulary.order))]
        return Node(trunk[-1], parent, 0, len(before), State(), (0,), (), ranges, lane=lane)

    def child(self, node: Node, token: int, text: bytes) -> Node | None:
        """The node behind one more token, or None where no text begins with these tokens. `text`: all of its bytes."""
        v = self.vocabulary
        data = v.tokens[token] or b""
        end = node.end + len(data)
        if not v.segmenter.beginning[token] and not self.mask(node, text)[token]:
            return None  # a token that merges do not make, where it is no piece of its own
        bars = ()
        if v.whole_pieces:
            bars = tuple(n for n, place in enumerate(node.marks)
                         if place < node.end and text[place:end] in v.unreachable)  # fmt: skip
        joins = bool(node.tail) and bool(v.segmenter.following(node.tail)[token])
        found = v.readings.step(node.state, data, joins, bars)
        if found is None:
            return None
        state, kept = found
        places = (*node.marks, node.end, end)
        tail = v.segmenter.tail((*node.tail, token))
        marks = tuple(places[i] for i in kept)
        return Node(token, node, end, node.depth + 1, state, marks, tail, [(0, len(v.order))], lane=node.lane)

    def mask(self, node: Node, text: bytes) -> NDArray[np.bool_]:
        """Which tokens may come next, [v]: those with which some text begins; the end symbol, if one ends here."""
        v = self.vocabulary
        bare = bool(self.lead) and node.end == len(self.lead)  # the lead stands in front of a text, never alone
        out = self._masks.get((node.state, node.tail, bare), lambda: self._mask(node, bare))
        if v.whole_pieces:
            heads = [text[place : node.end] for place in node.marks if place < node.end]
            closing = sorted({t for head in heads for t in v.closing(head)})
            if closing:  # with these a piece would be complete that is a token itself: it must go on
                out = out.copy()
                number = np.maximum(v.readings.kinds(node.state)[closing], 0)
                exists = v.readings.allowed(node.state).exists[:, :, number]
                out[closing] &= exists[0, 0] | exists[1].any(axis=0)
        return out

    def _mask(self, node: Node, bare: bool) -> NDArray[np.bool_]:
        v = self.vocabulary
        kinds, allowed = v.readings.kinds(node.state), v.readings.allowed(node.state)
        number, beginning = np.maximum(kinds, 0), v.segmenter.beginning
        out = allowed.exists[1].any(axis=0)[number] & beginning
        if node.tail:
            out |= allowed.exists[0].any(axis=0)[number] & v.segmenter.following(node.tail)
        if v.whole_pieces:
            out |= allowed.exists[1, 1][number] & ~beginning
        out &= kinds >= 0
        out[v.ends] = allowed.end and not bare
        return out


class Tree:
    """The covers of a text that grows behind some tokens, the trunk. What the model says of a node is put into it from
    outside."""

    def __init__(self, grammar: Grammar, semantics: Semantics, trunk: Sequence[int], lane: int = 0):
        self.grammar, self.semantics = grammar, semantics
        self.text = b""
        self.root = grammar.root(trunk, lane)
        self.open = [self.root]  # nodes some of whose tokens spell what comes behind them
        self.new = self.root.ancestors()[::-1]  # nodes that the model has not seen

    def push(self, byte: int) -> list[Node]:
        """One more byte. Gives the nodes that it closes: no token of theirs spells the text any more."""
        v = self.grammar.vocabulary
        self.text += bytes([byte])
        end, still, closed = len(self.text), [], []
        for node in self.open:
            low, high = narrow(v, *node.ranges[-1], byte, end - 1 - node.end)
            node.ranges.append((low, high))
            (still if low < high else closed).append(node)
            stop = low + int(np.searchsorted(v.lengths[low:high] > end - node.end, True))
            for place in range(low, stop):  # tokens that end here
                child = self.child(node, int(v.order[place]), self.text)
                if child is not None:
                    node.children.append(child)
                    if node.row is not None:
                        child.logp = node.logp + float(node.row[child.token])
                    still.append(child)
                    self.new.append(child)
        self.open = still
        return closed

    def back(self, opened: list[Node]) -> list[Node]:
        """Takes the last byte back, and gives the nodes that end with it; `opened`: the open nodes before it. Nothing
        may have been dropped since."""
        end, gone = len(self.text), []
        for node in opened:
            node.ranges.pop()
            gone += [child for child in node.children if child.end == end]
            node.children = [child for child in node.children if child.end != end]
        self.text, self.open = self.text[:-1], opened
        return gone

    def child(self, node: Node, token: int, text: bytes) -> Node | None:
        """The node behind one more token (None: no text begins so). `text`: all of its bytes."""
        if self.semantics != "all":
            return self.grammar.child(node, token, text)
        ranges = [(0, len(self.grammar.vocabulary.order))]
        return Node(token, node, len(text), node.depth + 1, State(), (), (), ranges, lane=node.lane)

    def mask(self, node: Node) -> NDArray[np.bool_] | None:
        """Which tokens count behind a node, [v]; None: all."""
        return None if self.semantics in ("lastfree", "all") else self.grammar.mask(node, self.text)

    def drop(self, closed: list[Node]) -> list[Node]:
        """Takes away closed nodes that nothing stands behind, and those that are left without anything; gives them."""
        return self._drop(closed, {id(node) for node in self.open})

    @staticmethod
    def _drop(closed: Sequence[Node], alive: set[int]) -> list[Node]:
        gone, kept = [], set(alive)
        for node in closed:
            while not node.children and id(node) not in kept:
                kept.add(id(node))  # once
                gone.append(node)
                node.row, parent = None, node.parent
                if parent is None or parent.end < 0:
                    break
                parent.children.remove(node)
                node = parent
        return gone

    def held(self) -> list[Node]:
        """Every node that is still held, and the trunk."""
        out, todo = self.root.ancestors()[1:], [self.root]
        while todo:
            node = todo.pop()
            out.append(node)
            todo += node.children
        return out

    def fill(self, node: Node, row: NDArray[np.floating]) -> None:
        """Gives a node the model's logits over tokens behind it; its parent must have been given them before."""
        if node.end < 0:
            return
        row = np.asarray(row, np.float64)
        row = row - log_sum(row)
        if self.semantics == "masked":
            row = np.where(self.grammar.mask(node, self.text), row, -np.inf)
            row = row - log_sum(row)
        node.row = row
        for child in node.children:
            child.logp = node.logp + float(row[child.token])

    def inside(self, node: Node, n: int) -> NDArray[np.float64]:
        """ln of the mass that a node's tokens give to each symbol behind the first n bytes, [257]."""
        v = self.grammar.vocabulary
        low, high = node.ranges[n - node.end]
        ids, depth = v.order[low:high], n - node.end
        assert node.row is not None
        row = node.row[ids]
        mask = self.mask(node)
        if self.semantics == "canonical" and mask is not None:
            row = np.where(mask[ids], row, -np.inf)
        out = np.full(257, -np.inf)
        byte = v.table[low:high, depth] if depth < v.table.shape[1] else np.full(len(ids), -1)
        longer = byte >= 0
        top = row[longer].max(initial=-np.inf)
        if top > -np.inf:
            with np.errstate(divide="ignore"):
                out[:256] = np.log(np.bincount(byte[longer], np.exp(row[longer] - top), 256)) + top
        if not depth and (mask is None or mask[v.ends[0]]):
            out[256] = log_sum(node.row[v.ends])
        return out

    def reaching(self, node: Node, n: int) -> float:
        """ln of the mass of a node's tokens that spell the bytes from its end to n and perhaps go on. With canonical
        covers the mask counts."""
        low, high = node.ranges[n - node.end]
        ids = self.grammar.vocabulary.order[low:high]
        assert node.row is not None
        row = node.row[ids]
        if self.semantics == "canonical":
            row = np.where(self.grammar.mask(node, self.text)[ids], row, -np.inf)
        return log_sum(row)

    def log_mass(self) -> NDArray[np.float64]:
        """ln of the mass of the covers of the text and each next symbol, [257]; not normalised."""
        return self._mass(self.open, len(self.text))

    def _mass(self, opened: list[Node], n: int) -> NDArray[np.float64]:
        parts = [self.inside(node, n) + node.logp for node in opened]
        return np.logaddexp.reduce(parts, axis=0) if parts else np.full(257, -np.inf)

    def possible(self) -> bool:
        """Whether some text begins with the text so far (lastfree, all: whether tokens spell it)."""
        if self.semantics in ("lastfree", "all"):
            return bool(self.open)
        order = self.grammar.vocabulary.order
        for node in self.open:
            low, high = node.ranges[-1]
            mask = self.grammar.mask(node, self.text)
            if mask[order[low:high]].any() or (node.end == len(self.text) and mask[self.grammar.vocabulary.ends[0]]):
                return True
        return False

    def logprobs(self) -> NDArray[np.float64]:
        """ln p of each next symbol, [257]; all -inf where no text begins so."""
        return _normalised(self.log_mass())

    def logprobs_at(self, opened: list[Node], n: int) -> NDArray[np.float64]:
        """`logprobs` behind the first n bytes, where the nodes `opened` were open."""
        return _normalised(self._mass(opened, n))


def _normalised(mass: NDArray[np.float64]) -> NDArray[np.float64]:
    total = log_sum(mass)
    return mass - total if total > -np.inf else mass


def narrow(vocabulary: Vocabulary, low: int, high: int, byte: int, depth: int) -> tuple[int, int]:
    """Of tokens low .. high - 1 in order, which share their first `depth` bytes, those with the next byte given."""
    if depth >= vocabulary.table.shape[1] or low >= high:
        return low, low
    a, b = np.searchsorted(vocabulary.table[low:high, depth], [byte, byte + 1])
    return low + int(a), low + int(b)


def log_sum(x: NDArray[np.float64]) -> float:
    """ln of the sum of exp."""
    top = x.max(initial=-np.inf)
    return float(top + np.log(np.exp(x - top).sum())) if top > -np.inf else -np.inf
