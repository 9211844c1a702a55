"""Configs of the networks, as frozen keyword-only dataclasses; `bytelm.config` has them all."""

import math
import re
from dataclasses import dataclass, field
from typing import Literal

DType = Literal["float32", "bfloat16"]
Remat = Literal["none", "dots", "full"]


class ConfigError(ValueError):
    """A config that cannot work; the message names field, value and fix, and is shown without a traceback."""


def require(condition: bool, message: str) -> None:
    if not condition:
        raise ConfigError(message)


def parse_layout(layout: str) -> tuple[tuple[str, int], ...]:
    """Splits a stack layout such as `m2T1m2` into runs: (("m", 2), ("T", 1), ("m", 2)).

    m = Mamba-2 mixer, t = attention mixer; a capital letter adds a SwiGLU MLP to the block (H-Net's notation).
    """
    require(
        re.fullmatch(r"([mMtT]\d+)+", layout) is not None,
        f"stack.layout={layout!r}: expected runs of a letter (m, M: Mamba-2; t, T: attention; capital: with an MLP) "
        "and a count, such as 'T6' or 'm2T1m2'",
    )
    runs = tuple((kind, int(count)) for kind, count in re.findall(r"([mMtT])(\d+)", layout))
    require(all(0 < count < 10_000 for _, count in runs), f"stack.layout={layout!r}: each run needs 1 to 9,999 blocks")
    return runs


@dataclass(frozen=True, kw_only=True)
class SSMConfig:
    """Shape of the Mamba-2 blocks of a stack."""

    d_state: int = 128  # size of the state kept for each channel (N)
    expand: int = 2  # inner width as a multiple of d_model
    head_dim: int = 64  # channels that share one decay
    conv_width: int = 4  # taps of the causal convolution in front of the recurrence
    chunk: int = 128  # steps per chunk of the parallel form; changes the speed, not the result
    form: Literal["auto", "scan", "batched"] = "auto"  # auto: scan on CPU, batched elsewhere

    def __post_init__(self):
        for name in ("d_state", "expand", "head_dim", "conv_width", "chunk"):
            require(getattr(self, name) >= 1, f"ssm.{name}={getattr(self, name)}: must be at least 1")


@dataclass(frozen=True, kw_only=True)
class StackConfig:
    """A stack of pre-norm residual blocks: attention or Mamba-2, each with or without an MLP."""

    layout: str = "T6"  # runs of blocks: m/M Mamba-2, t/T attention, capital = with MLP; e.g. T6, M12, m4T1m4
    d_model: int = 256  # width of the residual stream
    num_heads: int = 4  # query heads
    num_kv_heads: int = 0  # key and value heads; 0 = num_heads
    head_dim: int = 0  # features per head; 0 = d_model / num_heads
    d_mlp: int = 0  # width of the SwiGLU MLP; 0 = 8/3 d_model rounded up to a multiple of 128
    window: int = 0  # keys that a query sees, itself included; 0 = all
    rope_dim: int = 0  # rotated features per head; 0 = head_dim
    rope_theta: float = 10000.0  # base of the rotary frequencies
    rope_stretch: tuple[float, ...] = ()  # Llama 3's rotary scaling: factor, low, high, original context; empty = none
    norm: Literal["rms", "layer"] = "rms"  # norms in front of blocks: RMSNorm, or LayerNorm without a bias
    norm_eps: float = 1.0e-5  # epsilon of every norm
    qk_norm: Literal["none", "head", "all"] = "none"  # norm queries and keys: each head by itself, or all together
    mlp: Literal["swiglu", "relu"] = "swiglu"  # SwiGLU, or one hidden layer with ReLU
    ssm: SSMConfig = field(default_factory=SSMConfig)  # shape of the Mamba-2 blocks
    attention: Literal["auto", "xla", "cudnn", "splash"] = "auto"  # kernel; auto: cudnn on GPU, splash on TPU, else XLA
    scan_layers: bool = True  # run a run of equal blocks as one scan (fast compile, small memory) or unrolled
    remat: Remat = "none"  # what the backward pass recomputes: none, all but the matmuls, or everything

    def __post_init__(self):
        runs = parse_layout(self.layout)
        for name in ("d_model", "num_heads"):
            require(getattr(self, name) >= 1, f"stack.{name}={getattr(self, name)}: must be at least 1")
        for name in ("num_kv_heads", "head_dim", "d_mlp", "window", "rope_dim"):
            require(getattr(self, name) >= 0, f"stack.{name}={getattr(self, name)}: must not be negative")
        require(
            len(self.rope_stretch) in (0, 4),
            f"stack.rope_stretch={self.rope_stretch}: give factor, low and high frequency factor, original context",
        )
        if any(kind in "tT" for kind, _ in runs):
            require(
                self.head_dim > 0 or self.d_model % self.num_heads == 0,
                f"stack.num_heads={self.num_heads} does not divide stack.d_model={self.d_model}: "
                "change one of them or set stack.head_dim",
            )
            require(
                self.num_heads % self.kv_heads == 0,
                f"stack.num_kv_heads={self.num_kv_heads} does not divide stack.num_heads={self.num_heads}",
            )
            require(
                self.rotary % 2 == 0 and self.rotary <= self.head_width,
                f"stack.rope_dim={self.rotary}: must be even and at most the head dimension {self.head_width}",
            )
        if any(kind in "mM" for kind, _ in runs):
            inner = self.ssm.expand * self.d_model
            require(
                inner % self.ssm.head_dim == 0,
                f"stack.ssm.head_dim={self.ssm.head_dim} does not divide expand * d_model = {inner}",
            )

    @property
    def kv_heads(self) -> int:
        return self.num_kv_heads or self.num_heads

    @property
    def head_width(self) -> int:
        return self.head_dim or self.d_model // self.num_heads

    @property
    def rotary(self) -> int:
        return self.rope_dim or self.head_width

    @property
    def mlp_width(self) -> int:
        return self.d_mlp or -(-8 * self.d_model // (3 * 128)) * 128

    @property
    def ssm_heads(self) -> int:
        return self.ssm.expand * self.d_model // self.ssm.head_dim


@dataclass(frozen=True, kw_only=True)
class AheadConfig:
    """Heads for the bytes behind the next one, which draft when the model is asked to (`draft="heads"`)."""

    bytes: int = 0  # how many further bytes each position predicts; 0 = no such heads
    weight: float = 0.3  # of their mean loss, beside that of the next byte

    def __post_init__(self):
        require(self.bytes >= 0, f"model.ahead.bytes={self.bytes}: must not be negative (0 = none)")
        require(self.weight > 0, f"model.ahead.weight={self.weight}: must be above 0")


@dataclass(frozen=True, kw_only=True)
class FlatConfig:
    """A flat byte model: embedding, one stack, head. MambaByte and hybrids are layouts."""

    family: Literal["flat"] = "flat"  # which model family this is
    stack: StackConfig = field(default_factory=StackConfig)  # the blocks
    tie_embeddings: bool = True  # use the embedding table as the output matrix
    ahead: AheadConfig = field(default_factory=AheadConfig)  # heads for further bytes
    dtype: DType = "float32"  # compute type; parameters are float32 always
    init_std: float = 0.02  # standard deviation of the initial weights (0: 1 / sqrt(fan in))

    @property
    def symbols(self) -> int:
        """What the model chooses the next one of."""
        return 257


@dataclass(frozen=True, kw_only=True)
class TokensConfig(FlatConfig):
    """What byte models are compared with: a flat transformer over the tokens of a tokenizer (data.tokenizer). A trained
    one is asked for bytes through the byte view, as any tokenized model."""

    family: Literal["tokens"] = "tokens"  # type: ignore[assignment]  # which model family this is
    vocabulary: int = 4096  # tokens, the one that ends a text among them

    def __post_init__(self):
        require(
            not self.ahead.bytes, f"model.ahead.bytes={self.ahead.bytes}: heads for further bytes need a byte model"
        )
        require(self.vocabulary >= 257, f"model.vocabulary={self.vocabulary}: 256 bytes and an end need 257 at least")
        s = self.stack
        other = {
            "layout": re.fullmatch(r"T\d+", s.layout) is None, "norm": s.norm != "rms", "mlp": s.mlp != "swiglu",
            "rope_dim": s.rotary != s.head_width, "qk_norm": s.qk_norm == "all",
        }  # fmt: skip
        found = ", ".join(f"model.stack.{name}={getattr(s, name)!r}" for name, bad in other.items() if bad)
        require(not found, f"{found}: the blocks of a tokenized model are those of a Llama (layout T8, and so on)")

    @property
    def symbols(self) -> int:
        return self.vocabulary


@dataclass(frozen=True, kw_only=True)
class EntropyConfig:
    """Where a small byte model of its own, trained before and left as it is, cuts text into patches: it sees the bytes
    so far, and the next one begins a patch if that is hard to foresee. At a document's start it knows nothing else;
    its stack must have attention windows, so that what it says of a place depends on so many bytes before it alone."""

    stack: StackConfig = field(
        default_factory=lambda: StackConfig(layout="T2", d_model=64, num_heads=2, window=64)
    )  # the model's blocks; train.patcher brings those of a flat run
    tie_embeddings: bool = True  # its embedding table is its output matrix
    symbols: int = 257  # symbols that its entropy is over: the bytes and the end; published ones have 3 more
    rule: Literal["threshold", "rise", "both"] = (
        "threshold"  # a patch begins where the entropy is above `threshold`, rises by more than `rise`, or both
    )
    threshold: float = 1.335442066192627  # nats; `bytelm patches` finds the one for a patch size
    rise: float = 0.0  # nats above the entropy of the byte before
    max_patch: int = 0  # longer patches are cut at so many bytes; 0 = never

    def __post_init__(self):
        windows = self.stack.window > 0 and all(kind in "tT" for kind, _ in parse_layout(self.stack.layout))
        require(
            windows,
            f"patcher.stack: layout={self.stack.layout!r}, window={self.stack.window}: only attention with a window, "
            "so that patches depend on a bounded stretch of text",
        )
        require(self.max_patch >= 0, f"patcher.max_patch={self.max_patch}: must not be negative")
        for name in ("threshold", "rise"):
            require(math.isfinite(getattr(self, name)), f"patcher.{name}={getattr(self, name)}: must be a number")
        require(257 <= self.symbols <= 384, f"patcher.symbols={self.symbols}: must be 257 to 384")

    @property
    def reach(self) -> int:
        """Bytes before a place that its entropy depends on, at most."""
        return sum(count for _, count in parse_layout(self.stack.layout)) * (self.stack.window - 1)


@dataclass(frozen=True, kw_only=True)
class CapacityConfig:
    """How many chunk slots training reserves at each level of an H-Net, and when that number changes."""

    start: tuple[float, ...] = (
        0.6,
        1.0,
    )  # first share of slots: of the row, then of the level above; the last one holds on
    margin: float = 1.2  # slots per boundary of the measured 99th-percentile row, when the number is chosen anew
    every: int = 100  # steps between choices; 0 = keep the start
    multiple: int = 128  # slots are a multiple of this

    def __post_init__(self):
        require(
            len(self.start) > 0 and all(0 < share <= 1 for share in self.start),
            f"capacity.start={self.start}: give shares in (0, 1], one per level; the last one holds for deeper levels",
        )
        require(self.margin >= 1, f"capacity.margin={self.margin}: must be at least 1")
        require(self.every >= 0, f"capacity.every={self.every}: must not be negative")
        require(self.multiple >= 1, f"capacity.multiple={self.multiple}: must be at least 1")


@dataclass(frozen=True, kw_only=True)
class ArchLayout:
    """The nested layout of an H-Net, taken apart: stacks of each chunking stage, outermost first, and the innermost."""

    stages: tuple[tuple[str, str], ...]  # (encoder, decoder) of stages 0 .. S-1
    main: str


def parse_arch_layout(layout: str) -> ArchLayout:
    """Reads the reference's nested notation written as text: `m4,[T1m4,[T26],m4T1],m4`."""
    stages, inner = [], layout.replace(" ", "")
    while "[" in inner:
        found = re.fullmatch(r"([^,\[\]]+),\[(.*)\],([^,\[\]]+)", inner)
        if found is None:
            raise ConfigError(
                f"model.arch_layout={layout!r}: expected encoder,[inner],decoder with runs of blocks, such as "
                "'m4,[T22],m4' or 'm4,[T1m4,[T26],m4T1],m4'"
            )
        stages.append((found[1], found[3]))
        inner = found[2]
    for run in (*(run for pair in stages for run in pair), inner):
        try:
            parse_layout(run)
        except ConfigError as e:
            raise ConfigError(f"model.arch_layout={layout!r}: {e}") from None
    return ArchLayout(stages=tuple(stages), main=inner)


@dataclass(frozen=True, kw_only=True)
class HNetConfig:
    """H-Net (Hwang, Wang & Gu 2025): bytes are cut into chunks by a learned router, level above level.

    Lists have one entry per stage, stage 0 (bytes) first and the innermost last; a list of one holds for all stages.
    """

    family: Literal["hnet"] = "hnet"  # which model family this is
    arch_layout: str = "m2,[T4],m2"  # encoder,[inner],decoder, nested; runs of blocks as in a stack's layout
    d_model: tuple[int, ...] = (256, 512)  # width of each stage; never narrower further in
    num_heads: tuple[int, ...] = (4,)  # attention heads
    d_mlp: tuple[int, ...] = (0,)  # MLP width of capital blocks; 0 = 8/3 d_model rounded up to a multiple of 128
    window: tuple[int, ...] = (0,)  # elements of that stage that a query sees, itself included; 0 = all
    rope_dim: tuple[int, ...] = (0,)  # rotated features per head; 0 = all
    ssm: SSMConfig = field(default_factory=SSMConfig)  # shape of the Mamba-2 blocks of every stage
    targets: tuple[float, ...] = (6.0,)  # N: elements per chunk that the ratio loss asks for, one per level
    chunker: Literal["learned", "spacelike", "words", "space_words", "entropy", "fixed", "random"] = (
        "learned"  # what cuts bytes into chunks: the router, or a rule in its place (fixed, random: by targets[0])
    )
    patcher: EntropyConfig = field(default_factory=EntropyConfig)  # chunker entropy: its model and rule
    ratio_weight: float = 0.03  # alpha: weight of the ratio losses
    lr_multipliers: tuple[float, ...] = ()  # learning-rate factor of each stage; empty = the paper's equation 11
    bytes_per_token: float = 4.6  # N_GPT of that equation: bytes per token of the tokenizer it is matched to
    capacity: CapacityConfig = field(default_factory=CapacityConfig)  # chunk slots in training
    tie_embeddings: bool = False  # use the embedding table as the output matrix
    ahead: AheadConfig = field(default_factory=AheadConfig)  # heads for further bytes
    dtype: DType = "float32"  # compute type; parameters are float32 always
    init_std: float = 0.02  # standard deviation of the initial projections (0: 1 / sqrt(fan in))
    embed_std: float = 1.0  # standard deviation of the initial embeddings
    norm_eps: float = 1.0e-5  # epsilon of every RMSNorm
    attention: Literal["auto", "xla", "cudnn", "splash"] = "auto"  # kernel; auto: cudnn on GPU, splash on TPU, else XLA
    scan_layers: bool = True  # run a run of equal blocks as one scan or unrolled
    remat: Remat = "none"  # what the backward pass recomputes: none, all but the matmuls, or everything

    def __post_init__(self):
        levels = self.levels
        require(
            len(self.d_model) == levels + 1,
            f"model.d_model={self.d_model}: {levels + 1} stages in model.arch_layout={self.arch_layout!r}, give each a "
            "width",
        )
        require(
            all(a <= b for a, b in zip(self.d_model, self.d_model[1:])),
            f"model.d_model={self.d_model}: a stage must not be narrower than the one around it",
        )
        for name in ("num_heads", "d_mlp", "window", "rope_dim"):
            require(
                len(getattr(self, name)) in (1, levels + 1),
                f"model.{name}={getattr(self, name)}: give one value, or one for each of the {levels + 1} stages",
            )
        require(
            len(self.targets) == levels and all(n > 1 for n in self.targets),
            f"model.targets={self.targets}: give a number above 1 for each of the {levels} chunking levels",
        )
        require(
            len(self.lr_multipliers) in (0, levels + 1) and all(m > 0 for m in self.lr_multipliers),
            f"model.lr_multipliers={self.lr_multipliers}: give a factor above 0 for each of the {levels + 1} stages, "
            "or none for the paper's",
        )
        require(
            self.chunker == "learned" or levels > 0,
            f"model.chunker={self.chunker!r}: model.arch_layout={self.arch_layout!r} has no level that cuts bytes",
        )
        require(self.ratio_weight >= 0, f"model.ratio_weight={self.ratio_weight}: must not be negative")
        require(self.bytes_per_token > 0, f"model.bytes_per_token={self.bytes_per_token}: must be above 0")
        for stage in range(levels + 1):
            try:
                for part in ("encoder", "decoder") if stage < levels else ("main",):
                    self.stack(stage, part)
            except ConfigError as e:
                raise ConfigError(f"model, stage {stage}: {e}") from None

    @property
    def levels(self) -> int:
        """Number of chunking levels S; stages 0 .. S - 1 chunk, stage S is the innermost."""
        return len(parse_arch_layout(self.arch_layout).stages)

    def stack(self, stage: int, part: str) -> StackConfig:
        """Config of the `encoder` or `decoder` of a chunking stage, or of the innermost stage's `main` stack."""
        arch = parse_arch_layout(self.arch_layout)
        layout = arch.main if part == "main" else arch.stages[stage][("encoder", "decoder").index(part)]

        def at(values: tuple[int, ...]) -> int:
            return values[stage] if len(values) > 1 else values[0]

        return StackConfig(
            layout=layout, d_model=self.d_model[stage], num_heads=at(self.num_heads), d_mlp=at(self.d_mlp),
            window=at(self.window), rope_dim=at(self.rope_dim), norm_eps=self.norm_eps, ssm=self.ssm,
            attention=self.attention, scan_layers=self.scan_layers, remat=self.remat,
        )  # fmt: skip
