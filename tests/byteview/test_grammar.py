"""Which tokens may follow, against every short text there is."""

import itertools

import numpy as np
import pytest

from bytelm.byteview.cover import Grammar
from bytelm.byteview.pretokenizer import Pretokenizer, Split
from bytelm.byteview.segmenter import NEVER, BytePairs
from bytelm.byteview.vocabulary import Vocabulary
from bytelm.patterns import CL100K, GPT2
from tiny import LONG

RIGHT_DIGITS = r"\p{N}{1,3}(?=(?:\p{N}{3})*(?!\p{N}))| ?\p{L}+|\s+(?!\S)|\s+|."
ALPHABETS = {"gpt2": (GPT2, "as' \n"), "llama3": (CL100K, "ab1 \n"), "contractions": (CL100K, "aS' e"),
             "digits": (RIGHT_DIGITS, "12ab ")}  # fmt: skip
LENGTH = {"gpt2": 5, "llama3": 5, "contractions": 5, "digits": 6}


def random_vocabulary(rng, alphabet, pattern, *, whole_pieces=False, ranked=False, extra=14):
    """Byte pairs over a small alphabet; the last id ends a text, the one before it starts one."""
    tokens = [c.encode() for c in alphabet]
    merges = []
    while len(tokens) < len(alphabet) + extra:
        left, right = rng.integers(0, len(tokens), 2)
        joined = tokens[left] + tokens[right]
        if joined not in tokens and len(joined) <= 5:
            tokens.append(joined)
            merges.append((int(left), int(right), len(tokens) - 1))
    if whole_pieces:  # some tokens are made by no merge
        merges = [m for m in merges if rng.random() < 0.7]
    ids = {t: i for i, t in enumerate(tokens)}
    all_tokens = [*tokens, None, None]
    rank = [NEVER - 1 if len(t) == 1 else i for i, t in enumerate(tokens)] + [NEVER, NEVER]
    segmenter = BytePairs(all_tokens, None if ranked else merges, rank, units=lambda p: [ids[bytes([b])] for b in p])
    steps = (Split(pattern),) if pattern else ()
    return Vocabulary(tuple(all_tokens), segmenter, Pretokenizer(steps), [len(tokens) + 1], len(tokens),
                      whole_pieces=whole_pieces)  # fmt: skip


def canonical_prefixes(vocabulary, alphabet, length):
    """All beginnings of the token strings of all texts up to a length, and the whole strings."""
    begun, whole = set(), set()
    for n in range(length + 1):
        for text in itertools.product(alphabet, repeat=n):
            ids = tuple(vocabulary.encode("".join(text).encode()))
            whole.add(ids)
            begun |= {ids[:k] for k in range(len(ids) + 1)}
    return begun, whole


def check_masks(vocabulary, alphabet, length, reach):
    """Every node up to `length - reach` bytes allows just the tokens with which some text begins."""
    begun, whole = canonical_prefixes(vocabulary, alphabet, length)
    grammar = Grammar(vocabulary)
    todo, seen = [(grammar.root([vocabulary.start]), (), b"")], 0
    while todo:
        node, ids, text = todo.pop()
        mask = grammar.mask(node, text)
        for t, data in enumerate(vocabulary.tokens):
            if data is None or len(text) + len(data) > length - reach:
                continue
            expected = (*ids, t) in begun
            assert mask[t] == expected, (text, [vocabulary.tokens[i] for i in ids], data, expected, node.state)
            child = grammar.child(node, t, text + data)
            assert (child is not None) == expected, (text, ids, data, expected)
            if child is not None:
                todo.append((child, (*ids, t), text + data))
        assert mask[vocabulary.ends[0]] == (ids in whole), (text, ids)
        seen += 1
    return seen


SLOW = pytest.mark.slow
FAST = [("gpt2", "merges"), ("llama3", "whole")]
EVERY = list(itertools.product(ALPHABETS, ("merges", "ranked", "whole")))
EVERY.remove(("digits", "ranked"))  # a minute, and digits are cut alike by both


@pytest.mark.slow
@pytest.mark.parametrize(
    "name, kind",
    [case if case in FAST else pytest.param(*case, marks=LONG if case[0] == "digits" else SLOW) for case in EVERY],
)
def test_masks_equal_enumeration(name, kind):
    pattern, alphabet = ALPHABETS[name]
    for seed in range(1):
        rng = np.random.default_rng(seed)
        vocabulary = random_vocabulary(rng, alphabet, pattern, whole_pieces=kind == "whole", ranked=kind == "ranked")
        assert check_masks(vocabulary, alphabet, LENGTH[name], 2 if name != "digits" else 4) > 5
