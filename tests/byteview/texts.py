"""Texts of many scripts and kinds, for tests of tokenizers."""

import numpy as np

SENTENCES = (
    "All human beings are born free and equal in dignity and rights.",
    "Tous les êtres humains naissent libres et égaux en dignité et en droits.",
    "Все люди рождаются свободными и равными в своём достоинстве и правах.",
    "يولد جميع الناس أحرارًا متساوين في الكرامة والحقوق.",
    "सभी मनुष्यों को गौरव और अधिकारों के मामले में जन्मजात स्वतन्त्रता और समानता प्राप्त है।",
    "人人生而自由，在尊严和权利上一律平等。",
    "すべての人間は、生まれながらにして自由であり、",
    "모든 인간은 태어날 때부터 자유로우며 그 존엄과 권리에 있어 동등하다.",
    "Όλοι οι άνθρωποι γεννιούνται ελεύθεροι και ίσοι στην αξιοπρέπεια.",
    "כל בני האדם נולדו בני חורין ושווים בערכם ובזכויותיהם.",
    "มนุษย์ทั้งหลายเกิดมามีอิสระและเสมอภาคกันในเกียรติศักดิ์และสิทธิ",
    "Sva ljudska bića rađaju se slobodna i jednaka; ½ ٣٤٥ १२३४ 👩‍👩‍👧 naïve",
    "def fib(n):\n    return n if n < 2 else fib(n - 1) + fib(n - 2)\n\n\nclass A:\n\tx = 0x1F\n",
    "for i in range(10):\r\n        print(f'{i:>8}', \"it's\")  # 1234567 3.14159\n",
    "we're it's I'll they'd  don't\n\n\n  'x' ''s  HTTPServer's WE'RE",
    "   \n \n  \t x\u00a0\u2003y   1 22 333 4444 55555 666666   ",
)


def many(count: int, seed: int = 0) -> list[str]:
    """So many texts: slices of the sentences, joined by what tokenizers look at."""
    rng, joints = np.random.default_rng(seed), ("", " ", "  ", "\n", "\n\n ", "'", "\t", "12", " 1234", "...", "-")
    out = []
    while len(out) < count:
        parts = []
        for _ in range(int(rng.integers(1, 4))):
            text = SENTENCES[rng.integers(len(SENTENCES))]
            begin = int(rng.integers(len(text)))
            parts += [text[begin : begin + int(rng.integers(1, 40))], joints[rng.integers(len(joints))]]
        out.append("".join(parts))
    return out
