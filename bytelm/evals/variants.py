"""Spellings that a model should not tell apart, and such as it should: British and American forms of a word, and each
with one slip.

`same` is how much a text behind a word changes in probability when the word's other form stands in its place, `slip`
when the word is misspelt, both in bits a byte: a model that knows the forms for one word has the first below the
second. `told` is the share of forms that are more probable than with a slip; a model that is blind to letters has it
low.
"""

import math
from typing import Any

import numpy as np

from bytelm.data.noise import Draws, typo_swap
from bytelm.protocol import ByteLM

_FORMS = """
colour/color honour/honor labour/labor favour/favor flavour/flavor harbour/harbor neighbour/neighbor rumour/rumor
humour/humor vapour/vapor parlour/parlor odour/odor centre/center theatre/theater fibre/fiber litre/liter metre/meter
sabre/saber spectre/specter lustre/luster defence/defense offence/offense licence/license pretence/pretense
organise/organize realise/realize recognise/recognize apologise/apologize analyse/analyze paralyse/paralyze
travelling/traveling jewellery/jewelry grey/gray plough/plow catalogue/catalog dialogue/dialog programme/program
cheque/check storey/story tyre/tire kerb/curb aluminium/aluminum moustache/mustache
"""
PAIRS = tuple(pair.split("/") for pair in _FORMS.split())
BEFORE, BEHIND = "They had spoken of the word ", " for a long time, and then of nothing else until the evening."


def variants_unit(lm: ByteLM, seed: int) -> tuple[dict[str, float], dict[str, Any]]:
    """Figures over the pairs of forms."""
    forms = [form for pair in PAIRS for form in pair]
    slips = [_slip(form, Draws(seed, "variants", form)) for form in forms]
    words = [word.encode() for word in (*forms, *slips)]
    contexts = [BEFORE.encode() + word for word in words]
    behind = np.array([s.total for s in lm.score_batch([BEHIND.encode()] * len(words), contexts)]).reshape(2, -1)
    closed = [word + b" " for word in words]  # with what ends it: a longer form is not less probable for that alone
    own = np.array([s.total for s in lm.score_batch(closed, [BEFORE.encode()] * len(words))]).reshape(2, -1)
    per_byte = math.log(2) * len(BEHIND.encode())
    same = np.abs(np.diff(behind[0].reshape(-1, 2), axis=1)) / per_byte
    slip = np.abs(behind[0] - behind[1]) / per_byte
    figures = {"same": same.mean(), "slip": slip.mean(), "told": (own[0] > own[1]).mean(), "pairs": len(PAIRS)}
    return {name: float(value) for name, value in figures.items()}, {}


def _slip(word: str, draws: Draws) -> str:
    """The word with two inner letters that differ changed about; where there are none, its last two."""
    for _ in range(50):
        wrong = typo_swap(word, draws)
        if wrong != word:
            return wrong
    return word[:-2] + word[-1] + word[-2]
