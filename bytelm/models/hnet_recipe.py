"""How H-Net's parameters are grouped for training: stages, their learning rates, what decays."""

import math
import re

from bytelm.config import HNetConfig


def stage_of(path: str) -> int:
    """Stage of the parameter at `path`. Embedding and head belong to stage 0; a widening vector to the stage it leads
    into, as in the reference."""
    inner = re.match(r"backbone((/inner)*)", path)
    return inner[1].count("/inner") if inner else 0


def lr_multipliers(config: HNetConfig) -> tuple[float, ...]:
    """Learning-rate factor of each stage: the config's own, or the paper's equation 11,

    lambda_s = sqrt(N_GPT prod_{i >= s} N_i / prod_i N_i * D_S / D_s), N_S = 1: outer stages see more of the batch and
    are narrower, so they learn faster.
    """
    if config.lr_multipliers:
        return config.lr_multipliers
    n = (*config.targets, 1.0)
    whole = math.prod(n)
    return tuple(
        math.sqrt(config.bytes_per_token * math.prod(n[s:]) / whole * config.d_model[-1] / d)
        for s, d in enumerate(config.d_model)
    )


def reference_decays(path: str) -> bool:
    """Whether the released code's grouping leaves weight decay on a parameter: it exempts only names with `.bias` at
    the end or `.norm.` inside, so block norms, A_log, D, dt_bias, embeddings and widening vectors do decay."""
    return not re.search(r"(conv_(x|bc)|residual)/bias$|mamba/norm/scale$", path)
