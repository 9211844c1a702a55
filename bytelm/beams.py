"""Beam search over targets of an encoder-decoder, on the device as one loop."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from numpy.typing import NDArray

from bytelm.vocab import END

NEVER = -1e30  # score of a hypothesis that is not there


@partial(jax.jit, static_argnums=(0, 4, 5))
def _search(graph, params, symbols, encoded, length, beams, penalty):
    """(symbols [b, length], END and behind it END; score [b]) of the best hypothesis of each row."""
    network = nnx.merge(graph, params)
    b = encoded.states.shape[0]
    rows = jnp.arange(b)[:, None]

    def beside(x):  # a row's encoder output for each of its beams
        return None if x is None else jnp.repeat(x, beams, axis=0)

    encoded = jax.tree.map(beside, encoded)
    start = jnp.zeros((b * beams, 1), jnp.int32)
    logits, cache = network.prefill(start, jnp.ones(b * beams, jnp.int32), length + 1, encoded)

    def pick(cache, chosen):
        """The cache with the self-attention of each beam's ancestor; the encoder's part is the same for a row."""
        flat = (rows * beams + chosen).reshape(-1)
        return type(cache)(
            cache.lengths[flat], cache.k[:, flat], cache.v[:, flat], cache.source_k, cache.source_v, cache.source
        )

    def searching(state):
        """Rows whose best live hypothesis may still win, if it ended at this length."""
        reachable = state["live"][:, 0] / state["n"].astype(jnp.float32) ** penalty
        return state["searching"] & (reachable > state["done_score"].min(axis=1))

    def going(state):
        return (state["n"] <= length) & jnp.any(searching(state))

    def step(state):
        n, still = state["n"], searching(state)
        nats = jax.nn.log_softmax(state["logits"][:, symbols].astype(jnp.float32), axis=-1).reshape(b, beams, -1)
        total = (state["live"][:, :, None] + nats).reshape(b, -1)
        best, where = jax.lax.top_k(total, 2 * beams)
        beam, symbol = where // len(symbols), where % len(symbols)
        text = state["text"][rows, beam].at[:, :, n - 1].set(symbol)
        over = symbol == END
        # What has ended, beside what had ended before.
        scores = jnp.concatenate(
            [state["done_score"], jnp.where(over, best / n.astype(jnp.float32) ** penalty, NEVER)], 1
        )
        texts = jnp.concatenate([state["done_text"], text], axis=1)
        done_score, order = jax.lax.top_k(scores, beams)
        # What goes on.
        live, on = jax.lax.top_k(jnp.where(over, NEVER, best), beams)
        chosen = jnp.take_along_axis(beam, on, axis=1)
        cache = pick(state["cache"], chosen)
        ids = symbols[jnp.take_along_axis(symbol, on, axis=1)].reshape(-1)
        logits, cache = network.step(ids, cache)
        # A row that is through stays as it is, so that its result does not depend on the others.
        done_score = jnp.where(still[:, None], done_score, state["done_score"])
        done_text = jnp.where(still[:, None, None], texts[rows, order], state["done_text"])
        return {"n": n + 1, "live": live, "text": text[rows, on], "done_score": done_score, "done_text": done_text,
                "searching": still, "logits": logits, "cache": cache}  # fmt: skip

    blank = jnp.full((b, beams, length), END, jnp.int32)
    live = jnp.broadcast_to(jnp.where(jnp.arange(beams) == 0, 0.0, NEVER), (b, beams))  # all beams start the same
    state = {"n": jnp.int32(1), "live": live, "text": blank, "done_score": jnp.full((b, beams), NEVER),
             "done_text": blank, "searching": jnp.ones(b, bool), "logits": logits, "cache": cache}  # fmt: skip
    state = jax.lax.while_loop(going, step, state)
    # What has not ended by then is as long as can be.
    cut = (state["n"] > length) & state["searching"]
    unfinished = jnp.where(cut[:, None], state["live"] / jnp.float32(length) ** penalty, NEVER)
    scores = jnp.concatenate([state["done_score"], unfinished], axis=1)
    texts = jnp.concatenate([state["done_text"], state["text"]], axis=1)
    winner = jnp.argmax(scores, axis=1)
    return texts[jnp.arange(b), winner], scores[jnp.arange(b), winner]


def search_beams(graph, params, symbols, encoded, length, beams, penalty) -> tuple[NDArray, NDArray]:
    """(symbols [b, length], scores [b]) of each encoded row's best hypothesis; `symbols`: the ids of the 257."""
    found, scores = _search(graph, params, jnp.asarray(symbols), encoded, length, beams, penalty)
    return np.asarray(found), np.asarray(scores)
