"""Causal attention on TPU by jax's Pallas kernel ("splash attention"): no scores in memory, blocks that the mask hides
are skipped. Its twin in plain JAX is `nn/attention.py`."""

from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from bytelm.parallel.mesh import to_spec

LANES = 128  # of a TPU's vector unit: blocks are multiples of it
BLOCKS = (512, 256, 128)
KEPT = "attended"  # name of what the backward pass of the kernel needs, for rematerialisation (`stack.REMAT_POLICIES`)


def splash_attend(
    q: Float[Array, "b t h k"],
    k: Float[Array, "b t g k"],
    v: Float[Array, "b t g k"],
    segments: Int[Array, "b t"] | None = None,
    window: int = 0,
    *,
    interpret: bool = False,
) -> Float[Array, "b t h k"]:
    """Causal attention over the whole row or the last `window` keys, cut at segments. Equals `attend` under
    `causal_mask(t, window, segments)`. On TPU only; `interpret` runs the kernel's steps anywhere, slowly.

    Each device takes its rows and heads: the compiler cannot split a kernel by itself.
    """
    t = q.shape[1]
    unit = next((b for b in BLOCKS if 6 * b <= t), LANES)  # fills up a sixth of a long row at most
    size = -(-t // unit) * unit
    segments = jnp.zeros(q.shape[:2], jnp.int32) if segments is None else segments

    def run(q, k, v, segments):
        def by_head(x):
            return jnp.pad(jnp.swapaxes(x, 1, 2), ((0, 0), (0, 0), (0, size - t), (0, 0)))

        # Keys that fill up the row are behind every real query.
        kinds = jnp.pad(segments, ((0, 0), (0, size - t)))
        attend: Any = jax.vmap(_kernel(q.shape[2], size, window, interpret))
        y = attend(by_head((q * q.shape[-1] ** -0.5).astype(q.dtype)), by_head(k), by_head(v), _ids(kinds))
        return jnp.swapaxes(y, 1, 2)[:, :t]

    mesh = jax.sharding.get_abstract_mesh()
    if mesh.empty:
        return run(q, k, v, segments)
    heads, row = (to_spec(axes, mesh.axis_names) for axes in (("batch", None, "heads", None), ("batch", None)))
    return jax.shard_map(run, in_specs=(heads, heads, heads, row), out_specs=heads, check_vma=False)(q, k, v, segments)


def _ids(segments):
    from jax.experimental.pallas.ops.tpu import splash_attention as splash

    return splash.SegmentIds(segments, segments)


def _kernel(heads, size, window, interpret):
    """The kernel for one row of `size` positions."""
    from jax.experimental.pallas.ops.tpu import splash_attention as splash

    shape = (size, size)
    mask = splash.LocalMask(shape, (window - 1, 0), 0) if 0 < window < size else splash.CausalMask(shape)
    block = next(b for b in range(min(BLOCKS[0], size), 0, -LANES) if size % b == 0)
    sizes = splash.BlockSizes(
        block_q=block, block_kv=block, block_kv_compute=block, block_q_dkv=block, block_kv_dkv=block,
        block_kv_dkv_compute=block, block_q_dq=block, block_kv_dq=block,
    )  # fmt: skip
    return splash.make_splash_mha(
        splash.MultiHeadMask([mask] * heads), block_sizes=sizes, head_shards=1, q_seq_shards=1,
        residual_checkpoint_name=KEPT, interpret=interpret,
    )  # fmt: skip
