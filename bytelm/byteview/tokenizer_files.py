"""The tokenizer in a model's folder, whatever file it is in, and which tokens start and end a text."""

import dataclasses
import hashlib
import json
from pathlib import Path
from typing import Any

from bytelm.byteview.rank_files import is_ranks, read_tekken, read_tiktoken
from bytelm.byteview.sentencepiece_file import read_sentencepiece
from bytelm.byteview.tokenizer_json import read_tokenizer_json, read_vocab_and_merges, vocabulary_of
from bytelm.byteview.vocabulary import Vocabulary
from bytelm.config import ConfigError
from bytelm.patterns import GPT2, QWEN2

# Files that hold a tokenizer, the one that says most first; the last two are halves of one.
FILES = ("tokenizer.json", "tokenizer.model", "tekken.json", "*.tiktoken", "vocab.json", "encoder.json")
_MERGES = {"vocab.json": "merges.txt", "encoder.json": "vocab.bpe"}
_WORDS = {"gpt2": (GPT2, ""), "qwen2": (QWEN2, "NFC"), "qwen3": (QWEN2, "NFC")}  # by model_type


def read_vocabulary(folder: Path, record: dict[str, Any]) -> Vocabulary:
    """The vocabulary of a folder whose config.json is `record`. Raises ConfigError for what is missing, cannot be read,
    or has no byte view."""
    files = [path for name in FILES for path in sorted(folder.glob(name))]
    if not files:
        raise ConfigError(f"{folder}: no tokenizer beside the weights (looked for {', '.join(FILES)})")
    options = token_ids(record)
    size = options["size"]
    found = _read(files[0], record, options)
    if len(found.tokens) > size:
        raise ConfigError(f"{files[0]}: {len(found.tokens)} tokens, but the model has {size} (config.json, vocab_size)")
    if found.start is None:
        found = _with_start(found, folder)
    return found


RUN_TOKENIZER = "tokenizer.json"  # in the folder of a run whose model reads tokens


def run_tokenizer(path: Path) -> Path | None:
    """The tokenizer of a run whose model reads tokens, given the run's folder or one of its checkpoints; None where
    there is none."""
    path = path.resolve()
    run = path.parent.parent if path.parent.name in ("checkpoints", "best") else path
    found = run / RUN_TOKENIZER
    return found if found.is_file() and (run / "config.yaml").is_file() else None


def tokenizer_hash(path: Path) -> str:
    """What a checkpoint remembers of the tokenizer that its weights belong to."""
    return hashlib.sha256(path.read_bytes()).hexdigest()


def vocabulary_in(path: Path, size: int = 0) -> Vocabulary:
    """The vocabulary of a tokenizer.json by itself, with room for `size` tokens: a text begins with the symbol that
    ends one, where it has none to begin it. Raises ConfigError for what cannot be read, or has no byte view."""
    found = vocabulary_of(read_tokenizer_json(path), size=size)
    starts = [found.controls[name] for name in ("<s>", "<bos>", "<|begin_of_text|>") if name in found.controls]
    return dataclasses.replace(found, start=starts[0] if starts else found.ends[0])


def _read(path: Path, record: dict[str, Any], options: dict[str, Any]) -> Vocabulary:
    if path.name == "tokenizer.json":
        return vocabulary_of(read_tokenizer_json(path), **options)
    if path.name == "tekken.json":
        return read_tekken(path, **options)
    if path.suffix == ".tiktoken" or is_ranks(path):
        return read_tiktoken(path, **options)
    if path.name == "tokenizer.model":
        return read_sentencepiece(path, **options)
    kind = record.get("model_type")
    if kind not in _WORDS:
        raise ConfigError(f"{path}: does not say how text is cut into words, which is known for {', '.join(_WORDS)} "
                          "only: a tokenizer.json says it")  # fmt: skip
    data = read_vocab_and_merges(path, path.parent / _MERGES[path.name], *_WORDS[kind])
    more = _tokenizer_config(path.parent).get("added_tokens_decoder") or {}
    data["added_tokens"] += [{"id": int(i), **token} for i, token in more.items()]
    return vocabulary_of(data, **options)


def token_ids(record: dict[str, Any]) -> dict[str, Any]:
    """What a config.json says of a model's ids: how many, and which start and end a text (None: it does not say)."""
    end = record.get("eos_token_id")
    ends = end if isinstance(end, list) else [] if end is None else [end]
    start = record.get("bos_token_id")
    if not all(isinstance(i, int) for i in [*ends, 0 if start is None else start]):
        raise ConfigError(f"config.json: bos_token_id={start!r} and eos_token_id={end!r} must be ids")
    return {"size": record.get("vocab_size", 0), "start": start, "ends": ends}


def read_chat_template(folder: Path) -> str:
    """The template by which a folder's model is asked in chats; empty where it has none. Raises ConfigError."""
    alone = folder / "chat_template.jinja"
    if alone.exists():
        return alone.read_text(encoding="utf-8")
    found = _tokenizer_config(folder).get("chat_template") or ""
    if isinstance(found, list):  # several, by name
        found = {one.get("name"): one.get("template", "") for one in found}.get("default", "")
    return found


def _tokenizer_config(folder: Path) -> dict[str, Any]:
    path = folder / "tokenizer_config.json"
    try:
        found = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}
    except (OSError, ValueError) as e:
        raise ConfigError(f"{path}: cannot be read as JSON ({e})") from None
    if not isinstance(found, dict):
        raise ConfigError(f"{path}: not a JSON object")
    return found


def _with_start(vocabulary: Vocabulary, folder: Path) -> Vocabulary:
    """With the start symbol that tokenizer_config.json names; where it names none, the symbol between documents, which
    is the one that ends them."""
    name = _tokenizer_config(folder).get("bos_token")
    name = name.get("content") if isinstance(name, dict) else name
    start = vocabulary.control(name) if name else vocabulary.ends[0]
    return dataclasses.replace(vocabulary, start=start)
