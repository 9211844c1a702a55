"""HAT, SpaceByte, MegaByte and BLT: cached against full, causality, packing, overflow, words on the device."""

import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from hypothesis import given, settings
from hypothesis import strategies as st

import tiny
from bytelm.config import Config, ConfigError, DataConfig
from bytelm.data import words
from bytelm.data.word_rule import CAUSAL_START, START, UNKNOWN_SHIFT
from bytelm.lm import NetworkLM
from bytelm.models.build import byte_ids
from bytelm.models.word_steps import word_marks
from bytelm.nn.segment import segment_softmax

CONFIGS = {
    "hat": tiny.hat(),
    "hat_space": tiny.hat(rule="space", pool_norm="none", guide_every_layer=False, pool_kv_heads=2, guide_kv_heads=2),
    "spacebyte": tiny.spacebyte(),
    "spacebyte_learned": tiny.spacebyte(positions=64, slots=64),
    "megabyte": tiny.megabyte(),
    "blt": tiny.blt(patcher=tiny.entropy(rule="both", max_patch=4)),
}
TEXTS = ["The fox (of 3)  took a\n\nnap.", "Größe, ça va? 你好 мир 🇩🇪🇫🇷x", "aB1⁄2 don't\tx_y"]
BROKEN = [b"\xe4\xbd", b"\xff\x80a", b"\xf0\x9f\x98"]
LENGTH = 36


@functools.cache
def make(name):
    network, params = tiny.network(CONFIGS[name])
    return network, nnx.split(network)[0], params


def rows(name):
    """Texts of several scripts behind the start symbol, with bytes between them that are no UTF-8."""
    ids = byte_ids(CONFIGS[name])
    out = np.full((3, LENGTH), 97, np.int32)
    for row, text, broken in zip(out, TEXTS, BROKEN):
        data = (text.encode()[:14] + broken + text.encode())[: LENGTH - 1]
        row[1 : 1 + len(data)] = np.frombuffer(data, np.uint8)
    out += ids.offset
    out[:, 0] = ids.start
    return jnp.asarray(out)


@functools.partial(jax.jit, static_argnames=("graph", "capacity"))
def run(graph, params, inputs, segments=None, capacity=None, marks=None):
    out = nnx.merge(graph, params)(inputs, segments, capacity, marks)
    return out.logits, out.levels[0], out.scored


@pytest.mark.parametrize("name", tiny.mostly_slow(CONFIGS, "hat"))
def test_cached_steps_equal_the_full_forward(name):
    """From nothing, and behind prefills of unequal lengths that end inside words, characters and broken bytes."""
    network, graph, params = make(name)
    inputs = rows(name)
    full = np.asarray(run(graph, params, inputs)[0])

    @jax.jit
    def follow(params, cache, ids):
        network = nnx.merge(graph, params)
        cache, logits = jax.lax.scan(lambda c, x: network.step(x, c)[::-1], cache, ids.T)
        return jnp.swapaxes(logits, 0, 1)

    @jax.jit
    def prefill(params, lengths):
        return nnx.merge(graph, params).prefill(inputs, lengths, 2 * LENGTH)

    stepped = np.asarray(follow(params, network.empty_cache(3, LENGTH), inputs))
    np.testing.assert_allclose(stepped, full, atol=2e-5)
    for lengths in ([1, 2, 16], [15, 16, 17], [18, 19, 5], [17, 8, 12]):
        first, cache = prefill(params, jnp.array(lengths))
        ahead = np.minimum(np.array(lengths)[:, None] + np.arange(LENGTH), LENGTH - 1)
        rest = np.asarray(follow(params, cache, jnp.take_along_axis(inputs, ahead, axis=1)))
        for i, n in enumerate(lengths):
            np.testing.assert_allclose(np.asarray(first)[i], full[i, n - 1], atol=2e-5)
            np.testing.assert_allclose(rest[i, : LENGTH - n], full[i, n:], atol=2e-5)


@pytest.mark.parametrize("name", CONFIGS)
def test_nothing_before_a_changed_byte_changes(name):
    _, graph, params = make(name)
    inputs = rows(name)
    before = np.asarray(run(graph, params, inputs)[0])
    for at in (1, 7, 15, 16, 17, 20, 30):
        for new in (32, 0x41, 0xE4, 0xBD, 0xFF, 0x2E):
            after = np.asarray(run(graph, params, inputs.at[:, at].set(new))[0])
            np.testing.assert_array_equal(after[:, :at], before[:, :at])
            changed = np.asarray(inputs[:, at]) != new
            assert (np.abs(after[changed] - before[changed])[:, at].max(axis=-1) > 1e-6).all()


@pytest.mark.parametrize("name", CONFIGS)
def test_packed_documents_equal_separate_ones(name):
    _, graph, params = make(name)
    inputs = rows(name)
    cuts = [0, 11, 24, LENGTH]
    packed = jnp.concatenate([inputs[i, : b - a] for i, (a, b) in enumerate(itertools.pairwise(cuts))])[None]
    segments = jnp.asarray(np.repeat([1, 2, 3], np.diff(cuts)))[None]
    together = np.asarray(run(graph, params, packed, segments)[0])
    alone = np.asarray(run(graph, params, inputs)[0])
    for i, (a, b) in enumerate(itertools.pairwise(cuts)):
        np.testing.assert_allclose(together[0, a:b], alone[i, : b - a], atol=2e-5)


@pytest.mark.parametrize("name", CONFIGS)
def test_units_without_a_slot_are_left_out_by_position(name):
    _, graph, params = make(name)
    inputs = rows(name)
    logits, level, scored = run(graph, params, inputs)
    assert np.asarray(scored).all()
    few, same, kept = run(graph, params, inputs, None, (4,))
    np.testing.assert_array_equal(level.boundary, same.boundary)
    number = np.cumsum(np.asarray(level.boundary), axis=1) - 1
    np.testing.assert_array_equal(kept, number < 4)
    np.testing.assert_allclose(np.asarray(few)[kept], np.asarray(logits)[kept], atol=2e-5)
    assert np.isfinite(np.asarray(few)).all() and not np.asarray(kept).all()


def test_a_document_without_slots_reads_no_other_one_s_guide():
    _, graph, params = make("hat")
    inputs = rows("hat")
    segments = jnp.asarray(np.repeat([1, 2], [20, LENGTH - 20]))[None].repeat(3, axis=0)
    other = inputs.at[:, :20].set(98)
    a, b = (np.asarray(run(graph, params, x, segments, (2,))[0])[:, 20:] for x in (inputs, other))
    np.testing.assert_array_equal(a, b)


def test_released_guides_change_with_a_word_s_first_byte():
    """Where all characters are of one byte, released and strict guides are one; else they differ inside the first
    characters of words, and where attention sees those."""
    _, graph, params = make("hat")
    inputs = rows("hat")

    def released(row):
        return jnp.asarray(words.marks(bytes(row.astype(np.uint8)), "unicode", 12).astype(np.int32))

    marks = jnp.stack([released(row) for row in np.asarray(inputs)])
    free, level, _ = run(graph, params, inputs, marks=marks)
    strict, other, _ = run(graph, params, inputs)
    ascii_row, other_row = 0, 1
    until = 14  # of the first text, before the broken bytes
    np.testing.assert_allclose(free[ascii_row, :until], strict[ascii_row, :until], atol=2e-5)
    assert np.abs(np.asarray(free - strict))[other_row].max() > 1e-3
    np.testing.assert_array_equal(level.boundary[0, :until], other.boundary[0, :until])


def test_guides_reach_later_words_only():
    """Change the guide's weights: a document's first word stays as it is but for the learned first guide."""
    _, graph, params = make("hat")
    inputs = rows("hat")
    changed = jax.tree.map_with_path(lambda p, x: x * 2 if "backbone" in str(p) else x, params)
    a, level, _ = run(graph, params, inputs)
    b, _, _ = run(graph, changed, inputs)
    second = np.flatnonzero(np.asarray(level.boundary[0]))[1]
    np.testing.assert_array_equal(a[0, :second], b[0, :second])
    assert np.abs(np.asarray(a - b))[0, second:].max() > 1e-3


def test_learned_slots_limit_the_window():
    """Rows are so short that the slots suffice for any text; the trainer says what learned positions are too few."""
    config = tiny.spacebyte(positions=64, slots=4)
    lm = NetworkLM(config, make("spacebyte_learned")[2], 64)
    assert lm.window == config.longest_row == 7
    assert tiny.megabyte(positions=30).longest_row == 28
    with pytest.raises(ConfigError, match="learned positions are too few"):
        Config(model=tiny.megabyte(positions=509), data=DataConfig(seq_len=510))
    with pytest.raises(ConfigError, match="model.start=65"):
        tiny.hat(start=65)


blobs = st.lists(
    st.text(st.sampled_from(" aAbZ.'_(1\n\u0301\u200d\U0001f1e9\u4e2d\u2044"), max_size=6).map(str.encode)
    | st.binary(max_size=4)
    | st.sampled_from([b"\xe4\xbd", b"\xf0\x9f\x98", b"\xed\xb2\x80", b"\xf4\x8f\xbf"])
).map(lambda parts: b"".join(parts)[:36])


@settings(deadline=None, max_examples=60)
@given(blobs, st.sampled_from(words.RULES))
def test_words_on_the_device_are_those_of_the_host(data, rule):
    ids = np.zeros((1, 48), np.int32)
    ids[0, 8 : 8 + len(data)] = np.frombuffer(data, np.uint8)
    starts = np.zeros((1, 48), bool)
    starts[0, [0, 8]] = True
    begins, known = _device_marks(jnp.asarray(ids), jnp.asarray(starts), rule)
    want = words.marks(data + bytes(40 - len(data)), rule, 9)
    decided = np.cumsum(want & CAUSAL_START > 0) - (want >> UNKNOWN_SHIFT)
    np.testing.assert_array_equal(np.cumsum(known[0])[8:] - np.cumsum(known[0])[7], decided)
    np.testing.assert_array_equal(np.asarray(begins)[0, 8:], want & CAUSAL_START > 0)


@functools.partial(jax.jit, static_argnums=2)
def _device_marks(inputs, restarts, rule):
    return word_marks(inputs, restarts, rule, 9)


def test_segment_softmax_equals_its_twin():
    rng = np.random.default_rng(0)
    scores, values = rng.standard_normal((2, 9, 3)) * 20, rng.standard_normal((2, 9, 3, 4))
    segment = np.array([[0, 0, 0, 1, 1, 3, 3, -1, 9], [2, 2, 2, 2, 2, 2, 2, 2, 2]])
    want = np.zeros((2, 4, 3, 4))
    for b in range(2):
        for s in range(4):
            at = np.flatnonzero(segment[b] == s)
            if len(at):
                w = np.exp(scores[b, at] - scores[b, at].max(axis=0))
                want[b, s] = (w[..., None] * values[b, at]).sum(axis=0) / w.sum(axis=0)[:, None]
    got = segment_softmax(jnp.asarray(scores, jnp.float32), jnp.asarray(values, jnp.float32), jnp.asarray(segment), 4)
    np.testing.assert_allclose(got, want, atol=1e-5)


def test_strict_training_reads_marks_as_the_device_does():
    """Marks of the loader's kind under `guide: strict` give what words found on the device give."""
    network, params = tiny.network(tiny.hat(guide="strict"))
    graph, inputs = nnx.split(network)[0], rows("hat")
    marks = np.stack([words.marks(bytes(row.astype(np.uint8)), "unicode", 12) for row in np.asarray(inputs)])
    # The start symbol is a word, known at once.
    assert (marks[:, 0] == START | CAUSAL_START).all()
    given_ = run(graph, params, inputs, marks=jnp.asarray(marks, jnp.int32))[0]
    np.testing.assert_allclose(given_, run(graph, params, inputs)[0], atol=2e-5)
