"""Linear recurrences and the short causal convolution: pure functions, no weights.

State-space duality (Dao & Gu 2024, "Transformers are SSMs", section 6): with a_t = exp(dt_t A),

    S_t = a_t S_{t-1} + dt_t x_t (outer) B_t,        y_t = S_t C_t,

per head, S of shape [p, n], B and C shared by all heads. Written three ways: token by token (`ssd_sequential`, the
oracle), in chunks (`ssd`), and one step (`ssd_step`). Sums of log decays are taken inside a chunk only, because float32
loses digits over long rows; masks are applied before the exponential, because 0 * inf would poison the gradient.

`linear_scan` is the recurrence with one decay per position, which H-Net's smoothing needs.
"""

from functools import partial

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from bytelm.nn.layers import wide
from bytelm.nn.products import contract
from bytelm.parallel import sequence
from bytelm.parallel.mesh import platform


def causal_conv(
    x: Float[Array, "b t *c"],
    kernel: Float[Array, "w *c"],
    bias: Float[Array, "*c"],
    segments: Int[Array, "b t"] | None = None,
) -> Float[Array, "b t *c"]:
    """Depthwise causal convolution: y_t = bias + sum_j kernel[w-1-j] x_{t-j}, taps cut where the segment changes."""
    b, t = x.shape[:2]
    width, trailing = kernel.shape[0], (1,) * (x.ndim - 2)
    before = min(width, t) - 1  # positions that the last one reads

    def behind(v, j, fill=0):  # v, j positions later
        v = jnp.pad(v, ((0, 0), (before, 0)) + ((0, 0),) * (v.ndim - 2), constant_values=fill)
        return v[:, before - j : before - j + t]

    y = x * kernel[-1]
    for j in range(1, before + 1):
        tap = behind(x, j)
        if segments is not None:
            tap = jnp.where((behind(segments, j, -1) == segments).reshape(b, t, *trailing), tap, 0)
        y = y + tap * kernel[-1 - j]
    return y + bias


def ssd_step(
    state: Float[Array, "b h p n"],
    x: Float[Array, "b h p"],
    dt: Float[Array, "b h"],
    A: Float[Array, " h"],
    B: Float[Array, "b n"],
    C: Float[Array, "b n"],
) -> tuple[Float[Array, "b h p n"], Float[Array, "b h p"]]:
    """One step of the recurrence: the new state and y = C . state, which is made of the old one: XLA's CPU compiler
    would else compute the new one twice, once to keep it and once to multiply it."""
    kind = wide(x.dtype)
    x, B, C = x.astype(kind), B.astype(kind), C.astype(kind)
    decay, new = jnp.exp(dt * A), dt[..., None] * x
    y = decay[..., None] * jnp.einsum("bhpn,bn->bhp", state, C) + new * jnp.sum(B * C, axis=-1)[:, None, None]
    return decay[..., None, None] * state + new[..., None] * B[:, None, None, :], y


def ssd_behind(
    state: Float[Array, "b h p n"],
    x: Float[Array, "b q h p"],
    dt: Float[Array, "b q h"],
    A: Float[Array, " h"],
    B: Float[Array, "b q n"],
    C: Float[Array, "b q n"],
) -> Float[Array, "b q h p"]:
    """y of a few steps behind a state, all at once: what `ssd_step` gives one by one."""
    kind = wide(x.dtype)
    x, B, C = x.astype(kind), B.astype(kind), C.astype(kind)
    q = x.shape[1]
    decay = jnp.cumsum(dt * A, axis=1)
    apart = decay[:, :, None] - decay[:, None]
    apart = jnp.where((jnp.arange(q)[:, None] >= jnp.arange(q))[..., None], apart, -jnp.inf)  # before exp: no inf - inf
    weight = jnp.einsum("bin,bjn->bij", C, B)[..., None] * jnp.exp(apart) * dt[:, None]
    carried = jnp.einsum("bhpn,bqn->bqhp", state, C) * jnp.exp(decay)[..., None]
    return carried + jnp.einsum("bijh,bjhp->bihp", weight, x)


def state_behind(
    state: Float[Array, "b h p n"],
    x: Float[Array, "b q h p"],
    dt: Float[Array, "b q h"],
    A: Float[Array, " h"],
    B: Float[Array, "b q n"],
    kept: Int[Array, " b"],
) -> Float[Array, "b h p n"]:
    """The state behind the first `kept` of these steps."""
    kind = wide(x.dtype)
    dt = jnp.where((jnp.arange(x.shape[1]) < kept[:, None])[..., None], dt, 0)  # a step of 0 leaves the state as it is
    decay = jnp.cumsum(dt * A, axis=1)
    scaled = (jnp.exp(decay[:, -1:] - decay) * dt)[..., None] * x.astype(kind)
    return jnp.exp(decay[:, -1])[..., None, None] * state + jnp.einsum("bqhp,bqn->bhpn", scaled, B.astype(kind))


def ssd_sequential(
    x: Float[Array, "b t h p"],
    dt: Float[Array, "b t h"],
    A: Float[Array, " h"],
    B: Float[Array, "b t n"],
    C: Float[Array, "b t n"],
    segments: Int[Array, "b t"] | None = None,
) -> tuple[Float[Array, "b t h p"], Float[Array, "b h p n"]]:
    """The recurrence token by token: y and the last state. The oracle of the chunked forms; slow to differentiate."""
    b, t, h, p = x.shape
    start = jnp.zeros((b, t), bool) if segments is None else jnp.diff(segments, axis=1, prepend=segments[:, :1]) != 0

    def step(state, now):
        x, dt, B, C, start = now
        state, y = ssd_step(jnp.where(start[:, None, None, None], 0, state), x, dt, A, B, C)
        return state, y

    first = jnp.zeros((b, h, p, B.shape[-1]), wide(x.dtype))
    state, y = jax.lax.scan(step, first, jax.tree.map(lambda v: jnp.moveaxis(v, 1, 0), (x, dt, B, C, start)))
    return jnp.moveaxis(y, 0, 1), state


def ssd(
    x: Float[Array, "b t h p"],
    dt: Float[Array, "b t h"],
    A: Float[Array, " h"],
    B: Float[Array, "b t n"],
    C: Float[Array, "b t n"],
    segments: Int[Array, "b t"] | None = None,
    *,
    chunk: int,
    form: str = "auto",
) -> tuple[Float[Array, "b t h p"], Float[Array, "b h p n"]]:
    """The recurrence in chunks: y and the last state, both float32 or wider.

    dt and A are float32 or wider, dt >= 0, A <= 0; dt = 0 leaves the state as it is. A change of `segments` resets the
    state; the id of a segment must not come back later in the row. `scan` does one chunk at a time and recomputes it in
    the backward pass (least memory, fastest on CPU); `batched` does the work of all chunks as batched matmuls and scans
    over the carried states only.

    Where rows are cut into pieces, each first finds, without any output, what it adds to the state and leaves of it;
    the pieces exchange that, and each then begins with the state it is handed.
    """
    segments = jnp.zeros(x.shape[:2], jnp.int32) if segments is None else segments
    if form == "auto":
        form = "scan" if platform() == "cpu" else "batched"
    if sequence.pieces() == 1:
        return _ssd(x, dt, B, C, segments, A, chunk, form)

    def piece(split, A):
        x, dt, B, C, segments = split
        return _ssd(x, dt, B, C, segments, A, chunk, form, in_pieces=True)

    return sequence.over_pieces(piece, (x, dt, B, C, segments), A)


def _ssd(x, dt, B, C, segments, A, chunk, form, in_pieces=False):
    """`ssd` of whole rows, or of the piece that this program has of each row; the state is that of the rows' ends."""
    b, t, h, p = x.shape
    chunk = min(chunk, t)
    pad = -t % chunk
    if in_pieces:
        before = sequence.from_before(segments[:, -1:], segments[:, :1])[:, 0]
    else:
        before = segments[:, 0]
    if pad:  # dt = 0 and the last segment: the padding neither reads nor changes the state
        x, dt, B, C = (jnp.pad(v, ((0, 0), (0, pad)) + ((0, 0),) * (v.ndim - 2)) for v in (x, dt, B, C))
        segments = jnp.pad(segments, ((0, 0), (0, pad)), mode="edge")

    def cut(v):  # [b, t, ...] -> [chunks, b, chunk, ...]
        return jnp.moveaxis(v.reshape(b, -1, chunk, *v.shape[2:]), 1, 0)

    x, dt, B, C, segments = cut(x), cut(dt), cut(B), cut(C), cut(segments)
    before = jnp.concatenate([before[None], segments[:-1, :, -1]])  # segment that a chunk's carried state is of
    first = jnp.zeros((b, h, p, B.shape[-1]), wide(x.dtype))
    all_kept, last = jnp.ones((b, h, 1, 1), first.dtype), None

    def over(ends, now):  # what chunks side by side add to a state and leave of it
        return now[1] * ends[0] + now[0], now[1] * ends[1]

    if form == "scan":

        def end(ends, now):
            return over(ends, _chunk_end(now[0], now[1], now[2], now[3], A, now[4])), None

        def one(state, now):
            x, dt, B, C, segments, before = now
            local, gain, added, kept = _chunk_terms(x, dt, B, C, segments, A, before)
            return kept * state + added, local + _read(state, C, gain)

        if in_pieces:
            ends, _ = jax.lax.scan(jax.checkpoint(end), (first, all_kept), (x, dt, B, segments, before))
            first, last = sequence.carried_in(*ends)
        state, y = jax.lax.scan(jax.checkpoint(one), first, (x, dt, B, C, segments, before))
    else:
        terms = jax.vmap(_chunk_terms, in_axes=(0, 0, 0, 0, 0, None, 0))
        local, gain, added, kept = terms(x, dt, B, C, segments, A, before)
        if in_pieces:
            ends, _ = jax.lax.scan(lambda ends, now: (over(ends, now), None), (first, all_kept), (added, kept))
            first, last = sequence.carried_in(*ends)
        state, carried = jax.lax.scan(lambda s, now: (now[1] * s + now[0], s), first, (added, kept))
        y = local + jax.vmap(_read)(carried, C, gain)
    y = jnp.moveaxis(y, 0, 1).reshape(b, t + pad, h, p)[:, :t]
    return y, state if last is None else last


def _chunk_terms(x, dt, B, C, segments, A, before):
    """What one chunk [b, q, ...] yields without its carried state: (local output [b, q, h, p], decay from the chunk's
    start [b, q, h], state added [b, h, p, n], factor on the carried state [b, h, 1, 1])."""
    kind = wide(x.dtype)
    q = x.shape[1]
    log_decay = _log_decay(dt, A)
    visible = jnp.tril(jnp.ones((q, q), bool)) & (segments[:, :, None] == segments[:, None, :])
    between = jnp.where(visible[:, None], log_decay[..., :, None] - log_decay[..., None, :], -jnp.inf)
    scores = contract("bqn,bsn->bqs", C, B, kind)
    weights = scores[:, None] * jnp.exp(between) * jnp.moveaxis(dt, 1, 2)[:, :, None, :]
    local = jnp.swapaxes(contract("bhqs,bhsp->bhqp", weights.astype(x.dtype), jnp.swapaxes(x, 1, 2), kind), 1, 2)

    same_start = (segments == before[:, None])[:, None]  # no segment began since the chunk's start
    gain = jnp.moveaxis(jnp.exp(jnp.where(same_start, log_decay, -jnp.inf)), 1, 2)
    return local, gain, *_chunk_end(x, dt, B, segments, A, before)


def _log_decay(dt, A):
    # As a product with a triangle: XLA's CPU compiler would take a cumulative sum apart, and put it together again in
    # each element of the [q, q] matrices that are made of it.
    q = dt.shape[1]
    until = jnp.triu(jnp.ones((q, q), dt.dtype))
    return jnp.einsum("bsh,sq->bhq", dt * A, until, precision=jax.lax.Precision.HIGHEST)


def _chunk_end(x, dt, B, segments, A, before):
    """What a chunk adds to the state, and the factor on the carried one."""
    log_decay = _log_decay(dt, A)
    last = segments[:, -1:]
    to_end = jnp.where((segments == last)[:, None], log_decay[..., -1:] - log_decay, -jnp.inf)
    share = jnp.moveaxis(jnp.exp(to_end), 1, 2) * dt  # [b, q, h]
    added = contract("bshp,bsn->bhpn", (share[..., None] * x).astype(x.dtype), B, wide(x.dtype))
    kept = jnp.where(last == before[:, None], jnp.exp(log_decay[..., -1]), 0)[..., None, None]
    return added, kept


def _read(state, C, gain):
    """Output of the carried state [b, h, p, n] at the positions of a chunk."""
    return contract("bqn,bhpn->bqhp", C.astype(state.dtype), state) * gain[..., None]


def linear_scan(
    decay: Float[Array, "b t"], x: Float[Array, "b t d"], *, form: str = "auto", block: int = 64
) -> Float[Array, "b t d"]:
    """h_t = decay_t h_{t-1} + x_t from h_{-1} = 0, one decay >= 0 for all features; a decay of 0 begins anew.

    The backward pass is the same recurrence reversed: nothing but h is kept, and the gradient of the decay does not go
    through sums of logarithms (which lose two or three digits). `scan` goes step by step (fastest on CPU), `blocked`
    does `block` steps as one product and scans over blocks. Computes in float32 or wider.
    """
    if form == "auto":
        form = "scan" if platform() == "cpu" else "blocked"
    kind = wide(x.dtype)
    return _linear_scan(form, block, decay.astype(kind), x.astype(kind))


@partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def _linear_scan(form, block, decay, x):
    run = _scan_steps if form == "scan" else partial(_scan_blocks, block=block)
    if sequence.pieces() == 1:
        return run(decay, x)

    def piece(split, _):
        decay, _ = split
        h = run(*split)
        before, _ = sequence.carried_in(h[:, -1], jnp.prod(decay, axis=1)[:, None])
        return h + jnp.cumprod(decay, axis=1)[..., None] * before[:, None], ()

    return sequence.over_pieces(piece, (decay, x))[0]


def _linear_scan_forward(form, block, decay, x):
    h = _linear_scan(form, block, decay, x)
    return h, (decay, h)


def _linear_scan_backward(form, block, saved, g):
    decay, h = saved
    next_decay = jnp.pad(decay[:, 1:], ((0, 0), (0, 1)))
    back = _linear_scan(form, block, next_decay[:, ::-1], g[:, ::-1])[:, ::-1]
    before = jnp.pad(h[:, :-1], ((0, 0), (1, 0), (0, 0)))
    return jnp.sum(back * before, axis=-1), back


_linear_scan.defvjp(_linear_scan_forward, _linear_scan_backward)


def _scan_steps(decay, x):
    def step(h, now):
        h = now[0][:, None] * h + now[1]
        return h, h

    _, out = jax.lax.scan(step, jnp.zeros_like(x[:, 0]), (decay.T, jnp.swapaxes(x, 0, 1)))
    return jnp.swapaxes(out, 0, 1)


def _scan_blocks(decay, x, block):
    b, t, d = x.shape
    block = min(block, t)
    pad = -t % block
    decay = jnp.pad(decay, ((0, 0), (0, pad))).reshape(b, -1, block)
    x = jnp.pad(x, ((0, 0), (0, pad), (0, 0))).reshape(b, -1, block, d)
    cut = decay == 0  # kept apart from the logarithms: a zero decay starts a new stretch
    log = jnp.cumsum(jnp.log(jnp.where(cut, 1, decay)), axis=-1)
    stretch = jnp.cumsum(cut, axis=-1)
    visible = jnp.tril(jnp.ones((block, block), bool)) & (stretch[..., :, None] == stretch[..., None, :])
    weights = jnp.exp(jnp.where(visible, log[..., :, None] - log[..., None, :], -jnp.inf))
    local = jnp.einsum("bnij,bnjd->bnid", weights, x, precision=jax.lax.Precision.HIGHEST)
    gain = jnp.where(stretch == 0, jnp.exp(log), 0)[..., None]  # decay since the block began

    def step(h, now):
        last, gain = now
        return last + gain * h, h

    ends = (jnp.moveaxis(local[:, :, -1], 1, 0), jnp.moveaxis(gain[:, :, -1], 1, 0))
    _, carried = jax.lax.scan(step, jnp.zeros_like(x[:, 0, 0]), ends)
    out = local + gain * jnp.moveaxis(carried, 0, 1)[:, :, None]
    return out.reshape(b, t + pad, d)[:, :t]
