"""Encoder-decoders as byte language models."""

import itertools
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import bytelm
from bytelm.cli import run as cli
from bytelm.config import ConfigError
from bytelm.generate import pad_rows
from bytelm.interop.published import save_hf
from bytelm.lm import NetworkLM
from bytelm.models.build import init_params
from bytelm.seq2seq_lm import Seq2SeqLM
from tiny import network, run_config, t5

INPUTS = [b"The quick brown fox", "naïve café".encode(), b"x"]


@pytest.fixture(scope="module")
def lm():
    config = t5()
    params = network(config, 0, scale=2.0)[1]
    gate = params["encoder"]["delete_gate"]
    gate["kernel"], gate["bias"] = gate["kernel"] * 6, jnp.zeros(())
    return Seq2SeqLM(config, params, 64)


def test_scores_are_sums_of_logprobs_and_do_not_depend_on_the_batch(lm):
    texts = [b"abc", b"", "é!".encode()]
    scores = lm.score_batch(texts, inputs=INPUTS)
    for text, source, score in zip(texts, INPUTS, scores):
        steps = [lm.logprobs(text[:i], input=source)[text[i]] for i in range(len(text))]
        np.testing.assert_allclose(score.per_byte, steps, atol=2e-5)
        assert score.total == pytest.approx(sum(steps), abs=1e-4)
    after = lm.score(b"c", context=b"ab", input=INPUTS[0])
    np.testing.assert_allclose(after.per_byte, scores[0].per_byte[2:], atol=1e-5)
    rows = lm.logprobs_batch([b"a", b"b", b""], inputs=INPUTS)
    np.testing.assert_allclose(np.exp(rows).sum(axis=1), 1, atol=1e-12)
    np.testing.assert_allclose(rows[1], lm.logprobs(b"b", input=INPUTS[1]), atol=2e-5)


def test_hard_deletion_is_the_masked_oracle(lm):
    source, _ = pad_rows([lm._source(INPUTS[0])], 1, 32)
    net = nnx.merge(lm.graph, lm.params)
    _, masked = jax.jit(lambda s: net.encode(s, s > 0, "masked_hard"))(source)
    logits, _ = net.decode(jnp.zeros((1, 1), jnp.int32), masked)
    wanted = jax.nn.log_softmax(logits[0, 0, lm.ids.symbol_ids()].astype(jnp.float32))
    np.testing.assert_allclose(lm.logprobs(b"", input=INPUTS[0]), wanted, atol=2e-5)
    kept = lm.chunks(INPUTS[0])[0]
    assert 0 < len(kept) < len(INPUTS[0])
    seen = lm.look(source)
    assert kept.tolist() == np.flatnonzero(np.asarray(seen.keep)[0, : len(INPUTS[0])]).tolist()


def test_generation_is_greedy_step_by_step_and_repeats(lm):
    out = lm.generate_batch(inputs=INPUTS, max_bytes=6, temperature=0)
    for source, text in zip(INPUTS, out):
        for i in range(len(text)):
            assert int(np.argmax(lm.logprobs(text[:i], input=source))) == text[i]
    assert lm.generate(input=INPUTS[0], max_bytes=6, temperature=0) == out[0]
    drawn = lm.generate(input=INPUTS[0], max_bytes=6, seed=3)
    assert drawn == lm.generate(input=INPUTS[0], max_bytes=6, seed=3)
    assert b"".join(lm.stream(input=INPUTS[0], max_bytes=6, seed=3)) == drawn
    begun = lm.generate(out[0][:2], input=INPUTS[0], max_bytes=4, temperature=0)
    assert out[0][:2] + begun == out[0]


@pytest.mark.slow
def test_beams_find_the_best_target(lm):
    """Against every target of up to two symbols, scored one by one."""
    source = INPUTS[1]
    first = lm.logprobs(b"", input=source)
    found = {b"": first[256]}
    tops = np.argsort(-first[:256])[:40]
    seconds = lm.logprobs_batch([bytes([b]) for b in tops], inputs=[source] * 40)
    for b, row in zip(tops, seconds):
        found[bytes([b])] = (first[b] + row[256]) / 2
        for c in range(256):
            found[bytes([b, c])] = (first[b] + row[c]) / 2  # not ended, but as long as can be
    best = max(found, key=found.__getitem__)
    ((text, score),) = lm.beam_search([source], 2, beams=40)
    assert text == best
    assert score == pytest.approx(found[best], abs=1e-4)
    together = lm.beam_search(INPUTS, 2, beams=40)
    assert together[1][0] == text
    assert together[1][1] == pytest.approx(score, abs=1e-4)
    (greedy, _), *_ = lm.beam_search([source], 6, beams=1)
    assert lm.generate(input=source, max_bytes=6, temperature=0).startswith(greedy)


def test_inputs_are_asked_for_and_refused(lm, tmp_path):
    for call in (lambda: lm.logprobs(b"a"), lambda: lm.score(b"a"), lambda: lm.generate(b"a")):
        with pytest.raises(ConfigError, match="give it an input"):
            call()
    with pytest.raises(ValueError, match="2 texts but 1 inputs"):
        lm.score_batch([b"a", b"b"], inputs=[b"x"])
    with pytest.raises(ConfigError, match="read"):
        lm.score(b"a", input=b"x", window=8)
    flat = run_config(tmp_path).model
    other = NetworkLM(flat, init_params(flat, jax.random.key(0)), 32)
    for call in (lambda: other.logprobs(b"a", input=b"x"), lambda: other.score(b"a", input=b"x"),
                 lambda: other.generate(b"a", input=b"x")):  # fmt: skip
        with pytest.raises(ConfigError, match="reads no input"):
            call()
    with pytest.raises(ConfigError, match="choose hard, soft or none"):
        Seq2SeqLM(lm.config, lm.params, 64, deletion="maybe")


def test_ways_of_deletion_differ_and_a_plain_model_deletes_nothing(lm):
    values = [Seq2SeqLM(lm.config, lm.params, 64, deletion=way).logprobs(b"", input=INPUTS[0])
              for way in ("hard", "soft", "none")]  # fmt: skip
    for a, b in itertools.combinations(values, 2):
        assert np.abs(a - b).max() > 1e-3
    plain = t5("none")
    assert Seq2SeqLM(plain, network(plain)[1], 64).chunks(INPUTS[0]) == []


@pytest.mark.slow
def test_saved_for_its_authors_code_and_converted_back(lm, tmp_path, capsysbinary):
    save_hf(tmp_path / "hf", lm.config, lm.params)
    loaded = bytelm.load(tmp_path / "hf")
    assert isinstance(loaded, Seq2SeqLM)
    wanted = lm.logprobs(b"a", input=INPUTS[0])
    np.testing.assert_allclose(loaded.logprobs(b"a", input=INPUTS[0]), wanted, atol=1e-6)
    assert cli(["convert", str(tmp_path / "hf"), str(tmp_path / "ours")]) == 0
    assert cli(["convert", str(tmp_path / "ours"), str(tmp_path / "again"), "--to", "hf"]) == 0
    for name in ("ours", "again"):
        again = bytelm.load(tmp_path / name)
        np.testing.assert_allclose(again.logprobs(b"a", input=INPUTS[0]), wanted, atol=1e-6)
    assert (tmp_path / "hf/model.safetensors").read_bytes() == (tmp_path / "again/model.safetensors").read_bytes()
    assert json.loads((tmp_path / "hf/config.json").read_text())["model_type"] == "mrt5"
    assert bytelm.load(tmp_path / "hf", deletion="soft").deletion == "soft"
    capsysbinary.readouterr()
    assert cli(["sample", str(tmp_path / "hf"), "--input", "hello", "--max-bytes", "4"]) == 0
    assert cli(["sample", str(tmp_path / "hf"), "--input", "hello", "--max-bytes", "4", "--beams", "2"]) == 0
    assert b"ln p / length" in capsysbinary.readouterr().err
    assert cli(["sample", str(tmp_path / "hf"), "--beams", "2"]) == 2
    text = tmp_path / "text.txt"
    text.write_text("Some text to be corrupted. " * 80)
    capsysbinary.readouterr()
    assert cli(["eval", str(tmp_path / "hf"), "--text", str(text), "--json"]) == 2  # which task?
    assert cli(["eval", str(tmp_path / "hf"), "--task", "spans", "--text", str(text), "--json"]) == 0
    record = json.loads(capsysbinary.readouterr().out)
    assert record["examples"] == 1
    assert record["task"] == "spans"
    assert 0 < record["deleted"] < 1
    assert cli(["chunks", str(tmp_path / "hf"), "--text", "naïve <b>café</b>", "--html", str(tmp_path / "k.html")]) == 0
    page = (tmp_path / "k.html").read_text()
    assert "&lt;" in page
    assert 'class="d"' in page
    assert cli(["chunks", str(tmp_path / "hf"), "--text", "naïve café"]) == 0
    assert b"deleted" in capsysbinary.readouterr().out


@pytest.mark.slow
@pytest.mark.parametrize("options", [dict(temperature=0.0), dict(temperature=0.8, top_p=0.9, seed=2)])
def test_copies_of_the_input_change_no_byte(lm, options):
    """Targets side by side, begun and not, and one alone: those of plain decoding. Guesses come from the input, too."""
    drafted = Seq2SeqLM(lm.config, lm.params, 64, draft="copy")
    inputs = [b"go on and on and on and on", *INPUTS]
    prompts = [b"go on and", b"The qu", b"", b"x"]
    want = lm.generate_batch(prompts, 40, inputs=inputs, **options)
    assert drafted.generate_batch(prompts, 40, inputs=inputs, **options) == want
    assert drafted.generate(b"", 30, input=inputs[0], **options) == lm.generate(b"", 30, input=inputs[0], **options)
    c = drafted.counts
    assert c.right <= c.drafted and (options["temperature"] or c.right > 0)
    with pytest.raises(ConfigError, match="draft="):
        Seq2SeqLM(lm.config, lm.params, 64, draft="own")


def test_rows_that_keep_about_as_many_go_together(lm):
    """A batch of many rows is finished in parts, by the bytes that they keep; each row is what it is alone."""
    rng = np.random.default_rng(0)
    inputs = [bytes(rng.integers(97, 101 + 2 * i, 30).tolist()) for i in range(11)]
    sizes = []
    finish = lm.finish_rows
    lm.finish_rows = lambda seen: (out := finish(seen), sizes.append(out.position.shape))[0]
    try:
        rows = lm.logprobs_batch([b"ab"] * 11, inputs=inputs)
        scores = lm.score_batch([b"abc"] * 11, inputs=inputs)
    finally:
        del lm.finish_rows
    assert {rows for rows, _ in sizes} == {4} and len({slots for _, slots in sizes}) > 1
    for i in (0, 5, 10):
        np.testing.assert_allclose(rows[i], lm.logprobs(b"ab", input=inputs[i]), atol=2e-5)
        np.testing.assert_allclose(scores[i].per_byte, lm.score(b"abc", input=inputs[i]).per_byte, atol=2e-5)
