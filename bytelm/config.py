"""Every config of bytelm, as frozen keyword-only dataclasses.

A config is data: numbers, strings, booleans, tuples. Checks in `__post_init__` name the field, its value and the fix.
`bytelm/codec.py` reads and writes them as strict YAML; tyro puts a command line over them (the comment beside a field
is its help text). Those of the networks stand in `model_config.py`,
`hierarchical_config.py` and `t5_config.py`.
"""

import dataclasses
import re
from dataclasses import dataclass, field
from typing import Literal

from bytelm.hierarchical_config import HAT_RESERVED, BLTConfig, HATConfig, MegaByteConfig, SpaceByteConfig
from bytelm.model_config import (
    AheadConfig,
    ArchLayout,
    CapacityConfig,
    ConfigError,
    DType,
    EntropyConfig,
    FlatConfig,
    HNetConfig,
    Remat,
    SSMConfig,
    StackConfig,
    TokensConfig,
    parse_arch_layout,
    parse_layout,
    require,
)
from bytelm.t5_config import DeletionConfig, T5Config

__all__ = [
    "HAT_RESERVED",
    "AheadConfig",
    "ArchLayout",
    "BLTConfig",
    "CapacityConfig",
    "CheckpointConfig",
    "Config",
    "ConfigError",
    "DType",
    "DataConfig",
    "DeletionConfig",
    "EntropyConfig",
    "EvalConfig",
    "FlatConfig",
    "HATConfig",
    "HNetConfig",
    "HostsConfig",
    "MegaByteConfig",
    "MeshConfig",
    "ModelConfig",
    "OptimConfig",
    "Remat",
    "SSMConfig",
    "SpaceByteConfig",
    "StackConfig",
    "T5Config",
    "TokensConfig",
    "TrainConfig",
    "UnitConfig",
    "longest_row",
    "parse_arch_layout",
    "parse_layout",
    "remat_field",
]  # fmt: skip

# Families that cut rows into units, in slots.
UnitConfig = HNetConfig | HATConfig | SpaceByteConfig | MegaByteConfig | BLTConfig
ModelConfig = (
    FlatConfig | TokensConfig | HNetConfig | T5Config | HATConfig | SpaceByteConfig | MegaByteConfig | BLTConfig
)


def longest_row(model: ModelConfig, otherwise: int) -> int:
    """Bytes of a row that a model's learned positions and slots suffice for; `otherwise` where it has none."""
    limited = isinstance(model, SpaceByteConfig | MegaByteConfig)
    return (model.longest_row if limited else 0) or otherwise


def remat_field(model: ModelConfig) -> tuple[str, Remat]:
    """Name and value of the field that says what the largest part of a model recomputes."""
    if isinstance(model, (HNetConfig, T5Config)):
        return "model.remat", model.remat
    if isinstance(model, FlatConfig):
        return "model.stack.remat", model.stack.remat
    if isinstance(model, HATConfig):
        return "model.backbone.remat", model.backbone.remat
    return "model.main.remat", model.main.remat


@dataclass(frozen=True, kw_only=True)
class DataConfig:
    """Where the text comes from and how it becomes batches."""

    train: tuple[str, ...] = (
        "bundled:shakespeare[:1003854]",
    )  # files or globs (.txt, .jsonl, .gz, .zst, [a:b] slices), prepared folders
    weights: tuple[float, ...] = ()  # share of records drawn from each entry of train; empty = by size
    valid: tuple[str, ...] = ()  # held-out text; empty = split off train by valid_fraction
    valid_fraction: float = 0.05  # part of train held out where valid is empty
    task: Literal["text", "spans", "vowels", "context_vowels", "merge", "copy", "pairs"] = (
        "text"  # text to go on with; for encoder-decoders: corrupted text, a diagnostic, or lines "input TAB target"
    )
    text_field: str = "text"  # field of a jsonl record that holds the text
    reserved: Literal["error", "replace"] = "error"  # bytes the model keeps for itself (H-Net: FE, FF), or
    # cannot read (of tokens: what is no UTF-8): refuse the text, or put U+FFFD there
    seq_len: int = 1024  # bytes per row; of an encoder-decoder, ids of its input
    target_len: int = 0  # ids of an encoder-decoder's target; 0 = what the task needs
    noise_density: float = 0.15  # spans: share of the text taken out
    mean_span: float = 20.0  # spans: bytes taken out at once, on average
    truncate: bool = False  # pairs: cut what is longer than its row, instead of refusing it
    batch_size: int = 8  # rows per optimizer step, over all devices
    packing: Literal["concat", "best_fit"] = "concat"  # cut the stream at row ends, or keep short documents whole
    packing_bins: int = 8  # open rows per stream of best_fit
    piece_bytes: int = 0  # documents longer than this are shuffled as pieces; 0 = 16 rows
    shuffle: bool = True  # shuffle all records anew in each epoch
    shards: int = 0  # virtual streams; row r of a batch comes from stream r mod shards; 0 = batch_size
    workers: int = 0  # worker processes that read and pack; 0 = in the training process
    prefetch: int = 64  # rows each worker keeps ready
    marks: Literal["stored", "step"] = "stored"  # patches by entropy: found once for the whole text and kept in
    # cache_dir, or in every training step
    tokenizer: str = ""  # of family tokens: a tokenizer.json; empty = byte pairs learned from the training text
    token_splits: float = 0.0  # family tokens: StochasTok: so many random splits of a token into two, for each token
    merge_dropout: float = 0.0  # family tokens: BPE-dropout: share of merges left out, anew each time a text is read
    cache_dir: str = ""  # where decompressed text, patches and tokens are kept; empty = ~/.cache/bytelm

    def __post_init__(self):
        require(len(self.train) > 0, "data.train is empty: name at least one file or glob")
        require(
            len(self.weights) in (0, len(self.train)),
            f"data.weights has {len(self.weights)} entries for {len(self.train)} in data.train: give one each, or none",
        )
        require(all(w > 0 for w in self.weights), f"data.weights={self.weights}: each must be above 0")
        for name in ("seq_len", "batch_size", "packing_bins", "prefetch"):
            require(getattr(self, name) >= 1, f"data.{name}={getattr(self, name)}: must be at least 1")
        require(self.seq_len >= 2, f"data.seq_len={self.seq_len}: must be at least 2, a symbol and what follows it")
        require(0 < self.noise_density < 1, f"data.noise_density={self.noise_density}: must be between 0 and 1")
        require(self.mean_span >= 1, f"data.mean_span={self.mean_span}: must be at least 1")
        for name in ("piece_bytes", "shards", "workers", "target_len"):
            require(getattr(self, name) >= 0, f"data.{name}={getattr(self, name)}: must not be negative")
        require(self.token_splits >= 0, f"data.token_splits={self.token_splits}: must not be negative")
        require(0 <= self.merge_dropout < 1, f"data.merge_dropout={self.merge_dropout}: must be in [0, 1)")
        require(
            not (self.token_splits and self.merge_dropout),
            "data.token_splits and data.merge_dropout both cut words anew: choose one",
        )
        require(0 <= self.valid_fraction < 1, f"data.valid_fraction={self.valid_fraction}: must be in [0, 1)")
        require(
            self.batch_size % self.streams == 0,
            f"data.shards={self.shards} does not divide data.batch_size={self.batch_size}: each stream must fill the "
            "same rows of every batch",
        )
        require(
            self.workers == 0 or self.streams % self.workers == 0,
            f"data.workers={self.workers} does not divide the {self.streams} streams (data.shards): workers share them",
        )

    @property
    def streams(self) -> int:
        return self.shards or self.batch_size

    @property
    def piece_length(self) -> int:
        return self.piece_bytes or 16 * self.seq_len


@dataclass(frozen=True, kw_only=True)
class OptimConfig:
    """AdamW and its schedule."""

    lr: float = 1.0e-3  # peak learning rate
    schedule: Literal["wsd", "cosine", "linear", "constant"] = "wsd"  # warm-up, then this; wsd = stable, then decay
    warmup_steps: int = 100  # linear warm-up from 0
    decay_fraction: float = 0.2  # wsd: share of the steps spent in the final decay (1 - sqrt form)
    final_lr: float = 0.0  # end of the schedule, as a share of the peak
    b1: float = 0.9  # Adam's first moment decay
    b2: float = 0.95  # Adam's second moment decay
    eps: float = 1.0e-8  # Adam's epsilon
    weight_decay: float = 0.1  # decoupled weight decay
    decay: Literal["patterns", "hnet_reference"] = "patterns"  # what decays: all but no_decay; or as H-Net's code does
    no_decay: tuple[str, ...] = (
        r"norm",
        r"bias$",
        r"A_log$",
        r"/D$",
        r"embed|positions|ranks|offsets|query|first_",
        r"pad$",
    )  # paths (regex) without decay
    clip_norm: float = 1.0  # global gradient norm limit; 0 = none
    freeze: tuple[tuple[str, int], ...] = ()  # (path regex, steps): parameters that stay as they are in the first steps
    lr_multipliers: tuple[tuple[str, float], ...] = ()  # (path regex, factor): first match scales that parameter's rate

    def __post_init__(self):
        require(self.lr > 0, f"optim.lr={self.lr}: must be above 0")
        for name in ("warmup_steps", "weight_decay", "clip_norm"):
            require(getattr(self, name) >= 0, f"optim.{name}={getattr(self, name)}: must not be negative")
        require(self.eps > 0, f"optim.eps={self.eps}: must be above 0")
        for name in ("decay_fraction", "final_lr"):
            value = getattr(self, name)
            require(0 <= value <= 1, f"optim.{name}={value}: must be in [0, 1]")
        for name in ("b1", "b2"):
            value = getattr(self, name)
            require(0 <= value < 1, f"optim.{name}={value}: must be in [0, 1)")
        require(all(n >= 1 for _, n in self.freeze), f"optim.freeze={self.freeze}: steps must be at least 1")
        for pattern in (*self.no_decay, *(p for p, _ in (*self.lr_multipliers, *self.freeze))):
            try:
                re.compile(pattern)
            except re.error as e:
                raise ConfigError(f"optim: {pattern!r} is not a regular expression: {e}") from None


@dataclass(frozen=True, kw_only=True)
class MeshConfig:
    """Axis sizes of the device mesh; one of them may be -1: what is left."""

    data: int = -1  # copies of the model
    fsdp: int = 1  # parameters, optimizer state and batch are split over this axis
    sequence: int = 1  # so are parameters and optimizer state over this one, and rows cut into as many pieces
    tensor: int = 1  # heads and MLP columns are split over this axis

    def __post_init__(self):
        sizes = dataclasses.astuple(self)
        require(
            all(s == -1 or s >= 1 for s in sizes) and sizes.count(-1) <= 1,
            f"mesh sizes (data, fsdp, sequence, tensor) = {sizes}: each at least 1, at most one of them -1",
        )


@dataclass(frozen=True, kw_only=True)
class EvalConfig:
    """Held-out evaluation during training."""

    every: int = 200  # steps between evaluations; 0 = only at the end
    max_bytes: int = 65536  # how much of the held-out text the evaluations during training read; 0 = all
    final_max_bytes: int = 0  # the same for the last one
    batch_size: int = 0  # rows per evaluation step; 0 = data.batch_size
    window: int = 0  # bytes of context; 0 = data.seq_len, and 8192 at most

    def __post_init__(self):
        for name in ("every", "max_bytes", "final_max_bytes", "batch_size", "window"):
            require(getattr(self, name) >= 0, f"eval.{name}={getattr(self, name)}: must not be negative")


@dataclass(frozen=True, kw_only=True)
class CheckpointConfig:
    """When to save and what to keep."""

    every: int = 500  # steps between checkpoints
    every_seconds: float = 0.0  # also save when this long has passed since the last one; 0 = off
    keep: int = 2  # newest checkpoints to keep
    keep_every: int = 0  # keep each checkpoint whose step is a multiple of this as well; 0 = none
    best: bool = True  # keep the weights with the lowest held-out bits per byte under best/

    def __post_init__(self):
        require(self.every >= 1, f"checkpoint.every={self.every}: must be at least 1")
        require(self.keep >= 1, f"checkpoint.keep={self.keep}: must be at least 1")
        for name in ("every_seconds", "keep_every"):
            require(getattr(self, name) >= 0, f"checkpoint.{name}={getattr(self, name)}: must not be negative")


@dataclass(frozen=True, kw_only=True)
class TrainConfig:
    """The run itself."""

    run_dir: str = "runs/default"  # checkpoints, metrics.jsonl, config.yaml and the loss plot go here
    steps: int = 1000  # optimizer steps
    seed: int = 0  # of the initial weights and the data order
    grad_accum: int = 1  # microbatches per step
    log_every: int = 10  # steps between metric lines
    watch_text: str = ""  # text whose chunks report.html shows over the run; empty = the start of the held-out text
    init_from: str = ""  # run or weights directory whose weights to start from
    patcher: str = ""  # patches by entropy: run or weights directory of the flat model that finds them
    backbone: str = ""  # of a HAT: folder of a tokenized Llama, Mistral or Qwen 3 whose blocks it starts as
    word_steps: int = 0  # with backbone: steps before the first in which the HAT's word reader learns to give those
    # blocks what they are used to, the embeddings of a word's tokens
    max_skipped: int = 10  # batches in a row whose loss or gradient is not finite before the run ends (exit status 3)
    allow_config_change: bool = False  # resume although model, data or optimizer settings differ
    compilation_cache: str = ""  # folder of compiled programs; empty = ~/.cache/bytelm/xla, "off" = none
    profile_start: int = 0  # first step of the profiler window
    profile_steps: int = 0  # length of the profiler window; 0 = none
    tensorboard: bool = False  # also write TensorBoard files (extra: tensorboard)
    wandb_project: str = ""  # also log to this Weights & Biases project (extra: wandb)

    def __post_init__(self):
        for name in ("steps", "grad_accum", "log_every", "max_skipped"):
            require(getattr(self, name) >= 1, f"train.{name}={getattr(self, name)}: must be at least 1")
        for name in ("seed", "profile_start", "profile_steps", "word_steps"):
            require(getattr(self, name) >= 0, f"train.{name}={getattr(self, name)}: must not be negative")
        require(
            not self.word_steps or bool(self.backbone),
            f"train.word_steps={self.word_steps}: words are taught what train.backbone was trained on: name it",
        )
        require(self.run_dir != "", "train.run_dir is empty: name a folder for the run")


@dataclass(frozen=True, kw_only=True)
class HostsConfig:
    """Processes that train together, one for each host; start the same command on every one."""

    coordinator: str = ""  # host:port of process 0; empty = JAX_COORDINATOR_ADDRESS
    processes: int = 0  # how many there are; 0 = JAX_NUM_PROCESSES, or what the cluster says
    process: int = -1  # which of them this is; -1 = JAX_PROCESS_ID, or what the cluster says
    cluster: Literal["auto", "on", "off"] = "auto"  # ask Cloud TPU, SLURM, Open MPI; auto = under a launcher of tasks
    heartbeat_seconds: int = 100  # a process silent for so long is taken for dead, and the others end
    start_seconds: int = 300  # how long to wait for the others at the start

    def __post_init__(self):
        require(self.processes >= 0, f"hosts.processes={self.processes}: must not be negative")
        require(self.process >= -1, f"hosts.process={self.process}: must be -1 or more")
        for name in ("heartbeat_seconds", "start_seconds"):
            require(getattr(self, name) >= 1, f"hosts.{name}={getattr(self, name)}: must be at least 1")


@dataclass(frozen=True, kw_only=True)
class Config:
    """A whole training run."""

    model: ModelConfig = field(default_factory=FlatConfig)  # the network
    data: DataConfig = field(default_factory=DataConfig)  # its text
    optim: OptimConfig = field(default_factory=OptimConfig)  # its optimizer
    mesh: MeshConfig = field(default_factory=MeshConfig)  # its devices
    hosts: HostsConfig = field(default_factory=HostsConfig)  # its processes
    train: TrainConfig = field(default_factory=TrainConfig)  # the run
    eval: EvalConfig = field(default_factory=EvalConfig)  # held-out evaluation
    checkpoint: CheckpointConfig = field(default_factory=CheckpointConfig)  # what is saved

    def __post_init__(self):
        require(
            self.data.batch_size % self.train.grad_accum == 0,
            f"train.grad_accum={self.train.grad_accum} does not divide data.batch_size={self.data.batch_size}",
        )
        positions = getattr(self.model, "positions", 0)
        if positions:
            patch = getattr(self.model, "patch", 1)
            needed = -(-self.data.seq_len // patch) * patch
            require(
                positions >= needed,
                f"data.seq_len={self.data.seq_len}: model.positions={positions} learned positions are too few, it "
                f"needs {needed}; shorten the rows, or set model.positions=0",
            )
        d, tokens = self.data, isinstance(self.model, TokensConfig)
        require(
            tokens or not (d.tokenizer or d.token_splits or d.merge_dropout),
            f"data.tokenizer, token_splits and merge_dropout are for model.family=tokens, not {self.model.family}",
        )
        require(
            not (tokens and (d.token_splits or d.merge_dropout) and d.packing == "best_fit"),
            "data.token_splits and data.merge_dropout make pieces longer, which data.packing=best_fit cannot have: "
            "use concat",
        )
        reads = isinstance(self.model, T5Config)
        require(
            reads == (self.data.task != "text"),
            f"data.task={self.data.task!r} with model.family={self.model.family!r}: "
            + ("an encoder-decoder needs inputs and targets: choose spans, pairs or a diagnostic" if reads else
               "only an encoder-decoder (t5) reads inputs: choose text"),
        )  # fmt: skip
