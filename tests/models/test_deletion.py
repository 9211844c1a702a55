"""The delete gate, its baselines, and the controller."""

import itertools
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from bytelm.config import DeletionConfig
from bytelm.models.deletion import (
    capacity_slots,
    first_control,
    fixed_gate,
    gate_values,
    keep_highest,
    keeps,
    mean_gate,
    next_control,
    random_gate,
    slot_sizes,
)


def traces(root, name):
    return json.loads((root / f"tests/golden/mrt5/traces/{name}.json").read_text())


def test_controller_follows_the_reference_s_traces(root):
    found = traces(root, "pi_controller")["traces"]
    assert len(found) == 3
    for trace in found:
        config = DeletionConfig(kind="learned", rate=trace["target"], k_p=trace["p"], k_i=trace["i"])
        state = first_control(config)
        for rate, wanted in zip(trace["rates"], trace["coeff"], strict=True):
            state = next_control(config, state, jnp.float32(rate), jnp.int32(0))
            assert float(state["alpha"]) == pytest.approx(wanted, rel=1e-5, abs=1e-8)


def test_neither_regulariser_counts_during_the_delay():
    from bytelm.train.step import _control
    from tiny import t5

    model = t5(deletion={"delay": 3, "weight": 0.2, "controller": False, "score_weight": 0.5})
    for step in (0, 2, 3):
        state = {"step": jnp.int32(step), "deletion": first_control(model.deletion)}
        told = _control(model, state, jax.random.key(0))
        assert (float(told.alpha), float(told.scores)) == ((0.0, 0.0) if step < 3 else (pytest.approx(0.2), 1.0))


def test_controller_waits_and_can_be_off():
    waits = DeletionConfig(kind="learned", delay=3, weight=0.01)
    state = first_control(waits)
    for step in range(5):
        state = next_control(waits, state, jnp.float32(0.0), jnp.int32(step))
        assert (float(state["alpha"]) == pytest.approx(0.01)) == (step < 3)
    off = DeletionConfig(kind="learned", controller=False, weight=0.02)
    state = next_control(off, first_control(off), jnp.float32(0.9), jnp.int32(7))
    assert float(state["alpha"]) == pytest.approx(0.02)


def test_fixed_gate_is_the_reference_s_for_one_row_and_per_row_for_many(root):
    first, second, wrong = traces(root, "fixed_gate")
    gates = [fixed_gate(jnp.asarray(case["input_ids"]), 0.5, -30.0) for case in (first, second)]
    for gate, case in zip(gates, (first, second)):
        np.testing.assert_array_equal(gate, case["gate"])
    both = fixed_gate(jnp.asarray(wrong["input_ids"]), 0.5, -30.0)
    np.testing.assert_array_equal(both, jnp.concatenate(gates))
    assert (np.asarray(both) != np.asarray(wrong["gate"])).any()  # the defect that is not followed


@pytest.mark.parametrize("rate", [0.1, 0.3, 0.5, 0.7])
def test_fixed_gate_keeps_the_ceiling_of_each_segment(rate):
    text = b"ab cdefghijk, lm\n" + b"x" * 20
    ids = np.frombuffer(text, np.uint8).astype(np.int32) + 3
    gate = np.asarray(fixed_gate(jnp.asarray(ids[None]), rate, -30.0))[0]
    cuts = [0, *(i for i, c in enumerate(text) if not chr(c).isalnum()), len(text)]
    for begin, end in itertools.pairwise(cuts):
        keep = int(np.ceil(round((1 - rate) * (end - begin), 6)))
        assert (gate[begin:end] == 0).sum() == keep
        assert (gate[begin : begin + keep] == 0).all()


def test_random_gate_deletes_its_share_and_draws_anew():
    source = jnp.full((16, 64), 70)
    shares = [float((random_gate(source, 0.4, -30.0, jax.random.key(i)) < -15).mean()) for i in range(200)]
    assert np.mean(shares) == pytest.approx(0.4, abs=0.02)
    assert np.std(shares) == pytest.approx(0.05, abs=0.015)
    a, b = (random_gate(source, 0.4, -30.0, jax.random.key(i)) for i in range(2))
    assert (a != b).any()


def test_gate_values_padding_and_threshold():
    logits = jnp.array([[0.0, 5.0, -5.0, 9.0]])
    source = jnp.array([[70, 70, 70, 0]])
    gate = gate_values(logits, source, -30.0)
    np.testing.assert_allclose(gate, [[-15.0, -0.200786, -29.799215, -30.0]], rtol=1e-5)
    assert np.asarray(keeps(gate, -15.0, None)).tolist() == [[False, True, False, False]]  # not at the threshold
    assert float(mean_gate(gate, source)) == pytest.approx(-15.0, abs=1e-4)
    pulled = jax.grad(lambda x: gate_values(x, source, -30.0).sum())(logits)
    assert float(pulled[0, 3]) == 0
    assert float(pulled[0, 0]) > 0


def test_a_row_that_would_keep_nothing_keeps_its_first_byte():
    gate = jnp.array([[-20.0, -20.0], [-1.0, -20.0]])
    assert np.asarray(keeps(gate, -15.0, None)).tolist() == [[True, False], [True, False]]
    assert np.asarray(keeps(gate, -0.5, None)).tolist() == [[True, False], [True, False]]


def test_highest_gates_are_kept_in_their_places():
    gate = jnp.array([[-1.0, -3.0, -2.0, -20.0, -1.0]])
    keep = keeps(gate, -15.0, None)
    assert np.asarray(keep_highest(keep, gate, 2)).tolist() == [[True, False, False, False, True]]
    assert np.asarray(keep_highest(keep, gate, 3)).tolist() == [[True, False, True, False, True]]
    assert (keep_highest(keep, gate, 5) == keep).all()


def test_slots_of_training_and_of_exact_compaction():
    assert capacity_slots(DeletionConfig(kind="learned", rate=0.5), 256) == 184
    assert capacity_slots(DeletionConfig(kind="learned", rate=0.1), 256) == 256
    assert capacity_slots(DeletionConfig(kind="learned", capacity=0.25), 256) == 64
    for row in (7, 64, 100, 1024):
        sizes = slot_sizes(row)
        assert sizes[-1] == row
        assert len(sizes) <= 65
        assert sizes == sorted(sizes)
