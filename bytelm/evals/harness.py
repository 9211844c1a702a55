"""lm-evaluation-harness (extra: eval) on any byte language model.

Importing this module registers the model type `bytelm`, so that `lm_eval.simple_evaluate(model="bytelm",
model_args="path=RUN")` finds it; or an instance is passed as `model`. `tasks` makes the tasks of local files.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from bytelm.byteview.byte_view import TokenizedLM
from bytelm.byteview.plain_tokens import PlainTokens
from bytelm.config import ConfigError
from bytelm.evals.entrants import entrants
from bytelm.lm import load
from bytelm.protocol import ByteLM
from bytelm.windows import end_of

try:
    from lm_eval.api.model import LM  # pyrefly: ignore[missing-import]
    from lm_eval.api.registry import register_model  # pyrefly: ignore[missing-import]
except ImportError:
    raise ImportError("lm-evaluation-harness needs the extra: pip install 'bytelm[eval]'") from None


@register_model("bytelm")
class HarnessLM(LM):
    """A byte LM as lm-eval asks for it: strings in, nats out. Texts without a context are scored from the start symbol
    in windows by the rolling rule."""

    def __init__(
        self, path: str = "", lm: ByteLM | None = None, view: str = "bytes", batch_size: Any = None, **options
    ):
        """`path`: what `bytelm.load` takes, with its `options`; or a model that is loaded. `view`: how a tokenized
        model is asked, by bytes or by its own tokens. `batch_size` and the like are lm-eval's, and not needed."""
        super().__init__()
        if view not in ("bytes", "tokens"):
            raise ConfigError(f"view={view!r}: choose bytes or tokens")
        if lm is None and not path:
            raise ConfigError("path: name a run, a weights directory or a tokenized model")
        if "checkpoint" in options:  # lm-eval makes a number of a step
            options["checkpoint"] = str(options["checkpoint"])
        own = {name: value for name, value in options.items() if name not in ("device", "max_batch_size")}
        known = lm if lm is not None else load(path, **own)
        if isinstance(known, TokenizedLM):
            self.lm: ByteLM = PlainTokens(known) if view == "tokens" else known
        else:
            self.lm = entrants(path or "model", known)[0].lm

    def loglikelihood(self, requests: Sequence[Any], disable_tqdm: bool = False) -> list[tuple[float, bool]]:
        """(ln p of the continuation after the context, whether each of its bytes is the most probable one)."""
        pairs = [request.args for request in requests]
        scores = self.lm.score_batch([text for _, text in pairs], [context for context, _ in pairs])
        return [(s.total, self._greedy(s.greedy, *pair)) for s, pair in zip(scores, pairs)]

    def _greedy(self, flags: Any, context: str, text: str) -> bool:
        if flags is not None:
            return bool(flags.all())
        wanted, before = text.encode(), context.encode()
        before = end_of(before, self.lm.window - len(wanted))
        return self.lm.generate(before, len(wanted), temperature=0) == wanted

    def loglikelihood_rolling(self, requests: Sequence[Any], disable_tqdm: bool = False) -> list[float]:
        return [score.total for score in self.lm.score_batch([request.args[0] for request in requests])]

    def generate_until(self, requests: Sequence[Any], disable_tqdm: bool = False) -> list[str]:
        """Greedy unless `do_sample`; up to the first of the `until` strings, which is not part of it."""
        out: list[str] = [""] * len(requests)
        groups: dict[Any, list[int]] = {}
        for n, request in enumerate(requests):
            settings = dict(request.args[1])
            until = settings.get("until") or []
            stop = tuple([until] if isinstance(until, str) else until)
            temperature = float(settings.get("temperature", 1.0)) if settings.get("do_sample") else 0.0
            most = int(settings.get("max_gen_toks", 256))
            groups.setdefault((stop, temperature, most, float(settings.get("top_p", 1.0))), []).append(n)
        for (stop, temperature, most, top_p), members in groups.items():
            for begin in range(0, len(members), 64):
                part = members[begin : begin + 64]
                prompts = [requests[n].args[0].encode() for n in part]
                if isinstance(self.lm, TokenizedLM):  # others go on from what they see of a long prompt
                    room = max(self.lm.window - most, self.lm.window // 2)
                    most, prompts = min(most, self.lm.window - room), [end_of(p, room) for p in prompts]
                written = self.lm.generate_batch(prompts, most, temperature=temperature, top_p=top_p,
                                                 stop=[s for s in stop if s])  # fmt: skip
                for n, text in zip(part, written):
                    out[n] = text.decode("utf-8", "replace")
        return out


def bpb_task(name: str, files: Sequence[str | Path]) -> dict[str, Any]:
    """An lm-eval task: bits per byte of text files, a document each."""
    return {
        "task": name, "dataset_path": "text", "output_type": "loglikelihood_rolling", "test_split": "test",
        "dataset_kwargs": {"data_files": {"test": [str(Path(f).resolve()) for f in files]}, "sample_by": "document",
                           "keep_linebreaks": True},
        "doc_to_text": "", "doc_to_target": "{{text}}",
        "metric_list": [{"metric": m} for m in ("bits_per_byte", "byte_perplexity", "word_perplexity")],
    }  # fmt: skip


def _hellaswag_docs(dataset: Any) -> Any:
    from bytelm.evals.hellaswag import item_of

    def one(record: Mapping[str, Any]) -> dict[str, Any]:
        item = item_of(record, 0)
        return {"query": item.context, "choices": list(item.endings), "gold": item.answer}

    return dataset.map(one)


def hellaswag_task(name: str, file: str | Path) -> dict[str, Any]:
    """An lm-eval task: HellaSwag from a JSONL file in the published format."""
    return {
        "task": name, "dataset_path": "json", "output_type": "multiple_choice", "test_split": "test",
        "dataset_kwargs": {"data_files": {"test": str(Path(file).resolve())}},
        "process_docs": _hellaswag_docs,
        "doc_to_text": "{{query}}", "doc_to_target": "{{gold}}", "doc_to_choice": "{{choices}}",
        "metric_list": [{"metric": m, "aggregation": "mean", "higher_is_better": True}
                        for m in ("acc", "acc_norm", "acc_bytes")],
    }  # fmt: skip
