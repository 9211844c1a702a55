"""Which parameter is split how: a table from path patterns to logical axes, kept outside the models.

Exactly one row must match each parameter; none or two is an error. The same table serves the optimizer state, whose
paths end in the parameter's own path.
"""

import re
from typing import Any

import jax
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from bytelm.config import ConfigError
from bytelm.parallel.mesh import named, to_spec, ways

# Parameters inside a run of blocks carry a leading "layers" axis.
RULES: tuple[tuple[str, tuple[str | None, ...]], ...] = (
    (r"((local_|hash_)?embed|positions|ranks)/table", (None, "embed")),
    (r"head/kernel", ("embed", None)),
    (r"ahead/heads/(mix|out)/kernel", ("layers", "embed", None)),
    (r"(stack|encoder|decoder|main|final|local)/norm/scale", (None,)),
    (r"router/[qk]/kernel", ("embed", None)),
    (r"residual/kernel", ("embed", None)),
    (r"residual/bias", (None,)),
    (r"(backbone|inner)/pad", (None,)),
    (r"chunks/(need|capacity)", (None,)),  # of the train state, not parameters
    (r"(run\d+|blocks)/(mixer|attention|cross|mlp)_norm/scale", ("layers", None)),
    (r"run\d+/attention/[qk]_norm/norm/scale", ("layers", None)),
    (r"run\d+/attention/q/kernel", ("layers", "embed", "heads", None)),
    (r"run\d+/attention/[kv]/kernel", ("layers", "embed", "kv_heads", None)),
    (r"run\d+/attention/out/kernel", ("layers", "heads", None, "embed")),
    (r"(run\d+|blocks)/mlp/(gate|up)/kernel", ("layers", "embed", "mlp")),
    (r"(run\d+|blocks)/mlp/down/kernel", ("layers", "mlp", "embed")),
    (r"run\d+/mamba/[zx]/kernel", ("layers", "embed", "heads", None)),
    (r"run\d+/mamba/bc/kernel", ("layers", "embed", None, None)),
    (r"run\d+/mamba/dt/kernel", ("layers", "embed", "heads")),
    (r"run\d+/mamba/conv_x/kernel", ("layers", None, "heads", None)),
    (r"run\d+/mamba/conv_x/bias", ("layers", "heads", None)),
    (r"run\d+/mamba/conv_bc/kernel", ("layers", None, None, None)),
    (r"run\d+/mamba/conv_bc/bias", ("layers", None, None)),
    (r"run\d+/mamba/(A_log|D|dt_bias)", ("layers", "heads")),
    (r"run\d+/mamba/norm/scale", ("layers", "heads", None)),
    (r"run\d+/mamba/out/kernel", ("layers", "heads", None, "embed")),
    (r"blocks/(cross_)?attention/[qkv]/kernel", ("layers", "embed", "some_heads", None)),
    (r"blocks/(cross_)?attention/out/kernel", ("layers", "some_heads", None, "embed")),
    (r"(encoder|decoder)/bias/table", (None, None)),
    (r"(delete_gate|boundary|pool)/norm/scale", (None,)),
    (r"delete_gate/kernel", (None,)),
    (r"delete_gate/bias", ()),
    (r"boundary/hidden", ("embed", "mlp")),
    (r"boundary/hidden_bias", ("mlp",)),
    (r"boundary/out", ("mlp", None)),
    (r"boundary/out_bias", (None,)),
    (r"pool/kernel", (None, "embed", None)),
    (r"pool/[qkv]/kernel", ("embed", "some_heads", None)),
    (r"pool/out/kernel", ("some_heads", None, "embed")),
    (r"pool/[qk]_norm/norm/scale", (None,)),
    (r"query|first_(word|patch|byte)", (None,)),
    (r"offsets", (None, None)),
    (r"guide/layer/norm/scale", ("layers", None)),
    (r"guide/layer/v/kernel", ("layers", "embed", "some_heads", None)),
    (r"guide/layer/out/kernel", ("layers", "some_heads", None, "embed")),
    (r"pool/split/kernel", ("embed", None, None)),
    (r"pool/cross/[qk]_norm/scale", (None,)),
    (r"pool/cross/[qkv]/kernel", ("embed", "some_heads", None)),
    (r"pool/cross/out/kernel", ("some_heads", None, "embed")),
    (r"join/kernel", (None, None, "embed")),
    (r"part/kernel", ("embed", None, None)),
    (r"read/[qk]_norm/scale", ("layers", None)),
    (r"read/[qkv]/kernel", ("layers", "embed", "some_heads", None)),
    (r"read/out/kernel", ("layers", "some_heads", None, "embed")),
    (r"coarse/kernel", ("embed", None)),
    (r"coarse/bias", (None,)),
    (r"pool/bias", (None,)),
)


# Of tokenized decoders, whose blocks are stacked [layers, ...].
TOKEN_RULES: tuple[tuple[str, tuple[str | None, ...]], ...] = (
    (r"(embed|positions)/table", (None, "embed")),
    (r"head/kernel", ("embed", None)),
    (r"norm/(scale|bias)", (None,)),
    (r"blocks/(attention|mlp|q|k)_norm/(scale|bias)", ("layers", None)),
    (r"blocks/q/kernel", ("layers", "embed", "heads", None)),
    (r"blocks/[kv]/kernel", ("layers", "embed", "kv_heads", None)),
    (r"blocks/q/bias", ("layers", "heads", None)),
    (r"blocks/[kv]/bias", ("layers", "kv_heads", None)),
    (r"blocks/out/kernel", ("layers", "heads", None, "embed")),
    (r"blocks/(out|down)/bias", ("layers", None)),
    (r"blocks/(gate|up)/kernel", ("layers", "embed", "mlp")),
    (r"blocks/(gate|up)/bias", ("layers", "mlp")),
    (r"blocks/down/kernel", ("layers", "mlp", "embed")),
)


def path_string(path: tuple) -> str:
    """A pytree path as `stack/run0/attention/q/kernel`."""
    return jax.tree_util.keystr(path, simple=True, separator="/")


def logical_axes(path: str, rules: tuple = RULES) -> tuple[str | None, ...]:
    """The logical axes of the parameter at `path`. Raises ValueError unless exactly one row matches."""
    rows = [(pattern, axes) for pattern, axes in rules if re.search(rf"(^|/){pattern}$", path)]
    if len(rows) != 1:
        found = "no row" if not rows else "the rows " + " and ".join(repr(p) for p, _ in rows)
        raise ValueError(f"parameter {path!r}: {found} of the sharding table match; exactly one must")
    return rows[0][1]


def where_divided(axes: tuple[str | None, ...], shape: tuple[int, ...], tensor: int) -> tuple[str | None, ...]:
    """Logical axes of an array, without `some_heads` where the tensor axis does not divide them."""
    return tuple(None if axis == "some_heads" and size % tensor else axis for size, axis in zip(shape, axes))


def state_shardings(mesh: Mesh, abstract: Any, rules: tuple = RULES) -> Any:
    """NamedShardings for a train state (parameters, optimizer moments, counters) given by its shapes.

    Scalars are replicated. Raises ConfigError where a mesh axis does not divide the dimension it should split.
    """

    def one(path, leaf):
        if leaf.ndim == 0:
            return NamedSharding(mesh, P())
        name = path_string(path)
        axes = logical_axes(name, rules)
        if len(axes) != leaf.ndim:
            raise ValueError(f"parameter {name!r} has shape {leaf.shape}, the sharding table gives it axes {axes}")
        axes = where_divided(axes, leaf.shape, mesh.shape["tensor"])
        spec = to_spec(axes, mesh.axis_names)
        for size, entry, axis in zip(leaf.shape, spec, axes):
            count = ways(entry, mesh.shape)
            if size % count:
                raise ConfigError(f"{named(entry)}={count} does not divide {axis}={size} of {name}: "
                                  f"choose a {named(entry)} that divides {size}")  # fmt: skip
        return NamedSharding(mesh, spec)

    return jax.tree.map_with_path(one, abstract)


def is_cast(path: str, dtype: str) -> bool:
    """Whether a parameter is used in the compute type: the projection matrices.

    The embedding table, convolutions, norms, biases and rates stay float32: their gradients are sums over all
    positions, which bfloat16 cannot hold. So do H-Net's routers and residual projections and the delete gate, which
    compute in float32, and entropy models, whose cuts must be the same wherever they are made.
    """
    wide = any(part in path for part in ("conv", "router", "residual", "delete_gate", "pool", "patcher"))
    return dtype != "float32" and path.endswith("kernel") and not wide


def cast_matrices(params: Any, dtype: str) -> Any:
    """Parameters with the projection matrices in the compute type: once for a training step, or to serve."""
    return jax.tree.map_with_path(lambda path, p: p.astype(dtype) if is_cast(path_string(path), dtype) else p, params)
