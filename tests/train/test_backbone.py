"""A backbone out of a tokenized model: the same blocks, frozen for some steps, then trained; what does not fit."""

import dataclasses
import itertools
import json
import shutil
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from safetensors.numpy import load_file

import bytelm
from bytelm.config import ConfigError, MeshConfig, TrainConfig
from bytelm.data.sources import open_corpus
from bytelm.data.words import split_bytes
from bytelm.interop import token_lm
from bytelm.interop.backbone import open_blocks
from bytelm.interop.published import open_tensors, read_record
from bytelm.lm import load_vocabulary
from bytelm.metrics import read_metrics
from bytelm.models.build import init_params
from bytelm.models.token_lm import token_structure
from bytelm.nn.stack import Stack
from bytelm.parallel.mesh import make_mesh
from bytelm.train.init import load_parts, with_parts
from bytelm.train.loop import train
from bytelm.train.state import plan_state
from bytelm.train.word_reader import Words, teach_words
from tiny import flat, hat, run_config

GOLDEN = Path(__file__).resolve().parent.parent / "golden/convert"
LLAMA = GOLDEN / "model_tiny_sp"


def test_the_blocks_say_the_same():
    """Stack between the tokenized model's embedding and head: its logits."""
    stack, read = open_blocks(LLAMA)
    assert (stack.layout, stack.d_model, stack.num_kv_heads, stack.head_width) == ("T2", 128, 2, 32)
    blocks = Stack(stack, std=0.02, dtype="float32", rngs=nnx.Rngs(0), closing_norm=False)
    found = read()
    nnx.update(blocks, found.params)
    config = token_lm.config_from(read_record(LLAMA), "x")
    graph, abstract = token_structure(config)
    tensors = open_tensors(LLAMA / "model.safetensors")
    model = nnx.merge(graph, token_lm.params_from(tensors, config, abstract, "x"))
    ids = jnp.asarray(np.random.default_rng(0).integers(0, config.vocabulary, (2, 17)), jnp.int32)
    weights = load_file(LLAMA / "model.safetensors")
    table = weights["model.embed_tokens.weight"]
    assert found.embedding_size == pytest.approx(np.sqrt((table**2).mean()), rel=1e-5)
    np.testing.assert_array_equal(found.norm, weights["model.norm.weight"])
    r = np.asarray(blocks(jnp.asarray(table[np.asarray(ids)])), np.float64)
    r = r / np.sqrt((r**2).mean(-1, keepdims=True) + config.norm_eps) * weights["model.norm.weight"]
    np.testing.assert_allclose(r @ table.T.astype(np.float64), model(ids), atol=2e-5)


@pytest.mark.slow
def test_frozen_then_trained(tmp_path):
    model, name = hat(), "backbone"
    run = tmp_path / "run"
    config = dataclasses.replace(
        run_config(run, steps=4, train={"backbone": str(LLAMA)}, optim={"freeze": ((f"^{name}/", 2),)},
                   checkpoint={"every": 2, "keep": 3}), model=model,
    )  # fmt: skip
    train(config)
    blocks = open_blocks(LLAMA)[1]()
    own = blocks.params
    after2 = bytelm.load(run, checkpoint="2").params
    jax.tree.map(np.testing.assert_array_equal, after2[name], own)
    end = bytelm.load(run)
    assert getattr(end.config, name).layout == "T2" and getattr(end.config, name).d_mlp == 256
    moved = [float(np.abs(a - b).max()) for a, b in zip(jax.tree.leaves(end.params[name]), jax.tree.leaves(own))]
    assert min(moved) > 0
    before = init_params(end.config, jax.random.key(0))
    assert np.abs(np.asarray(after2["embed"]["table"]) - before["embed"]["table"]).max() > 0
    with jax.set_mesh(make_mesh(MeshConfig())):
        setup = plan_state(dataclasses.replace(config, model=end.config), jax.sharding.get_mesh())
    placed = jax.tree.map(lambda x, a: jax.device_put(x, a.sharding), before, setup.abstract["params"])
    fresh, cost = load_parts(dataclasses.replace(config, model=end.config), setup.abstract["params"], placed, ())
    assert cost == {}
    network = nnx.merge(setup.graph, fresh)
    words, units = network.words(jnp.asarray([[192, *b"A text of words, some longer than others."]], jnp.int32))
    size = np.sqrt((np.asarray(words)[0, : int(units.begins.sum())] ** 2).mean())
    assert size == pytest.approx(blocks.embedding_size, rel=0.5)
    guides = np.asarray(fresh["guide"]["layer"]["norm"]["scale"])
    np.testing.assert_allclose(
        guides / guides[0, 0], np.broadcast_to(blocks.norm / blocks.norm[0], guides.shape), rtol=1e-5
    )
    o = np.asarray(network.backbone(words), np.float64)[0, : int(units.begins.sum())]
    normed = o / np.sqrt((o**2).mean(-1, keepdims=True)) * guides[0]
    assert np.sqrt((normed**2).mean()) == pytest.approx(1, rel=0.2)  # over another text


def reader_config(tmp_path, **sections):
    (tmp_path / "t.txt").write_text("The license and the terms of the license, naïve or not; " * 30)
    data = {"train": (str(tmp_path / "t.txt"),), "valid": (str(tmp_path / "t.txt"),), "seq_len": 48}
    train = {"backbone": str(LLAMA), "word_steps": 60}
    return with_parts(
        dataclasses.replace(run_config(tmp_path / "run", data=data, train=train, **sections), model=hat())
    )


def test_words_are_the_mean_of_their_tokens(tmp_path):
    config, blocks = reader_config(tmp_path), open_blocks(LLAMA)[1]()
    vocabulary = load_vocabulary(LLAMA)
    words = Words(config, [open_corpus(config.data.train)], vocabulary, blocks.embeddings)
    inputs, wanted, known = words.draw()
    for row in range(len(inputs)):
        text = bytes(inputs[row, 1:].tolist())
        starts = split_bytes(text, config.model.rule, config.model.max_word).tolist()
        assert np.flatnonzero(known[row]).tolist() == [b + 1 if b else 0 for b in starts[:-1]]
        for a, b in itertools.pairwise(starts):
            ids = vocabulary.encode(text[a:b].removeprefix(b" "))  # the tokenizer puts the space in front
            np.testing.assert_allclose(wanted[row, a + 1 if a else 0], blocks.embeddings[ids].mean(0), rtol=1e-6)
    assert words.embedding(b"\xff\xfe") is None


@pytest.mark.slow
def test_a_taught_word_reader(tmp_path):
    """It comes near the embeddings, the rest of the parameters stay, and a run does it once, at its start."""
    config, blocks = reader_config(tmp_path), open_blocks(LLAMA)[1]()
    params = init_params(config.model, jax.random.key(0))
    params["backbone"] = blocks.params
    before = jax.tree.map(np.asarray, params)
    sources = [open_corpus(config.data.train)]
    taught, error, flops = teach_words(config, params, blocks, load_vocabulary(LLAMA), sources)
    assert error < 0.5 and flops > 0
    moved = {name: max(float(np.abs(np.asarray(a) - b).max()) for a, b in zip(jax.tree.leaves(taught[name]),
             jax.tree.leaves(before[name]))) for name in before}  # fmt: skip
    assert {name for name, by in moved.items() if by > 0} == {"embed", "encoder", "pool"}
    config = dataclasses.replace(config, train=dataclasses.replace(config.train, steps=2, word_steps=3))
    train(config)
    train(dataclasses.replace(config, train=dataclasses.replace(config.train, steps=3)))
    starts = [r for r in read_metrics(tmp_path / "run/metrics.jsonl") if r.get("event") == "start"]
    assert ["word_error" in r for r in starts] == [True, False]
    with pytest.raises(ConfigError, match="train.word_steps=3: words are taught what train.backbone"):
        TrainConfig(word_steps=3)


@pytest.mark.slow
def test_what_a_whole_run_leaves_as_it_is_costs_no_gradient(tmp_path):
    """The same losses as where it is only held for as long, and the parameters are those that it began with."""
    losses = []
    for steps in (3, 6):
        optim = {"freeze": (("^(embed|encoder|pool|backbone)/", 3),), "schedule": "constant"}
        config = run_config(tmp_path / f"{steps}", steps=steps, checkpoint={"every": 3, "keep": 3}, optim=optim)
        train(dataclasses.replace(config, model=hat()))
        records = read_metrics(tmp_path / f"{steps}/metrics.jsonl")
        losses.append([r["loss"] for r in records if "loss" in r and r["step"] <= 3])
    np.testing.assert_allclose(losses[0], losses[1], rtol=1e-6)
    first, later = (bytelm.load(tmp_path / "6", checkpoint=c).params for c in ("3", "6"))
    same = jax.tree.map(lambda a, b: bool((np.asarray(a) == np.asarray(b)).all()), first, later)
    assert not any(jax.tree.leaves(same["encoder"]))
    jax.tree.map(np.testing.assert_array_equal, first["backbone"], bytelm.load(tmp_path / "3").params["backbone"])


def test_what_does_not_fit(tmp_path):
    def attempt(model, source, **sections):
        config = run_config(tmp_path / "run", train={"backbone": str(source)}, **sections)
        train(dataclasses.replace(config, model=model))

    with pytest.raises(ConfigError, match="learned positions or no gate"):
        attempt(hat(), GOLDEN / "model_tiny_lm")
    with pytest.raises(ConfigError, match="only a HAT has such a backbone, not flat"):
        attempt(flat(), LLAMA)
    with pytest.raises(ConfigError, match=r"train.backbone=.*: holds no tokenized model"):
        attempt(hat(), tmp_path)
    with pytest.raises(ConfigError, match=r"optim.freeze: 'nothing' matches no parameter"):
        attempt(hat(), LLAMA, optim={"freeze": (("nothing", 3),)})
    shutil.copytree(LLAMA, tmp_path / "qwen")
    record = json.loads((LLAMA / "config.json").read_text())
    (tmp_path / "qwen/config.json").write_text(json.dumps({**record, "attention_bias": True}))
    with pytest.raises(ConfigError, match="its blocks have biases"):
        attempt(hat(), tmp_path / "qwen")
