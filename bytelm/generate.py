"""Sampling from a network: one jitted block of cached steps, rows of unequal length, exact reproducibility by seed.

Row i of a batch draws with the key fold_in(fold_in(key(seed), i), n) for its n-th byte, so that a row's bytes depend on
its prompt, the seed and its index only.
"""

import dataclasses
import math
from collections.abc import Iterator
from functools import cached_property, partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Float, Int
from numpy.typing import NDArray

from bytelm.config import ConfigError
from bytelm.models.build import Params
from bytelm.models.hnet_stage import Stage
from bytelm.nn.stack import divide_stacks, divided
from bytelm.vocab import END, ByteIds
from bytelm.windows import visible_from

BLOCK = 32  # cached steps between two looks at the stop conditions


@dataclasses.dataclass(frozen=True, kw_only=True)
class Sampling:
    """How the next byte is drawn."""

    temperature: float = 1.0  # 0 = the most probable byte
    top_k: int = 0  # only the k most probable symbols; 0 = all
    top_p: float = 1.0  # only the most probable symbols that together reach this probability

    def __post_init__(self):
        if not self.temperature >= 0:
            raise ConfigError(f"temperature={self.temperature}: must be 0 or above")
        if not 0 < self.top_p <= 1:
            raise ConfigError(f"top_p={self.top_p}: must be in (0, 1]")
        if self.top_k < 0:
            raise ConfigError(f"top_k={self.top_k}: must not be negative (0 = all)")


def draw(
    logits: Float[Array, "b v"],
    keys: Array,
    temperature: Float[Array, ""],
    top_k: Int[Array, ""],
    top_p: Float[Array, ""],
) -> Int[Array, " b"]:
    """Draws one index per row: top_k first, then top_p of what is left, keeping the symbol that crosses p. At
    temperature 0 the largest, without the sorting, which takes as long on CPU as a tenth of a small network's step."""

    def drawn() -> Int[Array, " b"]:
        order = jnp.argsort(-logits, axis=-1)
        ranked = jnp.take_along_axis(logits, order, axis=-1) / temperature
        rank = jnp.arange(logits.shape[-1])
        ranked = jnp.where((rank < top_k) | (top_k == 0), ranked, -jnp.inf)
        probability = jax.nn.softmax(ranked, axis=-1)
        before = jnp.cumsum(probability, axis=-1) - probability
        ranked = jnp.where((before < top_p) | (rank == 0) | (top_p >= 1), ranked, -jnp.inf)
        chosen = jax.vmap(jax.random.categorical)(keys, ranked)
        return jnp.take_along_axis(order, chosen[:, None], axis=-1)[:, 0]

    return jax.lax.cond(temperature > 0, drawn, lambda: jnp.argmax(logits, axis=-1).astype(jnp.int32))


@partial(jax.jit, static_argnames=("graph", "max_length"))
def _prefill(graph, params, inputs, lengths, max_length, encoded):
    more = () if encoded is None else (encoded,)
    logits, cache = nnx.merge(graph, params).prefill(inputs, lengths, max_length, *more)
    return logits, divided(cache)


class Decoder:
    """A network that goes on with texts. Its weights are held twice once it does: stacked, for whole texts, and layer
    by layer, for steps (`Stack.divide`)."""

    def __init__(self, graph: nnx.GraphDef, params: Params):
        self._graph, self._params = graph, params

    @cached_property
    def steps(self) -> tuple[nnx.GraphDef, Params]:
        """Graph and parameters of the network in the form that takes steps."""
        graphs = []

        def divide(params):
            network = nnx.merge(self._graph, params)
            divide_stacks(network)
            graph, state = nnx.split(network, nnx.Param)
            graphs.append(graph)
            return nnx.to_pure_dict(state)

        params = jax.jit(divide)(self._params)
        return graphs[0], params

    def prefill(
        self,
        inputs: Array | NDArray[np.int32],
        lengths: Array | NDArray[np.int32],
        max_length: int,
        encoded: Any = None,
    ) -> tuple[Float[Array, "b v"], Any]:
        """Logits behind right-padded rows [b, t] and a cache for steps with room for `max_length` inputs."""
        return _prefill(self._graph, self._params, inputs, lengths, max_length, encoded)


@partial(jax.jit, static_argnames=("graph", "steps"), donate_argnames="cache")
def _decode(graph, params, alphabet, cache, logits, keys, drawn, sampling, steps):
    """Draws `steps` symbols per row: ([b, steps], cache and logits after the last)."""
    network = nnx.merge(graph, params)

    def one(carry, i):
        cache, logits = carry
        symbol, ids = _next(alphabet, logits, keys, drawn + i, sampling)
        logits, cache = network.step(ids, cache)
        return (cache, logits), symbol

    (cache, logits), drawn_symbols = jax.lax.scan(one, (cache, logits), jnp.arange(steps))
    return drawn_symbols.T, cache, logits


def _next(alphabet, logits, keys, n, sampling):
    """The n-th symbol of each row (n: one number or one per row) and the id to feed back."""
    ids, possible = alphabet
    step_keys = jax.vmap(jax.random.fold_in)(keys, jnp.broadcast_to(n, keys.shape))
    symbol = draw(jnp.where(possible, logits[:, ids], -jnp.inf), step_keys, *sampling)
    return symbol, ids[symbol]


@partial(jax.jit, static_argnames=("graph", "steps", "quorum"), donate_argnames="cache")
def _decode_waiting(graph, params, alphabet, cache, logits, keys, drawn, sampling, steps, quorum):
    """`_decode` for a network that chunks, with rows that wait at their boundaries: the inner network runs once
    `quorum` rows wait, or all that have not finished do. Each row draws what it would alone; rows are only delayed."""
    network = nnx.merge(graph, params)
    b = logits.shape[0]
    rows = jnp.arange(b)

    def choose(mask, new, old):
        return jax.tree.map(lambda a, b: jnp.where(mask.reshape(-1, *(1,) * (a.ndim - 1)), a, b), new, old)

    def unfinished(state):
        return jnp.any((state["count"] < steps) | state["waiting"])

    def tick(state):
        ready = ~state["waiting"] & (state["count"] < steps)
        symbol, ids = _next(alphabet, state["logits"], keys, drawn + state["count"], sampling)
        out = state["out"].at[rows, jnp.where(ready, state["count"], steps)].set(symbol, mode="drop")
        count = state["count"] + ready
        new, cache = network.front(ids, state["cache"], ready)
        pending = choose(ready, new, state["pending"])
        waiting = state["waiting"] | (ready & pending.boundary)
        fire = (jnp.sum(waiting) >= quorum) | ~jnp.any(~waiting & (count < steps))
        asked = waiting & fire
        cache = network.ask_inner(pending, cache, asked)
        through = asked | (ready & ~waiting)
        after, cache = network.back(pending, cache, through)
        return {"cache": cache, "logits": choose(through, after, state["logits"]), "out": out, "count": count,
                "pending": pending, "waiting": waiting & ~fire}  # fmt: skip

    nobody = jnp.zeros(b, bool)
    pending, _ = network.front(jnp.zeros(b, jnp.int32), cache, nobody)  # of no use but for its shapes
    state = {"cache": cache, "logits": logits, "out": jnp.zeros((b, steps), jnp.int32), "waiting": nobody,
             "pending": pending,
             "count": jnp.zeros(b, jnp.int32)}  # fmt: skip
    state = jax.lax.while_loop(unfinished, tick, state)
    return state["out"], state["cache"], state["logits"]


def bucket(n: int, smallest: int = 1) -> int:
    """The next power of two times `smallest`: few distinct shapes, so few compilations."""
    size = smallest
    while size < n:
        size *= 2
    return size


def visible_inputs(text: bytes, ids: ByteIds, window: int) -> NDArray[np.int32]:
    """The ids a network with `window` positions reads to go on with `text`."""
    first = visible_from(len(text), window)
    body = np.frombuffer(text[first:], np.uint8).astype(np.int32) + ids.offset
    return body if first else np.concatenate([[np.int32(ids.start)], body]).astype(np.int32)


def pad_rows(rows: list[NDArray[np.int32]], count: int, width: int) -> tuple[NDArray[np.int32], NDArray[np.int32]]:
    """Rows of unequal length as [count, width] with their lengths; the rows that fill up are copies of the first."""
    rows = rows + [rows[0]] * (count - len(rows))
    out = np.zeros((count, width), np.int32)
    for i, row in enumerate(rows):
        out[i, : len(row)] = row
    return out, np.array([len(row) for row in rows], np.int32)


def generate_bytes(
    decoder: Decoder,
    ids: ByteIds,
    prompts: list[bytes],
    *,
    window: int,
    max_bytes: int,
    sampling: Sampling,
    seed: int,
    stop: tuple[bytes, ...] = (),
    block: int = BLOCK,
    wait: float = 0.0,
    encoded: Any = None,
) -> Iterator[list[bytes]]:
    """Yields, block by block, the newly generated bytes of each row (b"" for a row that has ended).

    A row ends with the end symbol, in front of the first of the `stop` strings, or after `max_bytes`. Bytes that might
    be the beginning of a stop string are held back until it is clear. A row that outgrows the network's `window` goes
    on from its visible end (`visible_from`). With `wait`, rows of a network that chunks wait at their boundaries until
    that share of them does. `encoded`: what an encoder made of the inputs of bucket(len(prompts)) rows.
    """
    made = [b""] * len(prompts)  # all bytes drawn so far
    shown = [0] * len(prompts)  # how many of them were yielded
    hold = max((len(s) for s in stop), default=1) - 1
    count = bucket(len(prompts))
    base = jax.random.key(seed)
    keys = jax.vmap(lambda i: jax.random.fold_in(base, i))(jnp.arange(count))
    values = (jnp.float32(sampling.temperature), jnp.int32(sampling.top_k), jnp.float32(sampling.top_p))
    alphabet = (jnp.asarray(ids.symbol_ids()), jnp.asarray(ids.possible()))
    decode = _decode
    graph, params = decoder.steps
    if wait and count > 1 and isinstance(getattr(nnx.merge(graph, params), "backbone", None), Stage):
        decode = partial(_decode_waiting, quorum=max(math.ceil(wait * count), 1))
    drawn_bytes = 0
    live = set(range(len(prompts))) if max_bytes > 0 else set()
    while live:
        rows = [visible_inputs(prompt + new, ids, window) for prompt, new in zip(prompts, made)]
        width = max(map(len, rows))
        room = min(window, bucket(width + max_bytes - drawn_bytes, 64))
        inputs, lengths = pad_rows(rows, count, min(bucket(width, 32), window))
        longest = max(lengths[i] for i in live)
        logits, cache = decoder.prefill(inputs, lengths, room, encoded)
        # After `room` inputs one more byte can be drawn, but not read back: then begin anew from what is visible.
        while live and longest <= room:
            steps = block if room - longest >= block else 1
            drawn, cache, logits = decode(
                graph, params, alphabet, cache, logits, keys, jnp.int32(drawn_bytes), values, steps
            )
            drawn_bytes, longest = drawn_bytes + steps, longest + steps
            out = [b""] * len(prompts)
            for i, row in enumerate(np.asarray(drawn)[: len(prompts)]):
                if i not in live:
                    continue
                ends = np.flatnonzero(row == END)
                before = len(made[i])
                made[i] = (made[i] + row[: ends[0] if len(ends) else None].astype(np.uint8).tobytes())[:max_bytes]
                found = ((made[i].find(s, max(before - hold, 0)), s) for s in stop)
                cuts = [(at + len(s), at) for at, s in found if at >= 0]  # the first that is whole, byte by byte
                if cuts:
                    made[i] = made[i][: min(cuts)[1]]
                if cuts or len(ends) or len(made[i]) >= max_bytes:
                    live.discard(i)
                release = len(made[i]) - (hold if i in live else 0)
                out[i] = made[i][shown[i] : release] if release > shown[i] else b""
                shown[i] += len(out[i])
            yield out
