"""Drafted decoding, exact by verification: several next bytes are guessed, the network reads them all at once, and
those that it would have drawn itself are kept.

Byte n of row i is drawn with a key of its own (`generate.py`), so "what it would have drawn" is one byte, whatever the
temperature: the text is that of plain decoding with the same seed (but where rounding decides between two bytes, or
whether a chunk ends), and so is its distribution. A fixed guess is kept with the model's probability of it, which is
the best there is.

Three ways to guess. `copy`: what followed the last place where the text's last bytes stood before (aggressive decoding,
Ge et al. 2022; prompt lookup; CopySpec). `own`: the outermost encoder and decoder of an H-Net, HAT, SpaceByte or BLT go
on past the chunk's boundary by themselves, without asking the inner network anew (self-speculation within the
hierarchy, as in Fast BLT). `heads`: a model with heads for further bytes (`models/ahead.py`) says what follows while it
verifies what it said before (as EvaByte, Medusa). Guesses of both draw with the keys of the bytes that they guess.
"""

from collections.abc import Callable, Iterator
from functools import partial
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from numpy.typing import NDArray

from bytelm.config import ConfigError
from bytelm.copying import LENGTHS, Counts, copied, next_length
from bytelm.following import emit
from bytelm.generate import Decoder, Sampling, bucket, draw, pad_rows, visible_inputs
from bytelm.models.hnet import HNet
from bytelm.nn.cache import pick
from bytelm.vocab import END, ByteIds

Draft = Literal["none", "copy", "own", "heads"]


def check_draft(draft: Draft, network: nnx.Module) -> None:
    """Raises ConfigError where a network cannot verify, or not guess."""
    if draft not in ("none", "copy", "own", "heads"):
        raise ConfigError(f"draft={draft!r}: choose none, copy, own or heads")
    if draft == "none":
        return
    if draft == "own" and (not hasattr(network, "alone") or (isinstance(network, HNet) and not network.config.levels)):
        raise ConfigError("draft='own': only an H-Net, HAT, SpaceByte or BLT has a decoder that can go on by itself "
                          "past the end of a chunk; choose copy")  # fmt: skip
    if draft == "heads" and not hasattr(network, "ahead"):
        raise ConfigError("draft='heads': this model was trained without heads for further bytes (model.ahead.bytes)")


def _draw(alphabet, logits, keys, drawn, sampling):
    ids, possible = alphabet
    own = jax.vmap(jax.random.fold_in)(keys, drawn)
    return draw(jnp.where(possible, logits[:, ids], -jnp.inf), own, *sampling)


_first = jax.jit(_draw)


@partial(jax.jit, static_argnames=("graph", "ahead"), donate_argnames="cache")
def _verify(graph, params, alphabet, cache, keys, drawn, drafts, lengths, sampling, ahead):
    """Reads `drafts` [b, q], of each row the first `lengths` [b] (the first symbol of a row is no guess, 0: a row that
    has ended); `drawn` [b]: how many were drawn before them. Gives how many symbols are right, the symbol drawn behind
    those, the cache there, and, if `ahead`, what the further heads guess behind that symbol [b, n], else nothing."""
    network = nnx.merge(graph, params)
    ids, _ = alphabet
    q = drafts.shape[1]
    logits, trail, y = network.extend(ids[jnp.minimum(drafts, END)], cache)
    numbers = (drawn[:, None] + 1 + jnp.arange(q)).reshape(-1)
    rows = logits.reshape(-1, logits.shape[-1])  # all at once: one sort, not q
    symbols = _draw(alphabet, rows, jnp.repeat(keys, q), numbers, sampling).reshape(-1, q)
    right = (symbols[:, :-1] == drafts[:, 1:]) & (jnp.arange(1, q) < lengths[:, None])
    kept = jnp.where(lengths > 0, 1 + jnp.sum(jnp.cumprod(right, axis=1), axis=1), 0)
    last = jnp.maximum(kept - 1, 0)
    guesses = None
    if ahead:
        bytes_only = (ids, alphabet[1].at[END].set(False))
        each = jnp.moveaxis(network.ahead(pick(y, last)), 1, 0)
        each = [_draw(bytes_only, one, keys, drawn + kept + 1 + k, sampling) for k, one in enumerate(each)]
        guesses = jnp.stack(each, axis=1)
    return kept, pick(symbols, last), network.keep(cache, trail, kept), guesses


@partial(jax.jit, static_argnames=("graph", "count"))
def _own(graph, params, alphabet, cache, keys, drawn, symbols, sampling, count):
    """`count` guesses behind `symbols` [b] by the outermost encoder and decoder alone, [b, count]."""
    network = nnx.merge(graph, params)

    def one(carry, i):
        cache, symbol = carry
        logits, cache = network.alone(alphabet[0][jnp.minimum(symbol, END)], cache)
        symbol = _draw(alphabet, logits, keys, drawn + 1 + i, sampling)
        return (cache, symbol), symbol

    _, guesses = jax.lax.scan(one, (cache, symbols), jnp.arange(count))
    return guesses.T


class Drafting:
    """Some texts that grow by drafts."""

    def __init__(
        self,
        decoder: Decoder,
        ids: ByteIds,
        prompts: list[bytes],
        *,
        window: int,
        max_bytes: int,
        sampling: Sampling,
        seed: int,
        draft: Draft,
        counts: Counts,
        sources: list[bytes] | None = None,
        encoded: Any = None,
    ):
        """`sources`: inputs, of which `encoded` is what the encoder made, in bucket(len(prompts)) rows."""
        self.sources, self.encoded = sources or [b""] * len(prompts), encoded
        self.decoder, self.ids, self.window, self.draft = decoder, ids, window, draft
        self.texts, self.made, self.max_bytes, self.counts = list(prompts), [0] * len(prompts), max_bytes, counts
        ahead = nnx.merge(*decoder.steps).config.ahead.bytes if draft == "heads" else 0
        self.sizes = (1 + ahead,) * 2 if ahead else LENGTHS
        self.count = self.sizes[0]
        rows, base = bucket(len(prompts)), jax.random.key(seed)
        self.keys = jax.vmap(lambda i: jax.random.fold_in(base, i))(jnp.arange(rows))
        self.sampling = (jnp.float32(sampling.temperature), jnp.int32(sampling.top_k), jnp.float32(sampling.top_p))
        self.alphabet = (jnp.asarray(ids.symbol_ids()), jnp.asarray(ids.possible()))
        self._read()

    def _drawn(self) -> NDArray[np.int32]:
        return np.array(self.made + self.made[:1] * (len(self.keys) - len(self.made)), np.int32)

    def _read(self) -> None:
        """Reads every text from where it is visible, and draws what follows it."""
        rows = [visible_inputs(text, self.ids, self.window) for text in self.texts]
        width = max(map(len, rows))
        left = self.max_bytes - min(self.made)
        self.room = min(self.window, bucket(width + left + self.sizes[-1], 64))
        inputs, self.lengths = pad_rows(rows, len(self.keys), min(bucket(width, 32), self.window))
        logits, self.cache = self.decoder.prefill(inputs, self.lengths, self.room, self.encoded)
        self.ahead: NDArray | None = None  # what the heads guess behind the next symbol
        self.pending = np.asarray(_first(self.alphabet, logits, self.keys, self._drawn(), self.sampling))

    def _guesses(self, live: list[bool], count: int) -> list[bytes | NDArray]:
        """What may follow each row's next symbol."""
        if self.draft == "copy":
            return [
                copied(text + bytes([symbol]), count, source) if on and symbol != END else b""
                for text, source, symbol, on in zip(self.texts, self.sources, self.pending.tolist(), live)
            ]
        if self.draft == "heads":
            none = np.zeros((len(self.texts), 0), np.int32)
            return list(none if self.ahead is None else self.ahead[: len(self.texts), :count])
        guesses = np.asarray(
            _own(*self.decoder.steps, self.alphabet, self.cache, self.keys, self._drawn(), self.pending,
                 self.sampling, count)
        )  # fmt: skip
        return [row[: np.argmax(np.append(row, END) == END)] for row in guesses[: len(self.texts)]]

    def step(self, done: list[bool]) -> list[bytes | None]:
        """The next bytes of each row, None where it ends."""
        live = [not ended and symbol != END for ended, symbol in zip(done, self.pending.tolist())]
        if not any(live):
            return [None] * len(done)
        longest = max(int(n) for n, on in zip(self.lengths, live) if on)
        if longest >= self.room:  # the last symbol that can be drawn here is, but it cannot be read
            return self._begin_anew(live)
        count = next((n for n in (self.count, self.sizes[0]) if longest + n <= self.room), 1)
        guesses = self._guesses(live, count - 1) if count > 1 else [b""] * len(done)
        width = count if any(len(guess) for guess in guesses) else 1
        drafts = np.zeros((len(self.keys), width), np.int32)
        drafts[:, 0] = self.pending
        read = np.zeros(len(self.keys), np.int32)
        for i, guess in enumerate(guesses):
            if live[i]:
                drafts[i, 1 : 1 + len(guess)] = list(guess)
                read[i] = 1 + len(guess)
        kept, behind, self.cache, ahead = _verify(
            *self.decoder.steps, self.alphabet, self.cache, self.keys, self._drawn(), drafts, read, self.sampling,
            self.draft == "heads",
        )  # fmt: skip
        kept, self.ahead = np.asarray(kept), None if ahead is None else np.asarray(ahead)
        out: list[bytes | None] = []
        for i, on in enumerate(live):
            new = drafts[i, : kept[i]].astype(np.uint8).tobytes()
            self.texts[i] += new
            self.made[i] += len(new)
            out.append(new if on else None)
        self.lengths = self.lengths + kept
        self.pending = np.where(kept > 0, np.asarray(behind), self.pending)
        if width > 1:
            self.count = next_length(self.sizes, self.count, int(read.sum()), int(kept.sum()))
        made = int(kept.sum())
        self.counts.add(several=width > 1, drafted=int(read.sum()) - sum(live), right=made - sum(live), made=made)
        return out

    def _begin_anew(self, live: list[bool]) -> list[bytes | None]:
        out: list[bytes | None] = []
        for i, on in enumerate(live):
            new = bytes([int(self.pending[i])]) if on else b""
            self.texts[i] += new
            self.made[i] += len(new)
            out.append(new if on else None)
        ended = [i for i, on in enumerate(live) if not on]
        kept = {i: int(self.pending[i]) for i in ended}
        self._read()
        self.pending = np.array(self.pending)
        for i, symbol in kept.items():
            self.pending[i] = symbol
        self.counts.made += sum(live)
        return out


def drafted_bytes(make: Callable[[], Drafting], rows: int, max_bytes: int, stop: tuple[bytes, ...], block: int
                  ) -> Iterator[list[bytes]]:  # fmt: skip
    """New bytes of each row, as `generate.generate_bytes` gives them."""
    if max_bytes > 0:
        yield from emit(make().step, rows, max_bytes, stop, block)
