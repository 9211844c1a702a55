"""Drafted sampling from a tokenized model by bytes: the covers of what is copied are read in one pass, and each byte is
drawn as it would be without (`following.draw_rows`, to the same bytes for a seed)."""

from collections.abc import Iterator

import numpy as np

from bytelm.byteview.covers import Covers
from bytelm.copying import LENGTHS, Counts, copied, next_length
from bytelm.following import choose, emit
from bytelm.generate import Sampling
from bytelm.vocab import END


def draw_drafted(
    covers: Covers,
    prompts: list[bytes],
    max_bytes: int,
    sampling: Sampling,
    seed: int,
    stop: tuple[bytes, ...],
    block: int,
    counts: Counts,
    room: int,
) -> Iterator[list[bytes]]:
    """New bytes of each text, every `block` bytes or more and at the end. No text is guessed beyond `room` bytes."""
    rows = len(prompts)
    rngs = [np.random.default_rng([seed, i]) for i in range(rows)]
    texts, ended, last = list(prompts), [False] * rows, [END] * rows
    length = LENGTHS[0]

    def step(done: list[bool]) -> list[bytes | None]:
        nonlocal length
        live = [not (d or e) for d, e in zip(done, ended)]
        if any(symbol != END for symbol in last):
            covers.push([symbol if on else END for symbol, on in zip(last, live)])
        guesses = [
            copied(text, max(min(length - 1, room - len(text)), 0)) if on else b"" for text, on in zip(texts, live)
        ]
        read = covers.look(guesses)
        out: list[bytes | None] = [None] * rows
        right = [0] * rows
        for i, on in enumerate(live):
            if not on:
                continue
            new = b""
            for n, logs in enumerate(read[i]):
                last[i] = choose(logs, sampling, rngs[i])
                if last[i] == END:
                    ended[i] = True
                    break
                new += bytes([last[i]])
                if guesses[i][n : n + 1] != new[-1:]:
                    break
                right[i] = n + 1
            texts[i] += new
            out[i] = new if new or not ended[i] else None
        covers.keep(right)
        guessed = sum(map(len, guesses))
        if guessed:
            length = next_length(LENGTHS, length, guessed + sum(live), sum(right) + sum(live))
        counts.add(several=guessed > 0, drafted=guessed, right=sum(right), made=sum(len(new or b"") for new in out))
        return out

    return emit(step, rows, max_bytes, stop, block)
