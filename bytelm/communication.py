"""What the chips of a mesh send each other in a training step, counted from the sharding table.

The compiled program is no place to count: XLA turns a gather into all-reduces of padded shards where it likes, and a
loop's body stands there once. Here every use of a sharded array is counted by what a ring moves: gathering or reducing
an array of n bytes over k chips moves n (k - 1) / k through each of them, an all-reduce twice that.
"""

from typing import Any

import jax

from bytelm.config import Config, FlatConfig, HNetConfig, StackConfig, T5Config, parse_layout
from bytelm.data.seq2seq import target_length
from bytelm.models.flops import trained_kept, unit_stacks
from bytelm.parallel.mesh import to_spec
from bytelm.parallel.rules import is_cast, logical_axes, path_string, where_divided

PURPOSES = {
    "parameter gather": "fsdp and sequence: each shard of the weights, forward and backward",
    "gradient reduce": "fsdp, sequence and data: gradients to the shards that own them",
    "tensor": "tensor: sums of partial products, forward and backward",
    "sequence": "sequence: keys, values and chunks of a row in pieces, forward and backward",
    "between slices": "data: gradients between slices, over the hosts' network",
}


def bytes_per_step(
    config: Config, params: Any, mesh: dict[str, int], slots: tuple[int, ...], slices: int = 1
) -> dict[str, float]:
    """Bytes through one chip in an optimizer step, by purpose. `slots`: chunk slots per row of each level."""
    accum, width = config.train.grad_accum, 2 if config.model.dtype == "bfloat16" else 4
    fsdp, data, tensor, pieces = mesh["fsdp"], mesh["data"], mesh["tensor"], mesh.get("sequence", 1)
    ring = lambda ways: (ways - 1) / ways  # noqa: E731
    within = data // slices
    out = dict.fromkeys(PURPOSES, 0.0)
    for path, leaf in jax.tree.leaves_with_path(params):
        name = path_string(path)
        spec = to_spec(where_divided(logical_axes(name), leaf.shape, tensor), mesh)
        size = leaf.size * (width if is_cast(name, config.model.dtype) else 4)
        if "tensor" in spec:
            size /= tensor
        sharded = any("fsdp" in (entry or ()) for entry in spec)
        if sharded:
            out["parameter gather"] += accum * 2 * size * ring(fsdp * pieces)
        shard = size / (fsdp * pieces) if sharded else size
        reduce = size * ring(fsdp * pieces) * (1 if sharded else 2)
        out["gradient reduce"] += accum * (reduce + 2 * shard * ring(within))
        out["between slices"] += accum * 2 * shard * ring(slices)
    rows = config.data.batch_size // (data * fsdp)  # over all microbatches
    out["tensor"] = rows / pieces * _tensor_sums(config, slots) * width * 2 * ring(tensor)
    out["sequence"] = rows * _exchanged(config, slots, width, tensor) * 2 * ring(pieces)
    return out


def _exchanged(config: Config, slots: tuple[int, ...], width: int, tensor: int) -> float:
    """Bytes per row that all its pieces read of each other in a forward pass: keys and values where attention has no
    window, and chunks on their way in and, in float32, out. (Windows and states are few.)"""
    model, t = config.model, config.data.seq_len
    if isinstance(model, FlatConfig):
        return _keys_and_values(model.stack, t) * width / tensor
    if not isinstance(model, HNetConfig):
        return 0.0
    keys = sum(_keys_and_values(stack, elements) for stack, elements in unit_stacks(model, t, slots))
    return keys * width / tensor + sum(count * d * (width + 4) for count, d in zip(slots, model.d_model))


def _keys_and_values(stack: StackConfig, elements: int) -> float:
    layers = 0 if stack.window else sum(count for kind, count in parse_layout(stack.layout) if kind in "tT")
    return 2.0 * layers * elements * stack.kv_heads * stack.head_width


def _tensor_sums(config: Config, slots: tuple[int, ...]) -> float:
    """Elements per row that are summed over the tensor axis: what every mixer and MLP puts out, and the gradient of
    what it takes in."""
    model = config.model
    if isinstance(model, FlatConfig):
        return _stack_sums(model.stack, config.data.seq_len)
    if isinstance(model, T5Config):
        t, targets = config.data.seq_len, target_length(config.data)
        behind = model.encoder_layers - model.first_layers
        encoder = 2 * (model.first_layers * t + behind * trained_kept(model, {}) * t)
        return 2.0 * model.d_model * (encoder + 3 * model.decoder_layers * targets)
    return sum(_stack_sums(stack, elements) for stack, elements in unit_stacks(model, config.data.seq_len, slots))


def _stack_sums(stack: StackConfig, elements: int) -> float:
    blocks = sum(count * (2 if kind.isupper() else 1) for kind, count in parse_layout(stack.layout))
    return 2.0 * blocks * elements * stack.d_model
