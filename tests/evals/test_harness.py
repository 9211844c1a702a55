"""lm-evaluation-harness and our own suites give the same numbers (needs the extra `eval`)."""

import json
import math

import pytest

import bytelm

lm_eval = pytest.importorskip("lm_eval", reason="needs lm-eval: install the extra `eval`")
pytestmark = pytest.mark.slow

from lm_eval.api.task import ConfigurableTask  # noqa: E402

from bytelm.evals import hellaswag  # noqa: E402
from bytelm.evals.bpb import bits_per_byte  # noqa: E402
from bytelm.evals.choices import ask  # noqa: E402
from bytelm.evals.harness import HarnessLM, bpb_task, hellaswag_task  # noqa: E402
from bytelm.lm import NetworkLM  # noqa: E402
from bytelm.train.loop import train  # noqa: E402
from models import uniform  # noqa: E402
from tiny import flat, network, run_config  # noqa: E402


class Request:
    def __init__(self, *args):
        self.args = args


@pytest.fixture
def files(tmp_path, monkeypatch):
    monkeypatch.setenv("HF_DATASETS_OFFLINE", "1")
    monkeypatch.setenv("HF_HOME", str(tmp_path / "hf"))
    texts = [tmp_path / f"{n}.txt" for n in range(3)]
    for n, file in enumerate(texts):
        file.write_text(f"Eine naïve Zeile, the {n}th.\nAnd another.\n" * (n + 2), encoding="utf-8")
    items = [
        {"ind": n, "activity_label": "Baking", "ctx_a": f"A man [step] bakes {n} loaves.", "ctx_b": "he",
         "endings": [f"eats {e} {n}  [title] née" for e in ("it", "them all", "x", "none of these")],
         "label": str(n % 4)}
        for n in range(20)
    ]  # fmt: skip
    (tmp_path / "hs.jsonl").write_text("".join(json.dumps(item) + "\n" for item in items))
    return texts, tmp_path / "hs.jsonl"


def evaluate(lm, texts, jsonl):
    tasks = [ConfigurableTask(config=hellaswag_task("hs", jsonl)), ConfigurableTask(config=bpb_task("text", texts))]
    found = lm_eval.simple_evaluate(model=HarnessLM(lm=lm), tasks=tasks, bootstrap_iters=0)["results"]
    return {name.removesuffix(",none"): v for task in found.values() for name, v in task.items() if ",none" in name}


def test_same_numbers_as_our_suites(files):
    config = flat()
    lm = NetworkLM(config, network(config, scale=3.0)[1], 64)
    found = evaluate(lm, *files)
    texts = [file.read_bytes() for file in files[0]]
    ours = bits_per_byte(lambda group: [-s.total for s in lm.score_batch(group)], texts, lm.window)
    assert found["bits_per_byte"] == pytest.approx(ours.bpb, abs=1e-6)
    choices = ask(lm, hellaswag.hellaswag_questions(hellaswag.read_hellaswag(files[1]), "clean"))
    for name, by in (("acc", "sum"), ("acc_norm", "characters"), ("acc_bytes", "bytes")):
        assert found[name] == choices.right(by).mean()


def test_same_numbers_of_a_trained_run_by_name(files, tmp_path):
    """As `--model bytelm --model_args path=...,checkpoint=...` asks for it: a step comes as a number."""
    run = tmp_path / "run"
    train(run_config(run, steps=6))
    tasks = [ConfigurableTask(config=bpb_task("text", files[0]))]
    found = lm_eval.simple_evaluate(model="bytelm", model_args=f"path={run},checkpoint=6", tasks=tasks,
                                    bootstrap_iters=0, batch_size=1)["results"]["text"]  # fmt: skip
    lm, texts = bytelm.load(run), [file.read_bytes() for file in files[0]]
    ours = bits_per_byte(lambda group: [-s.total for s in lm.score_batch(group)], texts, lm.window)
    assert found["bits_per_byte,none"] == pytest.approx(ours.bpb, abs=1e-6)


def test_a_tokenized_model_by_bytes(files, root):
    """Long prompts are cut between characters, and greedy continuations are those that are generated."""
    lm = bytelm.load(root / "tests/golden/convert/model_tiny_lm")
    harness = HarnessLM(lm=lm)
    long = "漢字 naïve " * lm.window
    (written,) = harness.generate_until([Request(long, {"until": [], "max_gen_toks": 4})])
    assert isinstance(written, str)
    for context, text in (
        ("The ", "quick"),
        ("The ", lm.generate("The ", 5, temperature=0).decode("utf-8", "replace")),
    ):
        shared = harness.loglikelihood([Request(context, text), Request(context, "other")])[0]
        (alone,) = harness.loglikelihood([Request(context, text)])
        assert shared[0] == pytest.approx(alone[0], abs=1e-4) and shared[1] == alone[1]


def test_uniform_has_eight_bits(files):
    assert evaluate(uniform(), *files)["bits_per_byte"] == pytest.approx(8, abs=1e-9)


def test_greedy_and_generation(files):
    """A continuation counts as greedy exactly where it is what is generated, and stop strings are cut off."""
    config = flat()
    lm = NetworkLM(config, network(config, scale=3.0)[1], 64)
    harness, context = HarnessLM(lm=lm), "The quick "
    written = harness.generate_until([Request(context, {"until": [], "max_gen_toks": 12})])[0]
    likely = lm.generate(context, 12, temperature=0)
    assert written == likely.decode("utf-8", "replace")
    total, greedy = harness.loglikelihood([Request(context, " brown")])[0]
    assert total == pytest.approx(lm.score(" brown", context).total) and not greedy
    assert math.isfinite(total)
