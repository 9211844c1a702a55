"""A stack of pre-norm residual blocks in runs of equal kind, each run one scan over stacked weights.

The residual stream is float32 or wider; block inputs and outputs have the compute dtype. Equal to the isotropic stack
of H-Net: r += mixer(rms(r)); r += mlp(rms(r)); out = rms(r).
"""

import math
from dataclasses import dataclass
from typing import Any, Protocol, runtime_checkable

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Bool, Float, Int

from bytelm.config import StackConfig, parse_layout
from bytelm.nn import splash
from bytelm.nn.attention import Attention
from bytelm.nn.cache import StackCache
from bytelm.nn.compaction import expand
from bytelm.nn.layers import ReLUMLP, SwiGLU, make_norm, wide
from bytelm.nn.mamba2 import Mamba2
from bytelm.parallel.mesh import shard, unroll


class Block(nnx.Module):
    """One mixer (attention or Mamba-2), with or without an MLP, each behind its norm and added to the residual."""

    def __init__(self, kind: str, config: StackConfig, *, std: float, out_std: float, dtype: str, rngs: nnx.Rngs):
        self.kind = kind
        self.mixer_norm = make_norm(config.norm, config.d_model, eps=config.norm_eps, dtype=dtype)
        mixer = dict(std=std, out_std=out_std, dtype=dtype, rngs=rngs)
        if kind in "tT":
            self.attention = Attention(config, **mixer)
        else:
            self.mamba = Mamba2(config, **mixer)
        if kind.isupper():
            self.mlp_norm = make_norm(config.norm, config.d_model, eps=config.norm_eps, dtype=dtype)
            mlp = SwiGLU if config.mlp == "swiglu" else ReLUMLP
            self.mlp = mlp(config.d_model, config.mlp_width, **mixer)

    @property
    def mixer(self) -> Attention | Mamba2:
        return self.attention if self.kind in "tT" else self.mamba

    def _feed_forward(self, r):
        return r + self.mlp(self.mlp_norm(r)).astype(r.dtype) if self.kind.isupper() else r

    def __call__(self, r, positions, segments):
        r = r + self.mixer(self.mixer_norm(r), positions, segments).astype(r.dtype)
        return shard(self._feed_forward(r), "batch", "length", None)

    def prefill(self, r, lengths, max_length):
        y, cache = self.mixer.prefill(self.mixer_norm(r), lengths, max_length)
        return self._feed_forward(r + y.astype(r.dtype)), cache

    def step(self, r, cache, lengths, active):
        y, cache = self.mixer.step(self.mixer_norm(r), cache, lengths, active)
        return self._feed_forward(r + y.astype(r.dtype)), cache

    def extend(self, r, cache, lengths):
        y, trail = self.mixer.extend(self.mixer_norm(r), cache, lengths)
        return self._feed_forward(r + y.astype(r.dtype)), trail


def residual_additions(layout: str) -> int:
    """How many times a stack adds to its residual stream (each mixer and each MLP once)."""
    return sum(count * (2 if kind.isupper() else 1) for kind, count in parse_layout(layout))


_policies = jax.checkpoint_policies
REMAT_POLICIES = {
    "dots": _policies.save_from_both_policies(
        _policies.dots_with_no_batch_dims_saveable, _policies.save_only_these_names(splash.KEPT)
    ),
    "full": None,
}


@runtime_checkable
class Guide(Protocol):
    """What happens to the residual stream in front of each block."""

    def at_layers(self, begin: int, count: int) -> Any:
        """What it needs for these layers: arrays [l, ...]."""
        ...

    def enter(self, r: Float[Array, "*b d"], layer: Any) -> Float[Array, "*b d"]:
        """The residual stream that goes into a block, with what `at_layers` gave for it."""
        ...


@jax.tree_util.register_dataclass
@dataclass
class SlotGuide:
    """Adds at position t of a row `first` where slot[t] is negative, else what stands in that slot."""

    value: Float[Array, "l b c d"]
    first: Float[Array, "l d"]
    slot: Int[Array, "b t"]

    def at_layers(self, begin: int, count: int) -> tuple[Array, Array]:
        return self.value[begin : begin + count], self.first[begin : begin + count]

    def enter(self, r: Float[Array, "b t d"], layer: tuple[Array, Array]) -> Float[Array, "b t d"]:
        value, first = layer
        added = jnp.where((self.slot < 0)[..., None], first, expand(value, jnp.maximum(self.slot, 0)))
        return r + added.astype(r.dtype)


@jax.tree_util.register_dataclass
@dataclass
class StepGuide:
    """Adds a vector per row, in a step."""

    value: Float[Array, "l b d"]

    def at_layers(self, begin: int, count: int) -> Array:
        return self.value[begin : begin + count]

    def enter(self, r: Float[Array, "b d"], layer: Float[Array, "b d"]) -> Float[Array, "b d"]:
        return r + layer


class Stack(nnx.Module):
    """The blocks of a StackConfig and the closing norm. Run i is `run{i}`, its weights stacked [l, ...]."""

    def __init__(self, config: StackConfig, *, std: float, dtype: str, rngs: nnx.Rngs, out_scale: float = 0.0,
                 closing_norm: bool = True):  # fmt: skip
        """`out_scale` scales the initial output projections; 0 = 1 / sqrt(residual additions). Without `closing_norm`
        the stack gives its residual stream."""
        self.config = config
        scale = out_scale or 1 / math.sqrt(residual_additions(config.layout))
        self.num_runs, self.divided = len(parse_layout(config.layout)), False
        for i, (kind, count) in enumerate(parse_layout(config.layout)):
            widest = config.mlp_width if kind.isupper() else config.d_model
            out_std = (std or 1 / math.sqrt(widest)) * scale
            make = lambda key, kind=kind, out_std=out_std: Block(  # noqa: E731
                kind, config, std=std, out_std=out_std, dtype=dtype, rngs=nnx.Rngs(params=key)
            )
            setattr(self, f"run{i}", jax.vmap(make)(jax.random.split(rngs.params(), count)))
        self.dtype = dtype
        if closing_norm:
            self.norm = make_norm(config.norm, config.d_model, eps=config.norm_eps, dtype=dtype)

    def _close(self, r):
        return self.norm(r) if hasattr(self, "norm") else r.astype(self.dtype)

    def _runs(self):
        return ((f"run{i}", getattr(self, f"run{i}")) for i in range(self.num_runs))

    def _guided_runs(self, guide: Guide | None):
        begin = 0
        for _, run in self._runs():
            count = run.mixer_norm.scale.shape[0]
            yield run, None if guide is None else guide.at_layers(begin, count)
            begin += count

    def _over_layers(self, body, carry, per_layer):
        if self.divided:  # no loop whose ends would copy what goes through it
            carry, out = body(carry, jax.tree.map(lambda v: v[0], per_layer))
            return carry, jax.tree.map(lambda v: v[None], out)
        return jax.lax.scan(body, carry, per_layer, unroll=unroll() if self.config.scan_layers else True)

    def __call__(
        self,
        x: Float[Array, "b t d"],
        positions: Int[Array, "b t"] | None = None,
        segments: Int[Array, "b t"] | None = None,
        guide: Guide | None = None,
    ) -> Float[Array, "b t d"]:
        """Causal forward. Positions default to 0..t-1; where `segments` changes, nothing flows across; `guide` comes in
        front of each block."""
        if positions is None:
            positions = jnp.broadcast_to(jnp.arange(x.shape[1]), x.shape[:2])
        r = x.astype(wide(x.dtype))

        def body(r, layer):
            block, extra = layer
            return block(r if guide is None else guide.enter(r, extra), positions, segments), None

        for run, extra in self._guided_runs(guide):
            looped = self.config.scan_layers and run.mixer_norm.scale.shape[0] > 1
            layer = body
            if self.config.remat != "none":  # only a real loop keeps the compiler from merging the recomputation away
                layer = jax.checkpoint(body, policy=REMAT_POLICIES[self.config.remat], prevent_cse=not looped)
            r, _ = self._over_layers(layer, r, (run, extra))
        return self._close(r)

    def prefill(
        self,
        x: Float[Array, "b t d"],
        lengths: Int[Array, " b"],
        max_length: int,
        guide: Guide | None = None,
    ) -> tuple[Float[Array, "b t d"], StackCache]:
        """Forward over right-padded rows (outputs past a row's length are of no use) and the cache after `lengths`
        positions, with room for `max_length`."""
        r, caches = x.astype(wide(x.dtype)), {}

        def body(r, layer):
            block, extra = layer
            return block.prefill(r if guide is None else guide.enter(r, extra), lengths, max_length)

        for (name, _), pair in zip(self._runs(), self._guided_runs(guide)):
            r, caches[name] = self._over_layers(body, r, pair)
        return self._close(r), StackCache(lengths, caches)

    def step(
        self,
        x: Float[Array, "b d"],
        cache: StackCache,
        active: Bool[Array, " b"] | None = None,
        guide: Guide | None = None,
    ) -> tuple[Float[Array, "b d"], StackCache]:
        """One position per row. The caller keeps lengths below the cache's room. Rows that are not `active` keep their
        cache, and their output is of no use."""
        r, caches = x.astype(wide(x.dtype)), {}

        def body(r, layer):
            (block, extra), cache_ = layer
            return block.step(r if guide is None else guide.enter(r, extra), cache_, cache.lengths, active)

        for (name, _), pair in zip(self._runs(), self._guided_runs(guide)):
            r, caches[name] = self._over_layers(body, r, (pair, cache.runs[name]))
        return self._close(r), StackCache(cache.lengths + (1 if active is None else active), caches)

    def extend(
        self, x: Float[Array, "b q d"], cache: StackCache, guide: Guide | None = None
    ) -> tuple[Float[Array, "b q d"], dict[str, Any]]:
        """Several positions per row at once, and the trail of them that `keep` reads; the cache stays as it is."""
        r, trails = x.astype(wide(x.dtype)), {}

        def body(r, layer):
            (block, extra), cache_ = layer
            return block.extend(r if guide is None else guide.enter(r, extra), cache_, cache.lengths)

        for (name, _), pair in zip(self._runs(), self._guided_runs(guide)):
            r, trails[name] = self._over_layers(body, r, (pair, cache.runs[name]))
        return self._close(r), trails

    def keep(self, cache: StackCache, trail: dict[str, Any], kept: Int[Array, " b"]) -> StackCache:
        """The cache after the first `kept` positions of a trail; the caller keeps lengths below the cache's room."""
        runs = {
            name: jax.vmap(lambda block, old, new: block.mixer.keep(old, new, cache.lengths, kept))(
                run, cache.runs[name], trail[name]
            )
            for name, run in self._runs()
        }
        return StackCache(cache.lengths + kept, runs)

    def divide(self) -> None:
        """Makes each layer a run of its own, with its own copy of its weights. A loop over steps then reads them where
        they lie, and each layer's cache; the loop over the layers of a run would copy both at every step. The cache
        that goes with it is `divided`."""
        layers = []
        for name, run in list(self._runs()):
            graph, weights = nnx.split(run)
            for i in range(run.mixer_norm.scale.shape[0]):
                layers.append(nnx.merge(graph, jax.tree.map(lambda w, i=i: w[i : i + 1], weights)))
            delattr(self, name)
        self.num_runs, self.divided = len(layers), True
        for i, layer in enumerate(layers):
            setattr(self, f"run{i}", layer)

    def empty_cache(self, b: int, max_length: int) -> StackCache:
        """The cache of rows that have seen nothing yet."""
        caches = {}
        for name, run in self._runs():
            count = run.mixer_norm.scale.shape[0]
            one = run.mixer.empty_cache(b, max_length)
            caches[name] = jax.tree.map(lambda v, count=count: jnp.broadcast_to(v, (count, *v.shape)), one)
        return StackCache(jnp.zeros(b, jnp.int32), caches)


def divide_stacks(network: nnx.Module) -> None:
    """`Stack.divide` for every stack of a network."""
    for _, node in list(nnx.iter_graph(network)):
        if isinstance(node, Stack):
            node.divide()


def divided(cache: Any) -> Any:
    """A network's cache as its divided stacks have it: one run a layer."""

    def one(node):
        if not isinstance(node, StackCache):
            return node
        layers = [
            jax.tree.map(lambda v, i=i: v[i : i + 1], run)
            for run in node.runs.values()
            for i in range(jax.tree.leaves(run)[0].shape[0])
        ]
        return StackCache(node.lengths, {f"run{i}": layer for i, layer in enumerate(layers)})

    return jax.tree.map(one, cache, is_leaf=lambda node: isinstance(node, StackCache))
