"""Published H-Net checkpoints: every key of every size, files written by torch.save, hostile ones, and the way back."""

import collections
import io
import json
import pickle
import shutil
import zipfile

import jax
import numpy as np
import pytest
from safetensors.numpy import load_file

import bytelm
from bytelm import codec
from bytelm.checkpoint import CheckpointError
from bytelm.cli import run as cli
from bytelm.config import ConfigError
from bytelm.interop import hnet as reference
from bytelm.interop.published import SafetensorsFile, expected_shapes, open_model, open_tensors
from bytelm.interop.torch_file import TorchFile
from bytelm.models.build import count_parameters, init_params, structure
from bytelm.parallel.rules import path_string
from tiny import hnet

SIZES = {"1stage_L": 679_405_312, "1stage_XL": 1_270_833_920, "2stage_L": 874_315_264, "2stage_XL": 1_603_492_224,
         "2stage_XL_chinese": 1_755_285_888, "2stage_XL_code": 1_654_090_112}  # fmt: skip


def table(root, name):
    lines = (root / f"tests/golden/hnet_state_dicts/hnet_{name}.tsv").read_text().splitlines()
    return {key: (tuple(map(int, shape.split("x"))), dtype) for key, shape, dtype in (ln.split("\t") for ln in lines)}


@pytest.mark.parametrize("name", SIZES)
def test_every_key_and_shape_of_the_published_sizes(root, name):
    """From our YAML to the reference's config and back, and each tensor of the state dict."""
    config = codec.load(root / f"configs/hnet_{name}.yaml").model
    assert count_parameters(structure(config)[1]) == SIZES[name]
    wanted = table(root, name)
    assert expected_shapes(config) == {key: shape for key, (shape, _) in wanted.items()}
    assert {key for key, (_, dtype) in wanted.items() if dtype == "float32"} == {
        key for key in wanted if reference.keeps_float32(key)
    }
    record = json.loads(json.dumps(reference.reference_config(config)))
    again = reference.config_from(record)
    assert expected_shapes(again) == expected_shapes(config) and again.targets == config.targets
    assert [again.stack(0, "encoder").window, again.stack(0, "encoder").rotary] == [1024, 32]


@pytest.mark.parametrize("name", SIZES)
def test_torch_files_of_every_published_architecture(root, name):
    """Written by torch.save with the whole key list; tensor i is a known view of one storage (see the script)."""
    folder = root / "tests/golden/hnet_pt"
    tensors = open_tensors(folder / f"hnet_{name}.pt")
    published = table(root, name)
    assert list(tensors) == list(published)
    pool = (np.arange(40000) % 251 / 64 - 2).astype(np.float32)
    for i, (key, value) in enumerate(tensors.items()):
        offset = 37 * i % 997
        want = pool[offset : offset + value.size].astype(value.dtype).reshape(value.shape)
        np.testing.assert_array_equal(value, want, err_msg=key)
        assert value.dtype.name == published[key][1] and value.ndim == len(published[key][0])
    stored = open_model(folder / f"hnet_{name}.pt", folder / f"hnet_{name}.json")
    params = stored.read()
    shapes = {path_string(p): x.shape for p, x in jax.tree.leaves_with_path(structure(stored.config)[1])}
    assert {path_string(p): x.shape for p, x in jax.tree.leaves_with_path(params)} == shapes
    assert all(x.dtype == np.float32 for x in jax.tree.leaves(params)) and stored.context == 8192


def published_folder(root, tmp_path, pt=True):
    folder = tmp_path / "hnet"
    folder.mkdir()
    golden = root / "tests/golden"
    if pt:
        shutil.copy(golden / "hnet_pt/small.pt", folder / "anything.pt")
    else:
        shutil.copy(golden / "hnet_batch3_ragged/weights.safetensors", folder / "model.safetensors")
    shutil.copy(golden / "hnet_pt/small.json", folder / "config.json")
    return folder


def test_load_from_pt_and_safetensors(root, tmp_path):
    """A bfloat16 .pt and the float32 safetensors of the same model: all weights equal to bfloat16's rounding."""
    a = bytelm.load(published_folder(root, tmp_path))
    b = bytelm.load(root / "tests/golden/hnet_pt/small.pt", config=root / "tests/golden/hnet_pt/small.json")
    weights = load_file(root / "tests/golden/hnet_batch3_ragged/weights.safetensors")
    (tmp_path / "st").mkdir()
    c = bytelm.load(published_folder(root, tmp_path / "st", pt=False))
    exact = reference.state_dict(jax.tree.map(np.asarray, c.params), c.config)
    rounded = reference.state_dict(jax.tree.map(np.asarray, a.params), a.config)
    for key, value in weights.items():
        np.testing.assert_array_equal(exact[key], value)
        np.testing.assert_allclose(rounded[key], value, rtol=2**-8)
    assert a.window == 8192 and a.score("abc").total == b.score("abc").total
    assert a.score("abc").total == pytest.approx(c.score("abc").total, abs=0.2)
    io_ = load_file(root / "tests/golden/hnet_batch3_ragged/io.safetensors")
    row = io_["input_ids"][0].astype(np.uint8)
    assert row[0] == 254
    logits = io_["logits"][0, :-1].astype(np.float64)
    logits[:, 254] = -np.inf  # BOS cannot follow; 255 is the end of text
    logs = logits - np.log(np.exp(logits).sum(-1, keepdims=True))
    score = c.score(row[1:].tobytes())
    np.testing.assert_allclose(score.per_byte, logs[np.arange(len(row) - 1), row[1:]], atol=1e-4)


def test_convert_both_ways(root, tmp_path, capsys):
    source = published_folder(root, tmp_path, pt=False)
    assert cli(["convert", str(source), str(tmp_path / "ours")]) == 0
    assert cli(["convert", str(tmp_path / "ours"), str(tmp_path / "back"), "--to", "hnet"]) == 0
    want, got = load_file(source / "model.safetensors"), load_file(tmp_path / "back/model.safetensors")
    assert want.keys() == got.keys()
    for key in want:
        np.testing.assert_array_equal(got[key], want[key])
    record, original = (json.loads((f / "config.json").read_text()) for f in (tmp_path / "back", source))
    assert record == original | {"d_intermediate": record["d_intermediate"]}
    assert reference.config_from(record) == reference.config_from(original)
    assert cli(["convert", str(source), str(tmp_path / "half"), "--to", "hnet", "--dtype", "bfloat16"]) == 0
    half = SafetensorsFile(tmp_path / "half/model.safetensors")
    kinds = {key: half[key].dtype.name for key in half}
    assert {k for k, v in kinds.items() if v == "float32"} == {k for k in kinds if reference.keeps_float32(k)}
    assert cli(["convert", str(root / "tests/golden/hnet_pt/small.pt"), str(tmp_path / "no")]) == 2
    assert "--config" in capsys.readouterr().err


def test_what_the_reference_cannot_express_is_refused(tmp_path):
    config = hnet(1, d_mlp=(128,))  # heads of 8 channels
    with pytest.raises(ConfigError, match="head_dim=8"):
        reference.reference_config(config)
    assert count_parameters(init_params(config, jax.random.key(0))) > 0


@pytest.mark.parametrize(
    "change,message",
    [
        (lambda r: r.pop("attn_cfg"), "attn_cfg"), (lambda r: r.update(arch_layout=["m1", "T1"]), "arch_layout"),
        (lambda r: r.update(vocab_size=512), "vocab_size=512"), (lambda r: r.update(d_model=[32]), "d_model"),
        (lambda r: r["ssm_cfg"].update(d_state=[16, 8, 8]), "d_state"),
        (lambda r: r.update(d_model=[64, 32, 64]), "narrower"),
        (lambda r: r.update(d_model=[64, 64, 64]), "has shape"), (lambda r: r.update(d_model=[32.0, 32, 64]), "whole"),
        (lambda r: r.update(d_intermediate=[0, 0, float("inf")]), "whole"),
        (lambda r: r.update(d_intermediate=[0, 0, 0]), "d_intermediate of stage 2 is 0"),
        (lambda r: r["attn_cfg"].update(rotary_emb_dim=[16, 16, 0]), "rotary_emb_dim of stage 2 is 0"),
        (lambda r: r.update(arch_layout=["m100000000", ["T1"], "m1"]), "9,999"),
    ],
)  # fmt: skip
def test_broken_configs_are_named(root, tmp_path, change, message):
    folder = published_folder(root, tmp_path)
    record = json.loads((folder / "config.json").read_text())
    change(record)
    (folder / "config.json").write_text(json.dumps(record))
    with pytest.raises((ConfigError, CheckpointError), match=message):
        bytelm.load(folder)


def test_folders_without_one_file_of_weights(root, tmp_path):
    folder = published_folder(root, tmp_path)
    shutil.copy(folder / "anything.pt", folder / "second.pt")
    with pytest.raises(CheckpointError, match="anything.pt, second.pt"):
        bytelm.load(folder)
    (folder / "anything.pt").unlink()
    (folder / "second.pt").unlink()
    with pytest.raises(CheckpointError, match="found: none"):
        bytelm.load(folder)


# Hostile and damaged files


def pt(path, pickled, **members):
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("x/data.pkl", pickled)
        archive.writestr("x/data/0", b"\0" * 64)
        for name, content in members.items():
            archive.writestr(f"x/{name}", content)
    return path


class _Global:
    """Pickles as the class module.name, and as a call of it with `arguments`."""

    def __init__(self, module, name, *arguments):
        self.module, self.name, self.arguments = module, name, arguments


class _Pickler(pickle._Pickler):
    """Writes calls by name without importing them, and storages the way torch does."""

    def save(self, thing, save_persistent_id=True):
        if isinstance(thing, _Global) and not thing.arguments:
            self.write(b"c" + f"{thing.module}\n{thing.name}\n".encode())
        elif isinstance(thing, _Global):
            self.save(_Global(thing.module, thing.name))
            self.save(tuple(thing.arguments))
            self.write(pickle.REDUCE)
        elif isinstance(thing, _State):
            self.save(thing.thing)
            self.save(thing.state)
            self.write(pickle.BUILD)
        elif isinstance(thing, _Storage):
            self.save(("storage", _Global("torch", thing.kind), thing.key, "cpu", thing.size))
            self.write(pickle.BINPERSID)
        else:
            super().save(thing, save_persistent_id)


class _Storage:
    def __init__(self, kind="FloatStorage", key="0", size=16):
        self.kind, self.key, self.size = kind, key, size


def pickled(thing):
    out = io.BytesIO()
    _Pickler(out, protocol=2).dump(thing)
    return out.getvalue()


def tensor(*arguments, storage=None):
    return _Global("torch._utils", "_rebuild_tensor_v2", storage or _Storage(), *arguments)


def test_a_file_made_by_hand_reads(tmp_path):
    """The same maker as below, harmless: with an ordered dict, a parameter, a view with strides, omegaconf on board."""
    content = collections.OrderedDict(
        a=tensor(1, (2, 3), (1, 2), False, _Global("collections", "OrderedDict", ())),
        b=_Global("torch._utils", "_rebuild_parameter", tensor(0, (4,), (1,), False, {}), False, {}),
    )
    numbers = np.arange(16, dtype=np.float32)
    path = tmp_path / "x.pt"
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("x/data.pkl", pickled(dict(content)))
        archive.writestr("x/data/0", numbers.tobytes())
    file = TorchFile(path)
    np.testing.assert_array_equal(file["a"], [[1, 3, 5], [2, 4, 6]])
    np.testing.assert_array_equal(file["b"], numbers[:4])
    assert not file["b"].flags.writeable and file.describe() == {"a": (2, 3), "b": (4,)}
    nested = {"state_dict": dict(content), "config": _Global("omegaconf.listconfig", "ListConfig", [1, 2])}
    assert set(TorchFile(pt(tmp_path / "y.pt", pickled(nested)))) == {"a", "b"}


@pytest.mark.parametrize(
    "module,name,arguments",
    [
        ("os", "system", ("touch PWNED",)), ("posix", "system", ("touch PWNED",)),
        ("builtins", "eval", ("open('PWNED', 'w')",)), ("builtins", "getattr", (object, "__class__")),
        ("subprocess", "Popen", (["touch", "PWNED"],)), ("torch", "load", ("x",)),
        ("torch._utils", "_rebuild_tensor", ()),
        ("numpy.core.multiarray", "_reconstruct", (1,)), ("bytelm.interop.torch_file", "TorchFile", ("x",)),
        ("omegaconfx", "ListConfig", (1,)), ("collections", "namedtuple", ("a", "b")),
    ],
)  # fmt: skip
def test_nothing_in_a_hostile_pickle_runs(tmp_path, monkeypatch, module, name, arguments):
    monkeypatch.chdir(tmp_path)
    for thing in ({"a": _Global(module, name, *arguments)}, {"a": _Global(module, name)}):
        with pytest.raises(CheckpointError, match="refused: it names"):
            TorchFile(pt(tmp_path / "x.pt", pickled(thing)))
    assert not (tmp_path / "PWNED").exists()


@pytest.mark.parametrize(
    "thing",
    [
        {"a": tensor(0, (17,), (1,))}, {"a": tensor(9, (4, 2), (2, 1))}, {"a": tensor(-1, (2,), (1,))},
        {"a": tensor(0, (2,), (-1,))}, {"a": tensor(0, (4, 4, 4), (1, 1, 0))}, {"a": tensor(0, (2**40, 2**40), (0, 0))},
        {"a": tensor(0, (True,), (1,))}, {"a": tensor(0, (2, 2), (1,))}, {"a": tensor(0, "ab", "cd")},
        {"a": tensor(0, (2,), (1,), storage="no storage")}, {"a": tensor(0, (4,), (1,), storage=_Storage(size=-3))},
        {"a": tensor(0, (4,), (1,), storage=_Storage(size=10**9))},
        {"a": tensor(0, (4,), (1,), storage=_Storage(key="../../etc/passwd"))},
        {"a": tensor(0, (4,), (1,), storage=_Storage(kind="QInt8Storage"))},
        {}, [], 3, {"a": 1}, {3: tensor(0, (4,), (1,))}, {"state_dict": {"state_dict": 1}}, {"model": None},
    ],
)  # fmt: skip
def test_malformed_descriptions_are_errors(tmp_path, thing):
    with pytest.raises(CheckpointError):
        TorchFile(pt(tmp_path / "x.pt", pickled(thing)))


class _State:
    """Pickles as a thing with a state set on it by BUILD."""

    def __init__(self, thing, state):
        self.thing, self.state = thing, state


@pytest.mark.parametrize(
    "thing",
    [
        _State(tensor(0, (4,), (1,)), {"strides": (2**40,)}),
        _State(tensor(0, (4,), (1,)), (None, {"shape": (2**30,)})),
        _State(_Storage(), {"size": 3}), _State(_Storage(), (None, {"size": 3})),
        _State(_Global("torch._utils", "_rebuild_parameter"), (None, {"__defaults__": (1,)})),
        _State(_Global("torch", "FloatStorage"), (None, {"dtype": "x"})),
        _State(_Global("collections", "OrderedDict"), (None, {"x": 1})),
    ],
)  # fmt: skip
def test_no_state_can_be_set_on_what_stands_for_torch(tmp_path, thing):
    with pytest.raises(CheckpointError):
        TorchFile(pt(tmp_path / "x.pt", pickled({"a": tensor(0, (4,), (1,)), "b": thing})))


def test_memory_bombs_are_refused(tmp_path):
    bomb = b"\x80\x02}r" + (2**31 - 1).to_bytes(4, "little") + b"."  # a memo number that asks for gigabytes
    with pytest.raises(CheckpointError):
        TorchFile(pt(tmp_path / "x.pt", bomb))
    with pytest.raises(CheckpointError, match="big-endian"):
        TorchFile(pt(tmp_path / "y.pt", pickled({"a": tensor(0, (4,), (1,))}), byteorder="little" + " " * 100))


def test_omegaconf_on_board_is_carried_and_not_looked_into(tmp_path):
    inside = _State(
        _Global("omegaconf.listconfig", "ListConfig", ()),
        {"_content": [_Global("omegaconf.nodes", "AnyNode", 1)],
         "_metadata": _Global("collections", "defaultdict", _Global("builtins", "list")),
         "type": _Global("typing", "Any")},
    )  # fmt: skip
    assert set(
        TorchFile(pt(tmp_path / "x.pt", pickled({"state_dict": {"a": tensor(0, (4,), (1,))}, "c": inside})))
    ) == {"a"}


def test_a_model_inside_itself_is_an_error(tmp_path):
    endless = {}
    endless["model"] = endless
    with pytest.raises(CheckpointError):
        TorchFile(pt(tmp_path / "x.pt", pickle.dumps(endless, 2)))


def test_damaged_files_are_errors(root, tmp_path):
    whole = (root / "tests/golden/hnet_pt/small.pt").read_bytes()
    bad = tmp_path / "x.pt"
    rng = np.random.default_rng(0)
    for cut in (0, 1, 30, len(whole) // 2, len(whole) - 10):
        bad.write_bytes(whole[:cut])
        with pytest.raises(CheckpointError):
            TorchFile(bad)
    for _ in range(60):  # a flipped byte: an error, or numbers that differ; never another exception
        data = bytearray(whole)
        data[rng.integers(len(data))] ^= 1 << rng.integers(8)
        bad.write_bytes(data)
        try:
            file = TorchFile(bad)
            for name in file:
                file[name].sum()
        except CheckpointError:
            pass
    bad.write_bytes(pickle.dumps({"a": 1}, 2))  # what torch wrote before 1.6
    with pytest.raises(CheckpointError, match="before 1.6"):
        TorchFile(bad)
    with zipfile.ZipFile(bad, "w") as archive:
        archive.writestr("x/readme.txt", "hello")
    with pytest.raises(CheckpointError, match=r"no data\.pkl"):
        TorchFile(bad)
    with zipfile.ZipFile(bad, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("x/data.pkl", pickled({"a": tensor(0, (4,), (1,))}))
        archive.writestr("x/data/0", b"\0" * 64)
    with pytest.raises(CheckpointError, match="compressed"):
        TorchFile(bad)
    with pytest.raises(CheckpointError, match="big-endian"):
        TorchFile(pt(bad, pickled({"a": tensor(0, (4,), (1,))}), byteorder="big"))
