"""What a forward pass over targets says of each row: the same for training and for a loaded model."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Int

from bytelm.models.deletion import PAD
from bytelm.models.t5 import T5, Encoded, Mode, Seen

SCORED = ("source", "inputs", "targets", "segments")


def report_rows(network: T5, batch: dict[str, Array], mode: Mode) -> dict[str, Array]:
    """`rows` of a batch of `SCORED`, its sources encoded in the way of `mode`."""
    seen = network.look(batch["source"], batch["source"] != PAD)
    encoded, _ = network.finish(seen, mode)
    return rows(network, batch, seen, encoded)


def rows(network: T5, batch: dict[str, Array], seen: Seen, encoded: Encoded) -> dict[str, Array]:
    """Of each row [b]: nats of its targets, how many there are, how many the model would have written itself, given
    those in front of them; bytes of the source, and how many of them (or segments) the encoder keeps."""
    logits, _ = network.decode(batch["inputs"], encoded)
    scored = batch["segments"] > 0
    wide = logits.astype(jnp.promote_types(logits.dtype, jnp.float32))
    picked = jnp.take_along_axis(wide, batch["targets"][..., None], axis=-1)[..., 0]
    nll = jax.nn.logsumexp(wide, axis=-1) - picked
    right = (jnp.argmax(wide, axis=-1) == batch["targets"]) & scored

    def count(x: Array) -> Int[Array, " b"]:
        return jnp.sum(x, axis=1).astype(jnp.int32)

    real = batch["source"] != PAD
    kept = real if encoded.visible is None else encoded.visible
    if encoded.gate is not None and seen.keep is not None:  # soft deletion has every slot, and deletes by its values
        kept = seen.keep & real
    return {"nats": jnp.sum(jnp.where(scored, nll, 0), axis=1), "targets": count(scored), "right": count(right),
            "real": count(real), "kept": count(kept)}  # fmt: skip
