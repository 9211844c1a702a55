"""Vocabularies drawn at random, of every kind of tokenizer, against every short text there is."""

import itertools
from functools import lru_cache

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from test_grammar import check_masks

from bytelm.byteview.cover import Grammar, Tree
from bytelm.byteview.pretokenizer import Pretokenizer
from bytelm.byteview.segmenter import NEVER, BytePairs, CharacterPairs, Longest
from bytelm.byteview.unigram import Unigram
from bytelm.byteview.vocabulary import Vocabulary

pytestmark = pytest.mark.slow
ALPHABETS = {"bytes": "abc", "characters": "ab\u00e9\u00fc"}  # of the second, the last have no token of their own
LENGTH = 6


def vocabulary(kind: str, seed: int, extra: int) -> Vocabulary:
    """A small tokenizer; the last id ends a text, the one before it starts one."""
    rng = np.random.default_rng(seed)
    alphabet = ALPHABETS["bytes" if kind in ("pairs", "longest") else "characters"]
    known = [c.encode() for c in alphabet if kind in ("pairs", "longest") or c.isascii()]
    bytes_of_rest = sorted({bytes([b]) for c in alphabet if c.encode() not in known for b in c.encode()})
    tokens, merges = list(known), []
    for _ in range(200):
        if len(tokens) >= len(known) + extra:
            break
        left, right = rng.integers(0, len(tokens), 2)
        joined = tokens[left] + tokens[right]
        if kind == "unigram" and rng.random() < 0.3:  # such tokens may hold characters that have none
            joined = tokens[left] + alphabet[-1].encode()
        if joined not in tokens and len(joined) <= 4:
            tokens.append(joined)
            merges.append((int(left), int(right), len(tokens) - 1))
    fallback = [False] * len(tokens) + [True] * len(bytes_of_rest) + [False, False]
    every = [*tokens, *bytes_of_rest, None, None]
    if kind == "pairs":
        ids = {t: i for i, t in enumerate(tokens)}
        segmenter = BytePairs(every, merges, units=lambda piece: [ids[bytes([b])] for b in piece])
    elif kind == "characters":
        rank = [*range(len(tokens)), *[NEVER] * (len(every) - len(tokens))]
        segmenter = CharacterPairs(every, None, rank, fallback=fallback)
    elif kind == "unigram":
        segmenter = Unigram(every, rng.normal(-6, 2, len(every)).tolist(), fallback)
    else:
        segmenter = Longest(every)
    return Vocabulary(tuple(every), segmenter, Pretokenizer(()), [len(every) - 1], len(every) - 2)


@pytest.mark.parametrize("kind", ["pairs", "characters", "unigram", "longest"])
@settings(max_examples=12, deadline=None, derandomize=True)
@given(seed=st.integers(0, 10**6), extra=st.integers(1, 10))
def test_masks_equal_enumeration(kind, seed, extra):
    alphabet = ALPHABETS["bytes" if kind in ("pairs", "longest") else "characters"]
    assert check_masks(vocabulary(kind, seed, extra), alphabet, 5, 0) > 5


def exact(v: Vocabulary, alphabet: str, model) -> dict[bytes, np.ndarray]:
    """Mass of every text up to LENGTH characters, symbol by symbol, from all of their token strings: {text: [257]}."""
    mass: dict[bytes, np.ndarray] = {}
    for n in range(LENGTH + 1):
        for text in itertools.product(alphabet, repeat=n):
            data = "".join(text).encode()
            ids, p = v.encode(data), 1.0
            for k, token in enumerate([*ids, v.ends[0]]):
                p *= model(tuple(ids[:k]))[token]
            for k in range(len(data) + 1):
                row = mass.setdefault(data[:k], np.zeros(257))
                row[data[k] if k < len(data) else 256] += p
    return mass


@pytest.mark.parametrize("kind", ["pairs", "characters", "unigram", "longest"])
@settings(max_examples=4, deadline=None, derandomize=True)
@given(seed=st.integers(0, 10**6))
def test_probabilities_equal_enumeration(kind, seed):
    """A token model whose texts have at most LENGTH characters, and mass on canonical strings only: then masked and
    canonical are the same, and both are its law of bytes."""
    v = vocabulary(kind, seed, 6)
    alphabet = ALPHABETS["bytes" if kind in ("pairs", "longest") else "characters"]
    texts = ["".join(t).encode() for n in range(LENGTH + 1) for t in itertools.product(alphabet, repeat=n)]
    rng = np.random.default_rng(seed)
    strings: dict[tuple[int, ...], np.ndarray] = {}
    for text, p in zip(texts, rng.dirichlet(np.full(len(texts), 0.3))):
        ids = [*v.encode(text), v.ends[0]]
        for k, token in enumerate(ids):
            strings.setdefault(tuple(ids[:k]), np.zeros(len(v.tokens)))[token] += p
    model = lru_cache(None)(lambda ids: strings[ids] / strings[ids].sum())
    mass, grammar = exact(v, alphabet, model), Grammar(v)
    prefixes = sorted(mass, key=lambda t: (len(t), t))
    for prefix in [*prefixes[:20], *rng.permutation(np.array(prefixes[20:], object))[:20]]:
        if not mass[prefix].sum():
            continue
        for semantics in ("masked", "canonical"):
            tree = Tree(grammar, semantics, [v.start])
            for byte in prefix:
                tree.push(byte)
            for node in tree.new:
                ids = tuple(a.token for a in reversed(node.ancestors()[:-1]))
                with np.errstate(divide="ignore"):
                    tree.fill(node, np.log(model(ids) if ids in strings else np.full(len(v.tokens), 1e-300)))
            np.testing.assert_allclose(np.exp(tree.logprobs()), mass[prefix] / mass[prefix].sum(), atol=1e-9)
