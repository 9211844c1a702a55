"""ByT5 and MrT5: deletion in its three ways, caches, losses."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from bytelm.config import ConfigError, T5Config
from bytelm.models.build import init_params, structure
from bytelm.models.t5 import Control
from tiny import network, seq2seq_batch, t5

KINDS = ("none", "learned", "random", "fixed", "boundary", "convolution")


def built(kind="learned", seed=0, **fields):
    config = t5(kind, **fields)
    params = network(config, seed, scale=2.0)[1]
    if kind == "learned":  # spread round the threshold
        params["encoder"]["delete_gate"]["kernel"] = params["encoder"]["delete_gate"]["kernel"] * 6
        params["encoder"]["delete_gate"]["bias"] = jnp.zeros(())
    return config, params


@functools.cache  # tests share compilations, which are what they cost
def _encoder(config, mode, slots):
    graph = structure(config)[0]
    return jax.jit(lambda params, source: nnx.merge(graph, params).encode(source, source > 0, mode, slots))


@functools.cache
def _decoder(config):
    graph = structure(config)[0]
    return jax.jit(lambda params, inputs, encoded: nnx.merge(graph, params).decode(inputs, encoded)[0])


@functools.cache
def _training(config):
    graph = structure(config)[0]

    def loss(params, batch, alpha, key):
        out = nnx.merge(graph, params)(batch["inputs"], source=batch["source"], control=Control(alpha, key))
        picked = jnp.take_along_axis(jax.nn.log_softmax(out.logits), batch["targets"][..., None], -1)[..., 0]
        return -jnp.mean(picked) + out.aux_loss, out.metrics

    return jax.jit(jax.value_and_grad(loss, has_aux=True))


def trained(config, params, batch, alpha=0.3, key=0):
    """((loss, metrics), gradients) of a training pass."""
    return _training(config)(params, batch, jnp.float32(alpha), jax.random.key(key))


@pytest.mark.parametrize("kind", ["learned", *(pytest.param(k, marks=pytest.mark.slow) for k in ("random", "fixed"))])
def test_compact_equals_masked_hard_at_every_capacity_that_holds_the_longest_row(kind):
    config, params = built(kind)
    batch = seq2seq_batch(b=4, t=24)
    seen, masked = _encoder(config, "masked_hard", None)(params, batch["source"])
    longest = int(np.asarray(seen.keep).sum(axis=1).max())
    assert 3 < longest < 24

    decode = _decoder(config)
    wanted = decode(params, batch["inputs"], masked)
    for slots in (longest, longest + 1, 23, 24):
        _, compact = _encoder(config, "compact", slots)(params, batch["source"])
        assert compact.states.shape[1] == slots
        np.testing.assert_allclose(decode(params, batch["inputs"], compact), wanted, atol=1e-5)
        for row in range(4):
            kept = np.flatnonzero(seen.keep[row])
            assert np.asarray(compact.position[row, : len(kept)]).tolist() == kept.tolist()


@pytest.mark.parametrize("mode", ["masked_hard", "compact"])
def test_padding_changes_nothing(mode):
    config, params = built()
    batch = seq2seq_batch()
    source = batch["source"]
    length = int((source[1] > 0).sum())
    assert length < source.shape[1]
    _, whole = _encoder(config, mode, None)(params, source)
    _, alone = _encoder(config, mode, None)(params, source[1:2, :length])
    together = _decoder(config)(params, batch["inputs"], whole)
    np.testing.assert_allclose(together[1], _decoder(config)(params, batch["inputs"][1:2], alone)[0], atol=2e-5)


@pytest.mark.parametrize("kind", KINDS)
def test_steps_equal_the_whole_decoder(kind):
    config, params = built(kind, deletion={"rate": 0.5})
    batch = seq2seq_batch()
    _, kept = _encoder(config, "compact", None)(params, batch["source"])
    inputs = batch["inputs"]

    @jax.jit
    def both(params):
        net = nnx.merge(structure(config)[0], params)
        first, cache = net.prefill(inputs[:, :3], jnp.array([3, 2, 1]), 12, kept)
        at = jnp.array([3, 2, 1])
        rest = []
        for _ in range(5):  # rows at different places
            logits, cache = net.step(jnp.take_along_axis(inputs, at[:, None], 1)[:, 0], cache)
            rest.append(logits)
            at = at + 1
        return net.decode(inputs, kept)[0], first, jnp.stack(rest, 1)

    whole, first, rest = both(params)
    for row, start in enumerate((3, 2, 1)):
        np.testing.assert_allclose(first[row], whole[row, start - 1], atol=2e-5)
        np.testing.assert_allclose(rest[row], whole[row, start : start + 5], atol=2e-5)


def test_the_decoder_is_causal_and_reads_the_source():
    config, params = built()
    batch = seq2seq_batch()
    net = nnx.merge(structure(config)[0], params)
    run = jax.jit(lambda inputs, source: net(inputs, source=source).logits)
    before = run(batch["inputs"], batch["source"])
    after = run(batch["inputs"].at[:, 5].set(99), batch["source"])
    np.testing.assert_array_equal(before[:, :5], after[:, :5])
    assert (np.asarray(before[:, 5]) != np.asarray(after[:, 5])).any()
    other = batch["source"].at[:, 0].set(77)
    assert (np.asarray(run(batch["inputs"], other)[:, 0]) != np.asarray(before[:, 0])).any()


@pytest.mark.slow
def test_hard_training_moves_the_gate_only_when_straight_through():
    batch = seq2seq_batch()
    for through in (False, True):
        deletion = {"train": "compact", "straight_through": through, "capacity": 1.0}
        config, params = built(deletion=deletion)
        _, grads = trained(config, params, batch, alpha=0.0)
        moved = float(jnp.abs(grads["encoder"]["delete_gate"]["kernel"]).max())
        assert (moved > 1e-6) == through


@pytest.mark.slow
def test_straight_through_has_the_same_values_as_hard():
    batch = seq2seq_batch()
    losses = []
    for mode in ("compact", "masked_hard"):
        for through in (False, True):
            config, params = built(deletion={"train": mode, "straight_through": through, "capacity": 1.0})
            losses.append(float(trained(config, params, batch)[0][0]))
    np.testing.assert_allclose(losses, losses[0], rtol=1e-5)


@pytest.mark.parametrize("overflow", ["position", "gate"])
def test_kept_bytes_without_a_slot_are_counted_and_dropped_as_asked(overflow):
    deletion = {"train": "compact", "capacity": 0.35, "overflow": overflow}
    config, params = built(deletion=deletion)
    batch = seq2seq_batch()
    (_, metrics), _ = trained(config, params, batch)
    assert 0 < float(metrics["deletion/overflow"]) < 1
    seen, kept = _encoder(config, "compact", 8)(params, batch["source"])
    row = int(np.asarray(seen.keep).sum(axis=1).argmax())
    places, values = np.flatnonzero(seen.keep[row]), np.asarray(seen.gate[row])
    assert len(places) > 8
    wanted = places[:8] if overflow == "position" else np.sort(places[np.argsort(-values[places], kind="stable")[:8]])
    assert np.asarray(kept.position[row]).tolist() == wanted.tolist()


@pytest.mark.slow
def test_gate_loss_is_alpha_times_the_mean_gate_and_scores_are_asked_to_be_small():
    batch = seq2seq_batch()
    config, params = built()
    (low, _), _ = trained(config, params, batch, alpha=0.0)
    (high, metrics), _ = trained(config, params, batch, alpha=0.5)
    assert float(high - low) == pytest.approx(0.5 * float(metrics["deletion/mean_gate"]), rel=1e-4)
    watched, _ = built(deletion={"score_weight": 2.0})
    (more, metrics), _ = trained(watched, params, batch, alpha=0.0)
    assert float(metrics["deletion/excess"]) >= 0
    assert float(more - low) == pytest.approx(2 * float(metrics["deletion/excess"]), rel=1e-3, abs=1e-5)


def test_dropout_and_noise_depend_on_the_key_only():
    batch = seq2seq_batch()
    config, params = built(dropout=0.2, deletion={"noise": True})
    losses = [float(trained(config, params, batch, key=k)[0][0]) for k in (1, 1, 2)]
    assert losses[0] == losses[1] != losses[2]


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS)
def test_every_kind_has_finite_gradients_for_every_weight(kind):
    config, params = built(kind, deletion={"rate": 0.5})
    (loss, _), grads = trained(config, params, seq2seq_batch())
    assert np.isfinite(loss)
    for path, g in jax.tree.leaves_with_path(grads):
        assert np.isfinite(g).all(), path
        assert float(jnp.abs(g).max()) > 0, path


@pytest.mark.slow
def test_remat_and_loops_change_nothing():
    config, params = built()
    batch = seq2seq_batch()
    (wanted, _), grads = trained(config, params, batch)
    for fields in ({"remat": "full"}, {"remat": "dots", "scan_layers": False}):
        other = dataclasses.replace(config, **fields)
        (loss, _), same = trained(other, params, batch)
        np.testing.assert_allclose(loss, wanted, rtol=1e-6)
        jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-5), grads, same)


def test_bfloat16_computes_the_gate_in_float32():
    config, params = built()
    batch = seq2seq_batch()
    half = dataclasses.replace(config, dtype="bfloat16")
    seen, kept = _encoder(half, "compact", None)(params, batch["source"])
    assert seen.gate.dtype == jnp.float32
    assert kept.states.dtype == jnp.bfloat16
    assert _decoder(half)(params, batch["inputs"], kept).dtype == jnp.float32


@pytest.mark.parametrize(("name", "count"), [("small", 299_637_760), ("base", 581_653_248), ("large", 1_228_183_552)])
def test_published_sizes(root, name, count):
    from bytelm import codec

    config = codec.load(root / f"configs/byt5_{name}.yaml").model
    shapes = structure(config)[1]
    assert sum(x.size for x in jax.tree.leaves(shapes)) == count
    gated = dataclasses.replace(config, deletion=dataclasses.replace(config.deletion, kind="learned"))
    extra = sum(x.size for x in jax.tree.leaves(structure(gated)[1])) - count
    assert extra == 2 * config.d_model + 1


def test_initial_weights_shrink_with_depth():
    config = T5Config(d_model=64, encoder_layers=4, decoder_layers=1, d_mlp=256)
    params = init_params(config, jax.random.key(0))
    encoder, decoder = params["encoder"]["blocks"], params["decoder"]["blocks"]
    assert float(jnp.std(encoder["attention"]["q"]["kernel"])) == pytest.approx(0.5 / 8, rel=0.05)
    assert float(jnp.std(decoder["mlp"]["down"]["kernel"])) == pytest.approx(1 / 16, rel=0.05)
    assert float(encoder["mlp_norm"]["scale"][0, 0]) == 0.5
    assert float(jnp.std(params["embed"]["table"])) == pytest.approx(1 / 8, rel=0.05)


@pytest.mark.parametrize(
    ("fields", "said"),
    [
        ({"deletion": {"layer": 3}}, "deletion.layer"), ({"deletion": {"layer": 0}}, "renumbers"),
        ({"buckets": 7}, "buckets"), ({"vocabulary": 200}, "vocabulary"), ({"dropout": 1.0}, "dropout"),
        ({"deletion": {"threshold": -40.0}}, "threshold"), ({"deletion": {"rate": 1.0}}, "rate"),
    ],
)  # fmt: skip
def test_configs_that_cannot_work_are_refused(fields, said):
    deletion = fields.pop("deletion", {})
    with pytest.raises(ConfigError, match=said):
        config = t5(deletion=deletion if "layer" not in deletion else {}, **fields)
        dataclasses.replace(config, deletion=dataclasses.replace(config.deletion, **deletion))


def test_a_convolution_makes_one_of_n_bytes():
    with pytest.raises(ConfigError, match="one of every n"):
        t5("convolution", deletion={"rate": 0.4})
