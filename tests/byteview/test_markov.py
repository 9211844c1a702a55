"""Markov sources read through a tokenizer: the byte view gives back the source exactly (Phan et al. 2024)."""

import itertools
import json

import numpy as np
import pytest

from bytelm.byteview.cover import Grammar, Tree
from bytelm.byteview.pretokenizer import Pretokenizer
from bytelm.byteview.segmenter import BytePairs, Longest
from bytelm.byteview.vocabulary import Vocabulary


@pytest.fixture(scope="module")
def cases(root):
    return json.loads((root / "tests/golden/convert/markov.json").read_text())


def vocabulary_of(case):
    pieces = [p.encode() for p in case["pieces"]]
    tokens = (*pieces, None, None)
    if case["kind"] == "mpe":
        segmenter = Longest(tokens)
    else:
        ids = {p: i for i, p in enumerate(pieces)}
        merges = [(ids[a.encode()], ids[b.encode()], ids[(a + b).encode()]) for a, b in case["merges"]]
        segmenter = BytePairs(tokens, merges, units=lambda piece: [ids[bytes([b])] for b in piece])
    return Vocabulary(tokens, segmenter, Pretokenizer(), ends=[len(pieces) + 1], start=len(pieces))


def token_model(case, vocabulary):
    """Exact next-token probabilities of the token strings of all texts: {tokens so far: [v]}."""
    alphabet, k, length = case["alpha"], case["k"], case["N"]
    table: dict[tuple[int, ...], np.ndarray] = {}
    for text in itertools.product(alphabet, repeat=length):
        p = len(alphabet) ** -float(k)
        for n in range(k, length):
            p *= case["transitions"]["".join(text[n - k : n])][alphabet.index(text[n])]
        ids = (*vocabulary.encode("".join(text).encode()), vocabulary.ends[0])
        for n, t in enumerate(ids):
            table.setdefault(ids[:n], np.zeros(len(vocabulary.tokens)))[t] += p
    return {ids: row / row.sum() for ids, row in table.items()}


@pytest.mark.parametrize("semantics", ["masked", pytest.param("canonical", marks=pytest.mark.slow)])
@pytest.mark.parametrize("number", [0, 1, *(pytest.param(n, marks=pytest.mark.slow) for n in range(2, 7))])
def test_transitions_are_given_back(cases, number, semantics):
    case = cases[number]
    vocabulary = vocabulary_of(case)
    table, grammar = token_model(case, vocabulary), Grammar(vocabulary)
    alphabet, k = case["alpha"], case["k"]
    for row in case["token_lm_rows"].items():
        ids = tuple(vocabulary.tokens.index(p.encode()) for p in row[0].split())
        for piece, p in row[1].items():
            if piece.encode() in vocabulary.tokens:
                assert table[ids][vocabulary.tokens.index(piece.encode())] == pytest.approx(p, abs=1e-12)
    naive, checked = 0.0, 0
    for n in range(k, 6):
        for text in itertools.product(alphabet, repeat=n):
            data = "".join(text).encode()
            tree = Tree(grammar, semantics, [vocabulary.start])
            for byte in data:
                tree.push(byte)
            with np.errstate(divide="ignore"):
                for node in tree.new:
                    ids = tuple(a.token for a in reversed(node.ancestors()[:-1]))
                    tree.fill(node, np.log(table.get(ids, np.full(len(vocabulary.tokens), 1e-300))))
            found = np.exp(tree.logprobs())[[ord(c) for c in alphabet]]
            expected = np.array(case["transitions"]["".join(text[n - k :])])
            np.testing.assert_allclose(found, expected, atol=1e-12)
            plain = np.zeros(len(alphabet))
            for t, p in enumerate(table.get(tuple(vocabulary.encode(data)), [])):
                if vocabulary.tokens[t]:
                    plain[alphabet.index(chr(vocabulary.tokens[t][0]))] += p
            naive, checked = max(naive, np.abs(plain / max(plain.sum(), 1e-9) - expected).max()), checked + 1
    assert checked > 20 and naive > 0.1  # what the tokens of a prefix alone would say is wrong
