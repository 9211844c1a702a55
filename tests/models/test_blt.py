"""Patches by entropy, hashes of byte groups, BLT's parts; published BLTs."""

import json
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.numpy import load_file, save_file

import bytelm
import tiny
from bytelm.checkpoint import CheckpointError
from bytelm.cli import run as cli
from bytelm.config import ConfigError, StackConfig
from bytelm.interop import hierarchical
from bytelm.interop.parity import run_case
from bytelm.models.patcher import flat_ids
from bytelm.nn.hashing import PRIMES, ngram_hashes
from bytelm.nn.segment import segment_max
from bytelm.vocab import BLT_IDS, HNET_IDS

CASES = ("joined", "plain")


@pytest.fixture
def golden(root):
    return root / "tests/golden/blt"


# --- hashes ---


def slow_hash(ids, prime, size):
    """In Python's own integers: wrapped to 64 bits, taken as signed, remainder as mathematicians have it."""
    total = sum(int(x) * prime**i for i, x in enumerate(ids)) % 2**64
    return (total - 2**64 if total >= 2**63 else total) % size


@given(
    st.lists(st.integers(0, 1023), min_size=1, max_size=64), st.sampled_from(PRIMES), st.integers(2, 1 << 23)
)  # fmt: skip
@settings(max_examples=60, deadline=None)
def test_hashes_are_those_of_64_bit_integers(ids, prime, size):
    with jax.disable_jit():
        assert int(ngram_hashes(jnp.array(ids), prime, size)) == slow_hash(ids, prime, size)


def test_hashes_are_transformers_own(golden):
    for case in CASES:
        io, record = (
            load_file(golden / case / "io.safetensors"),
            json.loads((golden / case / "config.json").read_text()),
        )
        sizes, rows = record["encoder_hash_byte_group_size"], iter(io["hashes"])
        for prime in PRIMES[: record["encoder_hash_byte_group_nb_functions"]]:
            for n in sizes:
                padded = np.pad(io["tokens"], ((0, 0), (n - 1, 0)))
                windows = np.lib.stride_tricks.sliding_window_view(padded, n, axis=1)
                found = ngram_hashes(jnp.asarray(windows), prime, record["encoder_hash_byte_group_vocab"])
                np.testing.assert_array_equal(found, next(rows))


def test_the_largest_features_of_segments():
    x = np.random.default_rng(0).standard_normal((2, 7, 3)).astype(np.float32)
    segment = np.array([[0, 0, 1, 1, 1, 3, 4], [0, 1, 2, 2, -1, 2, 2]])
    found = np.asarray(segment_max(jnp.asarray(x), jnp.asarray(segment), 4))
    for row in range(2):
        for slot in range(4):
            mine = x[row, segment[row] == slot]
            np.testing.assert_array_equal(found[row, slot], mine.max(axis=0) if len(mine) else np.zeros(3))


# --- patches ---


@pytest.mark.slow
@pytest.mark.parametrize("rule", ["threshold", "rise", "both"])
@pytest.mark.parametrize("longest", [0, 3])
def test_where_patches_begin(rule, longest):
    """The definition, place by place, in packed rows; in one pass and byte by byte."""
    config = tiny.entropy(rule=rule, max_patch=longest, rise=0.002)
    network, _ = tiny.network(tiny.blt(patcher=config))
    patcher = network.patcher
    ids = jnp.asarray(np.random.default_rng(0).integers(0, 256, (2, 40)), jnp.int32).at[:, 0].set(256)
    segments = jnp.asarray(np.repeat([[1, 2, 3]], [13, 1, 26], axis=1).repeat(2, axis=0))
    fires, entropy = np.asarray(patcher.fires(ids, segments)), np.asarray(patcher.entropies(ids, segments))
    want = np.zeros_like(fires)
    for row in range(2):
        for begin, end in ((0, 13), (13, 14), (14, 40)):
            since = begin
            for t in range(begin, end):
                before = entropy[row, t - 1] if t > begin else 0
                high, rising = entropy[row, t] > config.threshold, entropy[row, t] - before > config.rise
                found = t == begin or {"threshold": high, "rise": rising, "both": high and rising}[rule]
                want[row, t] = found or (longest and (t + 1 - since) % longest == 0)
                since = t + 1 if found else since
    np.testing.assert_array_equal(fires, want)
    assert 0.2 < fires.mean() < 0.9
    alone = patcher.fires(ids)
    state, stepped = patcher.no_bytes(2, 40), []
    read = jax.jit(patcher.read)
    for t in range(40):
        state = read(ids[:, t], state)
        stepped.append(state.next)
    np.testing.assert_array_equal(np.stack(stepped, axis=1), alone)
    for lengths in ([1, 40], [7, 22]):
        state, found = patcher.behind(ids, jnp.array(lengths), 60)
        np.testing.assert_array_equal(found, alone)
        np.testing.assert_array_equal(state.next, np.asarray(alone)[np.arange(2), np.array(lengths) - 1])


def test_ids_of_families():
    np.testing.assert_array_equal(flat_ids(jnp.array([1, 4, 259, 0, 2, 3]), BLT_IDS), [256, 0, 255, 257, 258, 259])
    np.testing.assert_array_equal(flat_ids(jnp.array([254, 0, 253]), HNET_IDS), [256, 0, 253])


def test_what_an_entropy_model_may_be():
    for stack in (StackConfig(layout="T1"), StackConfig(layout="m1T1", window=8)):
        with pytest.raises(ConfigError, match="only attention with a window"):
            tiny.entropy(stack=stack)
    assert tiny.entropy().reach == 10


@pytest.mark.slow
def test_an_hnet_cut_by_entropy():
    """Cached steps equal the full forward; marks in the patcher's place; no gradient reaches the patcher."""
    network, params = tiny.network(tiny.hnet(1, chunker="entropy", patcher=tiny.entropy()))
    graph = nnx.split(network)[0]
    ids = jnp.asarray(np.random.default_rng(1).integers(0, 254, (2, 24)), jnp.int32).at[:, 0].set(254)

    @jax.jit
    def forward(params, marks=None):
        out = nnx.merge(graph, params)(ids, None, None, marks)
        return out.logits, out.levels[0].boundary

    full, boundary = forward(params)
    follow = jax.jit(lambda cache: jax.lax.scan(lambda c, x: network.step(x, c)[::-1], cache, ids.T)[1])
    np.testing.assert_allclose(np.swapaxes(follow(network.empty_cache(2, 24)), 0, 1), full, atol=2e-5)
    first, _ = network.prefill(ids, jnp.array([9, 24]), 30)
    np.testing.assert_allclose(first, np.asarray(full)[[0, 1], [8, 23]], atol=2e-5)
    fires = np.asarray(network.patcher.fires(flat_ids(ids, HNET_IDS)))
    np.testing.assert_array_equal(np.asarray(boundary)[:, 1:], fires[:, :-1])
    np.testing.assert_array_equal(forward(params, jnp.asarray(fires, jnp.int32))[0], full)
    grads = jax.grad(lambda p: forward(p)[0].sum())(params)
    assert all((np.asarray(g) == 0).all() for g in jax.tree.leaves(grads["patcher"]))


# --- published ones ---


@pytest.mark.slow
@pytest.mark.parametrize("case", CASES)
def test_parity_with_transformers(golden, case, tmp_path, capsys):
    assert cli(["parity", str(golden / case)]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["ok"] and found["family"] == "blt" and found["boundaries_equal"]
    assert found["max_abs_logit_error"] < 2e-5 and found["max_abs_step_error"] < 2e-5
    shutil.copytree(golden / case, tmp_path / case)
    weights = load_file(tmp_path / case / "weights.safetensors")
    weights["model.encoder_hash_tok_embedding.weight"] *= 1.02
    save_file(weights, tmp_path / case / "weights.safetensors")
    assert not run_case(tmp_path / case)["ok"]


@pytest.mark.slow
def test_a_published_folder(golden, tmp_path):
    shutil.copy(golden / "joined/config.json", tmp_path)
    shutil.copy(golden / "joined/weights.safetensors", tmp_path / "model.safetensors")
    lm = bytelm.load(tmp_path)
    text = "Größe, 你好".encode() + b"\xff\x00"
    after = lm.logprobs_batch([text[:i] for i in range(len(text))])
    np.testing.assert_allclose(lm.score(text).per_byte, after[np.arange(len(text)), list(text)], atol=1e-4)
    alone = [lm.generate(p, 12, temperature=0) for p in (text[:3], text, b"")]
    assert lm.generate_batch([text[:3], text, b""], 12, temperature=0) == alone

    record = json.loads((tmp_path / "config.json").read_text())
    older = dict(record)  # as transformers' own converter writes it
    for part in ("encoder_config", "decoder_config", "global_config"):
        older[part] = {k: v for k, v in record[part].items() if k != "rope_parameters"}
        older[part] |= {"rope_theta": 500000.0, "rope_scaling": {"rope_type": "default"}}
    assert hierarchical.config_from(older, "x") == lm.config
    for change, message in (
        ({"patching_mode": "space"}, "patching_mode='space'"), ({"patch_in_forward": False}, "patch_in_forward=False"),
        ({"patcher_config": {**record["patcher_config"], "sliding_window": None}}, "only attention with a window"),
        ({"global_config": {}}, "has no"), ({"patcher_config": None}, "must be given"),
        ({"patching_threshold": None}, "must be given"),
    ):  # fmt: skip
        (tmp_path / "config.json").write_text(json.dumps({**record, **change}))
        with pytest.raises(ConfigError, match=message):
            bytelm.load(tmp_path)
    (tmp_path / "config.json").write_text(json.dumps({**record, "encoder_hash_byte_group_vocab": 54}))
    with pytest.raises(CheckpointError, match="hash_embed/table has shape"):
        bytelm.load(tmp_path)
    assert hierarchical.is_hierarchical(record)
