"""Matrix products whose results and gradients come out of the matmul as they are stored.

XLA's CPU compiler writes the operands of a weight's gradient out anew, transposed, with the elementwise work in front
of them done once more for it. Told the order of the result, it does not (`benchmarks/products`: a quarter less
time, or more). Other backends choose their own layouts.

Its library multiplies bfloat16 as it is (on a CPU with AMX several times as fast as float32) only where the sum comes
out in float32, runs over the last axes of the left side, and there is more than one row; else both sides are written
out as float32 first, the weights of a decoding step among them. On CPU products of bfloat16 are brought into that form.
"""

import math
from functools import partial

import jax
import jax.numpy as jnp
from jax.experimental.layout import Layout, with_layout_constraint
from jax.typing import DTypeLike
from jaxtyping import Array, Float

from bytelm.parallel.mesh import one_device, platform


@partial(jax.custom_vjp, nondiff_argnums=(0, 3, 4))
def contract(
    spec: str,
    a: Float[Array, "..."],
    b: Float[Array, "..."],
    dtype: DTypeLike | None = None,
    precision: jax.lax.Precision | None = None,
) -> Float[Array, "..."]:
    """einsum(spec, a, b) of type `dtype`; each letter stands in at least two of the three parts. Reverse mode only."""
    return _product(spec, a, b, dtype, precision)


def _product(spec, a, b, dtype, precision):
    inputs, out = spec.split("->")
    of_a, of_b = inputs.split(",")
    together = [c for c in of_a if c in of_b and c in out]
    summed = [c for c in of_a if c in of_b and c not in out]
    rows, columns = ([c for c in part if c not in other] for part, other in ((of_a, of_b), (of_b, of_a)))
    if out == "".join([*together, *columns, *rows]):  # the order of the operands is that of the result
        of_a, of_b, a, b, rows, columns = of_b, of_a, b, a, columns, rows
    narrow = a.dtype == b.dtype == jnp.bfloat16 and platform() == "cpu"
    y = (_narrow_dot if narrow else _dot)(a, of_a, b, of_b, (together, rows, summed), dtype, precision)
    return jnp.transpose(y, [[*together, *rows, *columns].index(c) for c in out])


def _dot(a, of_a, b, of_b, axes, dtype, precision):
    """Axes of the result: those in all three parts, those of `a` alone, those of `b` alone."""
    together, _, summed = axes
    pairs = [([of_a.index(c) for c in shared], [of_b.index(c) for c in shared]) for shared in (summed, together)]
    return jax.lax.dot_general(a, b, (pairs[0], pairs[1]), precision, dtype)


def _narrow_dot(a, of_a, b, of_b, axes, dtype, precision):
    """`_dot` of bfloat16 on CPU."""
    together, rows, summed = axes
    order, dtype = [*together, *rows, *summed], dtype or a.dtype
    a = jnp.transpose(a, [of_a.index(c) for c in order])
    if order != list(of_a) and one_device():  # else XLA makes the transpose a part of the product again; it would
        a = with_layout_constraint(a, Layout(major_to_minor=tuple(range(a.ndim))))  # gather a split array for this
    first, last = len(together), a.ndim - len(summed)
    batch, single, sums = a.shape[:first], math.prod(a.shape[first:last]) == 1, a.shape[last:]
    if single:  # the same row twice
        a, order = jnp.broadcast_to(a.reshape(*batch, 1, *sums), (*batch, 2, *sums)), [*together, "-", *summed]
    y = _dot(a, order, b, of_b, axes, jnp.float32, precision)
    if single:
        y = jnp.expand_dims(jax.lax.index_in_dim(y, 0, first, keepdims=False), list(range(first, last)))
    return y.astype(dtype)


def _forward(spec, a, b, dtype, precision):
    return _product(spec, a, b, dtype, precision), (a, b)


def _backward(spec, dtype, precision, kept, g):
    (of_a, of_b), out = spec.split("->")[0].split(","), spec.split("->")[1]
    a, b = kept
    return (
        _product(f"{out},{of_b}->{of_a}", g, b, dtype, precision).astype(a.dtype),
        _product(f"{of_a},{out}->{of_b}", a, g, dtype, precision).astype(b.dtype),
    )


contract.defvjp(_forward, _backward)


def head_scores(q: Float[Array, "b q h k"], k: Float[Array, "b s h k"], dtype: DTypeLike) -> Float[Array, "b h q s"]:
    """Products of queries and keys, by head."""
    if _few(q.shape[1], k.shape[1]):
        return jnp.einsum("bqhk,bshk->bhqs", q, k, preferred_element_type=dtype)
    return contract("bhqk,bhsk->bhqs", jnp.swapaxes(q, 1, 2), jnp.swapaxes(k, 1, 2), dtype)


def head_mix(weights: Float[Array, "b h q s"], v: Float[Array, "b s h k"]) -> Float[Array, "b q h k"]:
    """Sums of values by the weights of `head_scores`."""
    if _few(weights.shape[2], v.shape[1]):
        return jnp.einsum("bhqs,bshk->bqhk", weights, v)
    return jnp.swapaxes(contract("bhqs,bhsk->bhqk", weights, jnp.swapaxes(v, 1, 2)), 1, 2)


def _few(queries: int, keys: int) -> bool:
    """A step on a cache, whose keys are not to be written out anew, head by head, each time."""
    return queries < 64 and 4 * queries <= keys
