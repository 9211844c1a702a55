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
    those in front of them; bytes of the source, how many of them the gate deletes, and the slots that are left."""
    logits, _ = network.decode(batch["inputs"], encoded)
    scored = batch["segments"] > 0
    wide = logits.astype(jnp.promote_types(logits.dtype, jnp.float32))
    picked = jnp.take_along_axis(wide, batch["targets"][..., None], axis=-1)[..., 0]
    nll = jax.nn.logsumexp(wide, axis=-1) - picked
    right = (jnp.argmax(wide, axis=-1) == batch["targets"]) & scored

    def count(x: Array) -> Int[Array, " b"]:
        return jnp.sum(x, axis=1).astype(jnp.int32)

    real = batch["source"] != PAD
    kept = encoded.position < real.shape[1] if encoded.visible is None else encoded.visible
    if encoded.gate is not None:  # soft deletion keeps every slot
        kept = seen.keep if seen.keep is not None else kept
    kept = count(kept & real) if kept.shape == real.shape and encoded.position.shape == real.shape else count(kept)
    return {"nats": jnp.sum(jnp.where(scored, nll, 0), axis=1), "targets": count(scored), "right": count(right),
            "real": count(real), "kept": kept}  # fmt: skip
