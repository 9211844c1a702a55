"""Configs of the hierarchical models: HAT, SpaceByte, MegaByte and BLT. `bytelm.config` has them all."""

from dataclasses import dataclass, field
from typing import Literal

from bytelm.model_config import CapacityConfig, DType, EntropyConfig, StackConfig, require

HAT_RESERVED = (0xC0, 0xC1, *range(0xF5, 0x100))  # never in UTF-8: special symbols are among them
HAT_END = 192  # <|eot_id|>, behind a document, and in front of it where there is no symbol for that


def _slots() -> CapacityConfig:
    return CapacityConfig(start=(0.45,))


def _local() -> StackConfig:
    return StackConfig(layout="T2", d_model=192, window=128)


def _main() -> StackConfig:
    return StackConfig(layout="T6", d_model=384, num_heads=6)


@dataclass(frozen=True, kw_only=True)
class HATConfig:
    """HAT as released (Neitemeier et al. 2025 and the report of 2026): words are pooled, a backbone runs over words,
    and what it says of the words before guides the decoding of each word's bytes."""

    family: Literal["hat"] = "hat"  # which model family this is
    encoder: StackConfig = field(default_factory=_local)  # over bytes, across words
    backbone: StackConfig = field(default_factory=_main)  # of words
    decoder: StackConfig = field(default_factory=_local)  # over bytes, guided in every layer
    pool_heads: int = 6  # heads of the attention that pools a word's bytes
    pool_kv_heads: int = 0  # its key and value heads; 0 = pool_heads
    pool_norm: Literal["none", "head", "all"] = "none"  # norm its query and keys: each head by itself, or all together
    pool_theta: float = 10000.0  # base of its rotary frequencies (phase: word number - byte number)
    pool_stretch: tuple[float, ...] = ()  # their scaling, as a stack's rope_stretch; empty = none
    guide_heads: int = 4  # heads of the guide's value projection; they matter only beside guide_kv_heads
    guide_kv_heads: int = 0  # heads that it really has; 0 = guide_heads
    guide_every_layer: bool = True  # guide every decoder layer, or only the first
    rule: Literal["unicode", "space"] = "unicode"  # where words begin
    max_word: int = 100  # bytes of a word; longer ones are cut; 0 = never
    guide: Literal["released", "strict"] = "released"  # training: the guide changes with a word's first byte, as
    # released, or once its first character is whole, as it must when text is made (and in held-out evaluation)
    start: int = HAT_END  # id in front of a document
    capacity: CapacityConfig = field(default_factory=_slots)  # word slots in training
    dtype: DType = "float32"  # compute type; parameters are float32 always
    init_std: float = 0.02  # standard deviation of the initial weights (0: 1 / sqrt(fan in))

    def __post_init__(self):
        d = self.encoder.d_model
        require(d == self.decoder.d_model, f"model.decoder.d_model={self.decoder.d_model}: must be the encoder's, {d}")
        for heads, kv, width, name in (
            (self.pool_heads, self.pool_kv_heads, self.backbone.d_model, "pool"),
            (self.guide_heads, self.guide_kv_heads, d, "guide"),
        ):
            require(heads >= 1 and width % heads == 0, f"model.{name}_heads={heads}: must divide {width}")
            require(heads % (kv or heads) == 0, f"model.{name}_kv_heads={kv}: must divide model.{name}_heads={heads}")
        require(
            (self.backbone.d_model // self.pool_heads) % 2 == 0, f"model.pool_heads={self.pool_heads}: odd head width"
        )
        require(self.max_word == 0 or self.max_word >= 4, f"model.max_word={self.max_word}: at least 4, or 0 for none")
        require(self.start in HAT_RESERVED, f"model.start={self.start}: must be a byte that UTF-8 never has")
        require(
            len(self.pool_stretch) in (0, 4),
            f"model.pool_stretch={self.pool_stretch}: give factor, low and high frequency factor, original context",
        )

    levels = 1  # chunking levels


@dataclass(frozen=True, kw_only=True)
class SpaceByteConfig:
    """SpaceByte (Slagle 2024): a global stack runs at bytes that begin a run of what is no letter or digit."""

    family: Literal["spacebyte"] = "spacebyte"  # which model family this is
    initial: StackConfig = field(default_factory=_local)  # over bytes
    main: StackConfig = field(default_factory=_main)  # at patches
    final: StackConfig = field(default_factory=_local)  # over bytes
    patches: Literal["spacelike", "periodic"] = "spacelike"  # where the global stack runs; periodic: every `period`
    period: int = 6  # bytes between two patches of `periodic`
    positions: int = 0  # longest row, where bytes have learned positions as in the published code; 0 = none
    slots: int = 0  # most patches of a row, where patches have learned positions; 0 = none
    capacity: CapacityConfig = field(default_factory=_slots)  # patch slots in training
    dtype: DType = "float32"  # compute type; parameters are float32 always
    init_std: float = 0.02  # standard deviation of the initial weights (0: 1 / sqrt(fan in))

    def __post_init__(self):
        d = self.initial.d_model
        require(d == self.final.d_model, f"model.final.d_model={self.final.d_model}: must be the initial stack's, {d}")
        require(d <= self.main.d_model, f"model.main.d_model={self.main.d_model}: must be at least the local width {d}")
        for name in ("positions", "slots"):
            require(getattr(self, name) >= 0, f"model.{name}={getattr(self, name)}: must not be negative")
        require(self.period >= 1, f"model.period={self.period}: must be at least 1")

    levels = 1

    @property
    def longest_row(self) -> int:
        """Bytes of a row that learned positions and slots suffice for, whatever the text is (two bytes a patch); 0: any
        number."""
        needed = self.period if self.patches == "periodic" else 2
        by_slots = max(needed * self.slots - 1, 1) if self.slots else 0
        return min(self.positions or by_slots, by_slots or self.positions)


@dataclass(frozen=True, kw_only=True)
class MegaByteConfig:
    """MegaByte (Yu et al. 2023): a global stack over patches of a fixed size, a local one inside each patch."""

    family: Literal["megabyte"] = "megabyte"  # which model family this is
    patch: int = 6  # bytes of a patch
    main: StackConfig = field(default_factory=_main)  # of patches
    local: StackConfig = field(default_factory=lambda: StackConfig(layout="T4", d_model=192))  # over a patch's bytes
    positions: int = 0  # longest row, where bytes have learned positions in the global embedding; 0 = none
    capacity: CapacityConfig = field(default_factory=_slots)  # patch slots in training
    dtype: DType = "float32"  # compute type; parameters are float32 always
    init_std: float = 0.02  # standard deviation of the initial weights (0: 1 / sqrt(fan in))

    def __post_init__(self):
        require(self.patch >= 1, f"model.patch={self.patch}: must be at least 1")
        require(
            self.main.d_model % self.patch == 0,
            f"model.main.d_model={self.main.d_model}: model.patch={self.patch} must divide it",
        )
        require(self.positions >= 0, f"model.positions={self.positions}: must not be negative")
        require(
            "m" not in self.local.layout.lower(),
            f"model.local.layout={self.local.layout!r}: attention only: the local stack begins anew at each patch",
        )
        require(self.local.window == 0, f"model.local.window={self.local.window}: the local stack sees its patch: 0")

    levels = 1

    @property
    def longest_row(self) -> int:
        """Bytes of a row that learned positions suffice for; 0: any number."""
        return self.positions // self.patch * self.patch


@dataclass(frozen=True, kw_only=True)
class BLTConfig:
    """BLT (Pagnoni et al. 2024): patches begin where a small byte model finds the next byte hard to foresee; several
    vectors per patch are read from its bytes, and read by them, through attention."""

    family: Literal["blt"] = "blt"  # which model family this is
    encoder: StackConfig = field(
        default_factory=lambda: StackConfig(layout="T1", d_model=192, window=128)
    )  # over bytes
    main: StackConfig = field(default_factory=_main)  # of patches
    decoder: StackConfig = field(
        default_factory=lambda: StackConfig(layout="T4", d_model=192, window=128)
    )  # over bytes
    queries: int = 2  # vectors of a patch
    read_every_layer: bool = True  # every decoder layer reads the patch, or only the first
    doubled: bool = False  # attention between bytes and patches adds its residual twice, as in the released models
    ngrams: tuple[int, ...] = (
        3,
        4,
        5,
        6,
        7,
        8,
    )  # lengths of the byte groups whose hashes have embeddings; empty = none
    hash_functions: int = 1  # hash functions for each length
    hash_size: int = 500002  # embeddings of each length and function
    patcher: EntropyConfig = field(default_factory=EntropyConfig)  # the model and the rule that cut patches
    capacity: CapacityConfig = field(default_factory=_slots)  # patch slots in training
    dtype: DType = "float32"  # compute type; parameters are float32 always
    init_std: float = 0.02  # standard deviation of the initial weights (0: 1 / sqrt(fan in))

    def __post_init__(self):
        d = self.encoder.d_model
        require(d == self.decoder.d_model, f"model.decoder.d_model={self.decoder.d_model}: must be the encoder's, {d}")
        require(self.queries >= 1, f"model.queries={self.queries}: must be at least 1")
        require(all(1 <= n <= 64 for n in self.ngrams), f"model.ngrams={self.ngrams}: groups have 1 to 64 bytes")
        require(1 <= self.hash_functions <= 11, f"model.hash_functions={self.hash_functions}: must be 1 to 11")
        require(2 <= self.hash_size <= 1 << 23, f"model.hash_size={self.hash_size}: must be 2 to {1 << 23:,}")
        rows = len(self.ngrams) * self.hash_functions * self.hash_size
        require(rows < 2**31, f"model.ngrams, hash_functions, hash_size: {rows:,} embeddings; at most 2^31")
        for name in ("encoder", "decoder"):  # whose heads patches are read with, whatever its blocks are
            c = getattr(self, name)
            require(
                (c.head_dim > 0 or c.d_model % c.num_heads == 0) and c.num_heads % c.kv_heads == 0,
                f"model.{name}: num_heads={c.num_heads} must divide d_model={c.d_model}, num_kv_heads={c.kv_heads} it",
            )

    levels = 1
