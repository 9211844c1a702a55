"""What a config costs before it runs: parameters, useful FLOPs per byte, memory per device. Allocates nothing."""

import dataclasses
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import jax

from bytelm.config import (
    BLTConfig,
    Config,
    ConfigError,
    FlatConfig,
    HATConfig,
    HNetConfig,
    StackConfig,
    T5Config,
    TokensConfig,
    UnitConfig,
    parse_layout,
    remat_field,
)
from bytelm.data.seq2seq import target_length
from bytelm.devices import CHIPS, Chip
from bytelm.models.build import count_parameters, structure
from bytelm.models.deletion import capacity_slots
from bytelm.models.flops import (
    TRAIN_FACTOR,
    forward_flops,
    t5_flops,
    target_bytes_per_chunk,
    trained_kept,
    unit_stacks,
)
from bytelm.models.hnet_recipe import stage_of
from bytelm.nn.attend import KEY_BLOCK, SPLASH_FROM
from bytelm.nn.relative import QUERY_BLOCK
from bytelm.parallel.mesh import axes_of, named, to_spec, ways
from bytelm.parallel.rules import logical_axes, path_string, where_divided
from bytelm.train.capacity import first_capacity
from bytelm.train.state import check_pieces
from bytelm.vocab import NUM_SYMBOLS


@dataclass(frozen=True)
class Plan:
    """The figures of `bytelm plan`."""

    parameters: dict[str, int]  # by part
    forward_flops_per_byte: float
    train_flops_per_byte: float
    bytes_per_step: int
    mesh: dict[str, int]
    memory: dict[str, float]  # bytes on one device, by use; activations are an estimate
    chip: Chip | None
    bytes_per_chunk: tuple[float, ...] = ()  # of each level of an H-Net, for the useful FLOPs
    slots: tuple[int, ...] = ()  # chunk slots per row that training starts with, for memory and executed FLOPs
    executed_flops_per_byte: float = 0.0  # of a training step that computes every slot

    @property
    def total_parameters(self) -> int:
        return sum(self.parameters.values())

    @property
    def total_memory(self) -> float:
        return sum(self.memory.values())


def make_plan(
    config: Config, devices: int = 0, chip: str = "", bytes_per_chunk: tuple[float, ...] = (), params: Any = None
) -> Plan:
    """The plan of a config on `devices` chips (0: as many as the mesh sizes name, at least one). `bytes_per_chunk`: of
    each level of an H-Net (default: its targets); `params`: the model's shapes, where they are known already.

    Raises ConfigError when the mesh does not fit the devices or the parameters, or the chip is unknown.
    """
    if chip and chip not in CHIPS:
        raise ConfigError(f"--chip {chip}: choose one of {', '.join(CHIPS)}")
    model, t = config.model, config.data.seq_len
    targets = target_bytes_per_chunk(model)
    rising = all(1 <= a <= b < math.inf for a, b in zip((1.0, *bytes_per_chunk), bytes_per_chunk))
    if bytes_per_chunk and (len(bytes_per_chunk) != len(targets) or not rising):
        raise ConfigError(
            f"--bytes-per-chunk {bytes_per_chunk}: give a number of at least 1 for each of {len(targets)} levels, none "
            "smaller than the one before it"
        )
    bytes_per_chunk = bytes_per_chunk or targets
    slots = first_capacity(model, t) if isinstance(model, UnitConfig) else ()
    mesh = _mesh_shape(config, devices)
    params = structure(config.model)[1] if params is None else params
    parts: dict[str, int] = {}
    for path, leaf in jax.tree.leaves_with_path(params):
        part = _part(path_string(path))
        parts[part] = parts.get(part, 0) + leaf.size
    assert sum(parts.values()) == count_parameters(params)
    forward = model_flops(config, bytes_per_chunk)
    return Plan(
        parameters=dict(sorted(parts.items(), key=lambda item: -item[1])),
        forward_flops_per_byte=forward,
        train_flops_per_byte=TRAIN_FACTOR * forward,
        bytes_per_step=round(config.data.batch_size * config.data.seq_len * _bytes_per_position(config)),
        mesh=mesh,
        memory=_memory(config, params, mesh, slots, chip in CHIPS and CHIPS[chip].name.startswith("TPU")),
        chip=CHIPS.get(chip),
        bytes_per_chunk=bytes_per_chunk,
        slots=slots,
        executed_flops_per_byte=TRAIN_FACTOR * _executed(config, slots),
    )


def _bytes_per_position(config: Config) -> float:
    return target_bytes_per_chunk(config.model)[0] if isinstance(config.model, TokensConfig) else 1.0


def model_flops(config: Config, bytes_per_chunk: Sequence[float]) -> float:
    """Forward FLOPs per byte of a training step (of the source, of an encoder-decoder)."""
    model, t = config.model, config.data.seq_len
    if isinstance(model, T5Config):
        return t5_flops(model, t, target_length(config.data), trained_kept(model, {}))
    return forward_flops(model, t, bytes_per_chunk)


def _executed(config: Config, slots: Sequence[int]) -> float:
    """Forward FLOPs per byte of a training step as it starts: of every slot, used or not."""
    model, t = config.model, config.data.seq_len
    if isinstance(model, T5Config):
        return t5_flops(model, t, target_length(config.data), _kept_slots(model, t) / t)
    return model_flops(config, [t / n for n in slots])


def _kept_slots(model: T5Config, t: int) -> float:
    """Slots of a row behind an encoder's first blocks as training starts."""
    d = model.deletion
    if not (d.gated and d.train == "compact"):
        return t if d.kind == "boundary" else trained_kept(model, {}) * t
    return (*first_capacity(model, t), capacity_slots(d, t))[0]  # before they follow the gate


def _mesh_shape(config: Config, devices: int) -> dict[str, int]:
    sizes = {axis: getattr(config.mesh, axis) for axis in axes_of(config.mesh)}
    fixed = math.prod(size for size in sizes.values() if size > 0)
    devices = devices or fixed
    free = [axis for axis, size in sizes.items() if size == -1]
    if free and devices % fixed == 0:
        sizes[free[0]] = devices // fixed
    if math.prod(sizes.values()) != devices:
        raise ConfigError(f"mesh sizes {sizes} do not multiply to {devices} devices: change mesh.* or --devices")
    check_pieces(config, sizes.get("sequence", 1))
    batch_ways = sizes["data"] * sizes["fsdp"] * config.train.grad_accum
    if config.data.batch_size % batch_ways:
        raise ConfigError(
            f"data.batch_size={config.data.batch_size} is not a multiple of data x fsdp x grad_accum = {batch_ways}"
        )
    return sizes


def _part(path: str) -> str:
    if path.startswith("backbone"):
        found = next((n for n in ("encoder", "decoder", "main", "router", "residual") if f"/{n}/" in path), "widening")
        return f"stage {stage_of(path)} {found}"
    if path.endswith("bias/table"):
        return "position bias"
    for name in ("delete_gate", "boundary", "pool", "embed", "head", "attention", "mamba", "mlp", "norm"):
        if name in path:
            return name
    return path.split("/")[0]


def _local_size(path: str, shape: tuple[int, ...], mesh: dict[str, int]) -> float:
    size = 1.0
    for length, entry in zip(shape, to_spec(where_divided(logical_axes(path), shape, mesh["tensor"]), mesh)):
        if length % ways(entry, mesh):
            raise ConfigError(f"{named(entry)}={ways(entry, mesh)} does not divide a dimension of {length} in {path}")
        size *= length / ways(entry, mesh)
    return size


def _memory(config: Config, params: Any, mesh: dict[str, int], slots: tuple[int, ...], tpu: bool) -> dict[str, float]:
    """Bytes on one device. Weights and Adam's moments are exact; activations are counted by formula."""
    local = sum(_local_size(path_string(p), leaf.shape, mesh) for p, leaf in jax.tree.leaves_with_path(params))
    rows = config.data.batch_size // (mesh["data"] * mesh["fsdp"] * config.train.grad_accum)
    width = 2 if config.model.dtype == "bfloat16" else 4
    pieces = mesh.get("sequence", 1)
    positions, vocabulary = rows * config.data.seq_len // pieces, NUM_SYMBOLS
    gradients = 4 * local * (2 if config.train.grad_accum > 1 else 1)  # the sum and one microbatch's
    memory = {"weights": 4 * local, "optimizer": 8 * local, "gradients": gradients}
    if config.model.dtype == "bfloat16":
        memory["weights in bfloat16"] = 2 * local
    if isinstance(config.model, FlatConfig):
        t = config.data.seq_len
        activations = positions * _activation_bytes(config.model.stack, t, width, mesh["tensor"], pieces, tpu)
        vocabulary = config.model.symbols
    elif isinstance(config.model, T5Config):
        activations = rows * _t5_activation_bytes(config.model, config.data.seq_len, target_length(config.data), width,
                                                  mesh["tensor"])  # fmt: skip
        positions, vocabulary = rows * target_length(config.data), config.model.vocabulary
    else:
        activations = rows * _unit_activation_bytes(config, slots, width, mesh["tensor"], pieces, tpu) / pieces
    memory["activations (estimate)"] = activations
    memory["logits and their gradient"] = positions * vocabulary * 4 * 2
    return memory


def _unit_activation_bytes(
    config: Config, slots: tuple[int, ...], width: int, tensor: int, pieces: int, tpu: bool
) -> float:
    """Bytes kept per row between forward and backward, all stages at their slots, over all pieces of it."""
    model, t = config.model, config.data.seq_len
    assert isinstance(model, UnitConfig)
    stacks = unit_stacks(model, t, slots)
    total = sum(elements * _activation_bytes(stack, elements, width, tensor, pieces, tpu) for stack, elements in stacks)
    if isinstance(model, HNetConfig):
        # The router's query and key and their norms, residual, encoder output, smoothed and put back.
        stages = zip((t, *slots), model.d_model[: model.levels])
        total += sum(elements * d * (4 * 7 + 2 * width) for elements, d in stages)
    elif isinstance(model, HATConfig):  # keys, values and weighted values of the pooling; each layer's guide put back
        total += t * model.backbone.d_model * 3 * 4 + t * model.decoder.d_model * 4
    elif isinstance(model, BLTConfig):  # values and weighted values of the pooling, keys and values that bytes read
        reads = sum(n for _, n in parse_layout(model.decoder.layout)) if model.read_every_layer else 1
        total += t * model.queries * model.encoder.d_model * 4 * (3 + 2 * reads)
    return total


def _t5_activation_bytes(model: T5Config, t: int, targets: int, width: int, tensor: int) -> float:
    """Bytes kept per row between forward and backward, encoder and decoder. Rows above two query blocks recompute their
    scores block by block."""
    d, heads, split = model.d_model, model.num_heads, tensor if model.num_heads % tensor == 0 else 1
    inner, mlp = heads * model.head_dim / split, model.d_mlp / tensor

    def block(queries: float, keys: tuple[float, ...]) -> tuple[float, float, float]:
        """(residuals, matmul results, the rest) of a block with an attention over each of `keys`."""
        residual, dots, rest = 4 * d * queries, width * (2 * mlp + d) * queries, (width * 2 * mlp + 4 * d) * queries
        for k in keys:
            dots += width * (2 * inner * queries + 2 * inner * k + d * queries)
            scored = min(queries, QUERY_BLOCK) if queries > 2 * QUERY_BLOCK else queries
            rest += width * d * queries + heads / split * scored * k * (4 + width)
        return residual, dots, rest

    kept = float(_kept_slots(model, t))
    some = [(model.first_layers, block(t, (t,))), (model.encoder_layers - model.first_layers, block(kept, (kept,))),
            (model.decoder_layers, block(targets, (targets, kept)))]  # fmt: skip
    total = again = 0.0
    for count, (residual, dots, rest) in some:
        total += count * (residual + {"full": 0, "dots": dots, "none": dots + rest}[model.remat])
        again = max(again, {"full": dots + rest, "dots": rest, "none": 0}[model.remat])
    return total + again


def _activation_bytes(stack: StackConfig, t: int, width: int, tensor: int, pieces: int, tpu: bool) -> float:
    """Bytes kept per position between forward and backward, all layers; the remat policy decides what is kept."""
    d, s = stack.d_model, stack.ssm
    heads, keys = stack.num_heads / tensor, min(t, 2 * stack.window or t)
    kv = 2 * stack.kv_heads / tensor * stack.head_width
    scores, gathered = float(keys), 0.0
    if pieces > 1 and not 0 < stack.window <= t // pieces:  # by blocks of both; those of another piece, and gradients
        scores, gathered = min(keys, KEY_BLOCK) * min(1.0, QUERY_BLOCK * pieces / t), (width + 8) * kv
    elif tpu and stack.attention != "xla" and width == 2 and t >= SPLASH_FROM:
        scores = 0.0  # never in memory
    elif not 0 < stack.window < t and t > 2 * QUERY_BLOCK:  # one block of queries after another
        scores = float(QUERY_BLOCK)
    inner = s.expand * d / tensor
    qkv = heads * stack.head_width + kv
    kept, recomputed = 0.0, 0.0
    for kind, count in parse_layout(stack.layout):
        residual = 4 * d
        if kind in "tT":
            dots = width * (qkv + heads * stack.head_width + d)
            rest = 2 * width * qkv + gathered + heads * scores * (4 + width) + width * d
        else:
            dots = width * (2 * inner + 2 * s.d_state + d)
            rest = width * (3 * inner + 4 * s.d_state) + 4 * inner * 5 + 4 * inner * s.d_state / min(s.chunk, t)
            if s.form != "scan":  # scores and decays within chunks, all chunks at once
                rest += stack.ssm_heads / tensor * min(s.chunk, t) * (8 + width)
        if kind.isupper():
            dots += width * (2 * stack.mlp_width / tensor + d)
            rest += width * 2 * stack.mlp_width / tensor + 4 * d
        kept += count * (residual + {"full": 0, "dots": dots, "none": dots + rest}[stack.remat])
        recomputed = max(recomputed, {"full": dots + rest, "dots": rest, "none": 0}[stack.remat])
    return kept + recomputed  # the backward pass holds one layer's recomputed values at a time


def describe_plan(config: Config, plan: Plan) -> str:
    """The plan as text for a terminal."""
    lines = [f"{plan.total_parameters:,} parameters"]
    lines += [
        f"  {part:<12}{count:>16,}  {100 * count / plan.total_parameters:5.1f} %"
        for part, count in plan.parameters.items()
    ]
    steps = config.train.steps
    total = steps * plan.bytes_per_step
    lines += [
        "",
        f"useful FLOPs per byte: {engineering(plan.forward_flops_per_byte)} forward, "
        f"{engineering(plan.train_flops_per_byte)} training (rows of {config.data.seq_len} "
        f"{'tokens' if isinstance(config.model, TokensConfig) else 'bytes'})",
        *_describe_chunks(plan),
        f"a step reads {plan.bytes_per_step:,} bytes; {steps:,} steps read {engineering(total)} bytes "
        f"and cost {engineering(total * plan.train_flops_per_byte)} FLOPs",
        "",
        "memory on one device of the mesh " + " x ".join(f"{axis} {size}" for axis, size in plan.mesh.items()) + ":",
    ]
    lines += [f"  {use:<28}{size / 2**30:>10.3f} GiB" for use, size in plan.memory.items()]
    lines.append(f"  {'together':<28}{plan.total_memory / 2**30:>10.3f} GiB")
    if plan.chip:
        share = plan.total_memory / plan.chip.memory
        devices = math.prod(plan.mesh.values())
        rate = devices * plan.chip.flops / plan.train_flops_per_byte
        lines += [
            f"  of {plan.chip.memory / 2**30:.0f} GiB on a {plan.chip.name}: {100 * share:.1f} %"
            + ("  DOES NOT FIT" if share > 1 else ""),
            f"at 40 % utilisation {devices} x {plan.chip.name} would read {engineering(0.4 * rate)} bytes/s",
        ]
    return "\n".join(lines)


def _describe_chunks(plan: Plan) -> list[str]:
    if not plan.slots:
        return []
    each = " and ".join(f"{n:.3g}" for n in plan.bytes_per_chunk)
    slots = " and ".join(f"{n:,}" for n in plan.slots)
    return [
        f"at {each} bytes per chunk (--bytes-per-chunk); with {slots} chunk slots per row, as training starts, a step "
        f"executes {engineering(plan.executed_flops_per_byte)} per byte; the memory below is for those",
    ]


def engineering(value: float) -> str:
    """2.5e9 -> 2.5 G."""
    for unit in ("", " k", " M", " G", " T", " P", " E"):
        if value < 1000:
            return f"{value:.3g}{unit}"
        value /= 1000
    return f"{value:.3g} Z"


def explain_out_of_memory(config: Config, said: str, devices: int) -> str:
    """What to tell a user whose step did not fit: what was asked for, what takes memory, and what to change."""
    lines = [f"out of memory on a device: {said.splitlines()[0]}"]
    try:
        memory = make_plan(config, devices).memory
    except ConfigError:
        memory = {}
    if memory:
        lines.append(f"By formula one device of {devices} holds (bytelm plan says more):")
        lines += [f"  {use:<28}{size / 2**30:>10.3f} GiB" for use, size in memory.items()]
    rows = config.data.batch_size // config.train.grad_accum
    remat, _ = remat_field(config.model)
    advice = [
        f"rows at a time: --train.grad-accum {2 * config.train.grad_accum} (now {rows} rows together), or a smaller "
        f"--data.batch-size (now {config.data.batch_size})",
        f"length of a row: a smaller --data.seq-len (now {config.data.seq_len})",
        f"more recomputed: --{remat} full",
        "more devices to share weights and optimizer: --mesh.fsdp",
    ]
    if config.model.dtype == "float32":
        advice.insert(2, "half the width of what is kept: --model.dtype bfloat16 (on an accelerator)")
    return "\n".join([*lines, "What helps, in this order:", *(f"  - {a}" for a in advice)])


def to_json(plan: Plan) -> dict[str, Any]:
    """The plan as plain data."""
    return dataclasses.asdict(plan) | {"total_parameters": plan.total_parameters, "total_memory": plan.total_memory}
