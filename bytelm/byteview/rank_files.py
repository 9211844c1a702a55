"""Byte-level BPE whose merges are in the order of the tokens they make: tekken.json (Mistral) and tiktoken's files."""

import base64
import binascii
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from bytelm.byteview.pretokenizer import Pretokenizer, Split
from bytelm.byteview.segmenter import NEVER, BytePairs
from bytelm.byteview.vocabulary import Vocabulary, byte_units, usual_end
from bytelm.config import ConfigError
from bytelm.patterns import CL100K, GPT2, O200K

# What is known of a file of ranks by its name: the pattern, and special tokens.
_END = "<|endoftext|>"
_FIM = {"<|fim_prefix|>": 100258, "<|fim_middle|>": 100259, "<|fim_suffix|>": 100260, "<|endofprompt|>": 100276}
TIKTOKEN: dict[str, tuple[str, dict[str, int]]] = {
    "gpt2": (GPT2, {_END: 50256}),
    "r50k_base": (GPT2, {_END: 50256}),
    "p50k_base": (GPT2, {_END: 50256}),
    "cl100k_base": (CL100K, {_END: 100257, **_FIM}),
    "o200k_base": (O200K, {_END: 199999, "<|endofprompt|>": 200018}),
}
_LLAMA3 = {"<|begin_of_text|>": 128000, "<|end_of_text|>": 128001, "<|start_header_id|>": 128006,
           "<|end_header_id|>": 128007, "<|eom_id|>": 128008, "<|eot_id|>": 128009}  # fmt: skip
# Special tokens of tekken files that do not list them, by id.
_TEKKEN = ("<unk>", "<s>", "</s>", "[INST]", "[/INST]", "[AVAILABLE_TOOLS]", "[/AVAILABLE_TOOLS]", "[TOOL_RESULTS]",
           "[/TOOL_RESULTS]", "[TOOL_CALLS]", "[IMG]", "<pad>", "[IMG_BREAK]", "[IMG_END]", "[PREFIX]", "[MIDDLE]",
           "[SUFFIX]", "[SYSTEM_PROMPT]", "[/SYSTEM_PROMPT]", "[TOOL_CONTENT]")  # fmt: skip


def read_tekken(path: Path, *, size: int = 0, start: int | None = None, ends: Sequence[int] = ()) -> Vocabulary:
    """The vocabulary of a tekken.json. Options as for `vocabulary_of`. Raises ConfigError."""
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
        config = data["config"]
        first = config["default_num_special_tokens"]
        ranks = {base64.b64decode(row["token_bytes"]): int(row["rank"]) + first for row in data["vocab"]}
        named = {row["token_str"]: int(row["rank"]) for row in data.get("special_tokens") or ()}
        pattern, count = str(config["pattern"]), int(config["default_vocab_size"])
    except (OSError, ValueError, KeyError, TypeError) as e:
        raise ConfigError(f"{path}: cannot be read as a tekken file ({type(e).__name__}: {e})") from None
    ranks = {text: i for text, i in ranks.items() if i < count}
    controls = named or {name: i for i, name in enumerate(_TEKKEN) if i < first}
    start = controls.get("<s>") if start is None else start
    return _ranked(ranks, pattern, controls, str(path), size=max(size, count), start=start, ends=ends)


def read_tiktoken(
    path: Path, name: str = "", *, size: int = 0, start: int | None = None, ends: Sequence[int] = ()
) -> Vocabulary:
    """The vocabulary of a file of ranks (a token in base64 and its rank in every line): one of `TIKTOKEN`, by its name
    or `name`, or Llama 3's tokenizer.model. Raises ConfigError."""
    name = name or path.name.split(".")[0]
    ranks: dict[bytes, int] = {}
    try:
        for line in path.read_bytes().splitlines():
            if line.strip():
                text, rank = line.split()
                if ranks.setdefault(base64.b64decode(text, validate=True), int(rank)) != int(rank):
                    raise ValueError(f"{line!r}: a token stands there twice")
    except (OSError, ValueError, binascii.Error) as e:
        raise ConfigError(f"{path}: cannot be read as a file of ranks ({e})") from None
    if path.name == "tokenizer.model" and len(ranks) == 128000:
        pattern, controls = CL100K, _LLAMA3
        start = controls["<|begin_of_text|>"] if start is None else start
    elif name in TIKTOKEN:
        pattern, controls = TIKTOKEN[name]
    else:
        raise ConfigError(f"{path}: a file of ranks does not say how text is cut into words, and {name!r} is not known "
                          f"({', '.join(TIKTOKEN)})")  # fmt: skip
    return _ranked(ranks, pattern, controls, str(path), size=size, start=start, ends=ends)


def is_ranks(path: Path) -> bool:
    """Whether a file begins as one of ranks does."""
    with path.open("rb") as file:
        words = file.readline(1 << 12).split()
    return len(words) == 2 and words[1].isdigit()


def _ranked(
    ranks: dict[bytes, int], pattern: str, controls: dict[str, int], where: str, *, size: int, start: int | None,
    ends: Sequence[int],
) -> Vocabulary:  # fmt: skip
    if not ranks or min(ranks.values()) < 0 or max(ranks.values()) >= 1 << 24:
        raise ConfigError(f"{where}: has no tokens, or ranks that are none")
    if len(set(ranks.values())) < len(ranks):
        raise ConfigError(f"{where}: two tokens have one rank")
    count = max(size, *(i + 1 for i in ranks.values()), *(i + 1 for i in controls.values()))
    tokens: list[bytes | None] = [None] * count
    rank: list[Any] = [NEVER] * count
    special = {*controls.values(), *ends}
    for text, i in ranks.items():
        if i not in special:
            tokens[i], rank[i] = text, i
    segmenter = BytePairs(tokens, None, rank, units=byte_units(tokens))
    return Vocabulary(
        tuple(tokens), segmenter, Pretokenizer((Split(pattern),)), list(ends) or usual_end(controls, where), start,
        controls=controls, whole_pieces=True,
    )  # fmt: skip
