"""Configs of the encoder-decoders, ByT5 and MrT5. `bytelm.config` has them all."""

from dataclasses import dataclass, field
from typing import Literal

from bytelm.model_config import DType, Remat, require


@dataclass(frozen=True, kw_only=True)
class DeletionConfig:
    """How an encoder gets shorter behind its first blocks: MrT5's delete gate (Kallini et al. 2025), its baselines."""

    kind: Literal["none", "learned", "random", "fixed", "boundary", "convolution"] = (
        "none"  # what shortens, if anything
    )
    layer: int = 3  # encoder blocks in front of it
    rate: float = 0.5  # share to delete: what the controller steers to, or what the baseline takes away
    scale: float = -30.0  # k: gate value of a byte that is certainly deleted
    threshold: float = -15.0  # bytes whose gate value is above are kept
    gate_norm: bool = True  # an RMSNorm in front of the gate
    gate_bias: float = 1.0  # initial logit of keeping: 1 as released, for trained weights; about 4 from scratch
    noise: bool = False  # Gumbel noise on the gate in training
    train: Literal["soft", "masked_hard", "compact"] = "soft"  # deletion in training: by gate values, masks, or slots
    straight_through: bool = False  # hard deletion in training: the gate still gets soft deletion's gradient
    # Compact training: first slots as a share of the row (0: all of it, or 1 - rate + 0.2 where they stay), and steps
    # between choices of slots by what rows kept lately (0: they stay).
    capacity: float = 0.0
    capacity_every: int = 100
    overflow: Literal["position", "gate"] = "position"  # which kept bytes go first without a slot: last, or lowest gate
    weight: float = 0.0  # alpha, weight of the mean gate value in the loss: at first, or throughout
    controller: bool = True  # move alpha so that the deletion rate becomes `rate` (learned gate)
    k_p: float = 0.5  # the controller's proportional gain
    k_i: float = 1.0e-5  # its integral gain, per optimizer step
    weight_floor: float = 0.0  # least alpha: 0 as released never pulls deleted bytes back; below 0 it can
    delay: int = 0  # steps before gate loss and controller begin
    score_weight: float = 0.0  # beta, weight of the attention-score regulariser
    released: bool = False  # boundary: as the released code does, encoder slots without a segment are seen

    def __post_init__(self):
        require(self.layer >= 0, f"deletion.layer={self.layer}: must not be negative")
        require(0 < self.rate < 1, f"deletion.rate={self.rate}: must be between 0 and 1")
        require(
            self.scale < self.threshold < 0,
            f"deletion.threshold={self.threshold}: must lie between deletion.scale={self.scale} and 0",
        )
        require(0 <= self.capacity <= 1, f"deletion.capacity={self.capacity}: must be in [0, 1]")
        for name in ("weight", "k_p", "k_i", "delay", "score_weight", "capacity_every"):
            require(getattr(self, name) >= 0, f"deletion.{name}={getattr(self, name)}: must not be negative")
        require(
            self.kind == "learned" or (self.weight == 0 and self.score_weight == 0),
            f"deletion.weight={self.weight}, deletion.score_weight={self.score_weight}: only a learned gate has them",
        )
        require(
            self.gated or self.train == "soft", f"deletion.train={self.train!r}: deletion.kind={self.kind} has no gate"
        )
        require(
            self.train != "soft" or not self.straight_through,
            "deletion.straight_through: soft deletion passes the gradient anyway; it goes with masked_hard or compact",
        )
        if self.kind == "convolution":
            require(
                self.stride >= 2 and abs(1 - 1 / self.stride - self.rate) < 0.005,
                f"deletion.rate={self.rate}: a convolution makes one of every n bytes: 0.5, 0.667, 0.75, ...",
            )

    @property
    def stride(self) -> int:
        """Bytes that a convolution makes one of."""
        return round(1 / (1 - self.rate))

    @property
    def gated(self) -> bool:
        """Whether bytes get a gate value each and are deleted by it."""
        return self.kind in ("learned", "random", "fixed")


@dataclass(frozen=True, kw_only=True)
class T5Config:
    """An encoder-decoder of the T5 1.1 kind over bytes: ByT5 (Xue et al. 2022), and MrT5 with `deletion`."""

    family: Literal["t5"] = "t5"  # which model family this is
    d_model: int = 256  # width of the residual stream
    num_heads: int = 4  # attention heads
    head_dim: int = 64  # features per head; heads x features need not be d_model
    d_mlp: int = 1024  # width of the gated GELU MLP
    encoder_layers: int = 6  # blocks of the encoder
    decoder_layers: int = 2  # blocks of the decoder
    buckets: int = 32  # of the relative position bias
    max_distance: int = 128  # beyond which positions share the last bucket
    dropout: float = 0.0  # share of activations dropped in training
    softmax_one: bool = False  # softmax1 in every attention: weights may sum to less than 1
    deletion: DeletionConfig = field(default_factory=DeletionConfig)  # what shortens the encoder
    tie_embeddings: bool = False  # use the embedding table as the output matrix
    scale_logits: bool = False  # multiply the decoder's output by d_model^-0.5 in front of the output matrix
    vocabulary: int = 384  # rows of the embedding table: 3 specials, 256 bytes, spare ids
    dtype: DType = "float32"  # compute type; parameters are float32 always
    norm_eps: float = 1.0e-6  # epsilon of every RMSNorm
    scan_layers: bool = True  # run equal blocks as one scan or unrolled
    remat: Remat = "none"  # what the backward pass recomputes: none, all but the matmuls, or everything

    def __post_init__(self):
        for name in ("d_model", "num_heads", "head_dim", "d_mlp", "encoder_layers", "decoder_layers", "max_distance"):
            require(getattr(self, name) >= 1, f"model.{name}={getattr(self, name)}: must be at least 1")
        require(
            self.buckets >= 4 and self.buckets % 2 == 0,
            f"model.buckets={self.buckets}: must be even and at least 4 (half of them for each side)",
        )
        require(
            self.max_distance > self.buckets // 2,
            f"model.max_distance={self.max_distance}: must be above {self.buckets // 2}, half of model.buckets",
        )
        require(0 <= self.dropout < 1, f"model.dropout={self.dropout}: must be in [0, 1)")
        require(self.vocabulary >= 259, f"model.vocabulary={self.vocabulary}: must be at least 259 (3 + 256 bytes)")
        if self.deletion.kind != "none":
            require(
                0 < self.deletion.layer < self.encoder_layers,
                f"model.deletion.layer={self.deletion.layer}: must be 1 to {self.encoder_layers - 1}, with blocks of "
                "the encoder in front and behind (at 0 the released code renumbers positions, which is not supported)",
            )

    @property
    def first_layers(self) -> int:
        """Encoder blocks that see every byte."""
        return self.encoder_layers if self.deletion.kind == "none" else self.deletion.layer
