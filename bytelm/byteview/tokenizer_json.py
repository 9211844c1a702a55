"""Hugging Face's tokenizer.json as a Vocabulary: byte-level BPE; BPE and unigram over characters with byte fallback."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import regex

from bytelm.byteview.pretokenizer import Pretokenizer, Split
from bytelm.byteview.segmenter import BytePairs, CharacterPairs, Segmenter
from bytelm.byteview.unigram import Unigram
from bytelm.byteview.vocabulary import Vocabulary, byte_units, check_added, usual_end
from bytelm.config import ConfigError
from bytelm.patterns import GPT2

SPACE = "\u2581"  # SentencePiece's sign for a space


def byte_characters() -> dict[str, int]:
    """GPT-2's table: the character that stands for each byte in a byte-level vocabulary."""
    shown = [*range(33, 127), *range(161, 173), *range(174, 256)]
    hidden = [b for b in range(256) if b not in shown]
    return {chr(b): b for b in shown} | {chr(256 + n): b for n, b in enumerate(hidden)}


def read_tokenizer_json(path: Path) -> dict[str, Any]:
    """The file's contents. Raises ConfigError for what is no tokenizer.json."""
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, json.JSONDecodeError) as e:
        raise ConfigError(f"{path}: cannot be read as a tokenizer ({e})") from None
    if not isinstance(data, dict) or not isinstance(data.get("model"), dict) or "vocab" not in data["model"]:
        raise ConfigError(f"{path}: is no tokenizer.json (it has no model with a vocabulary)")
    return data


def read_vocab_and_merges(vocab: Path, merges: Path, pattern: str, normal: str = "") -> dict[str, Any]:
    """vocab.json and merges.txt (GPT-2's encoder.json and vocab.bpe) in the form of a tokenizer.json. The files do not
    say how text is cut into words. Raises ConfigError."""
    try:
        ids = json.loads(vocab.read_text(encoding="utf-8"))
        lines = merges.read_text(encoding="utf-8").split("\n")
    except (OSError, UnicodeDecodeError, json.JSONDecodeError) as e:
        raise ConfigError(f"{vocab.parent}: {vocab.name} and {merges.name} cannot be read ({e})") from None
    if not isinstance(ids, dict) or not all(isinstance(i, int) for i in ids.values()):
        raise ConfigError(f"{vocab}: is no vocabulary (tokens and their ids)")
    lines = [line for line in lines[lines[0].startswith("#version") :] if line.strip()]
    if not all(line.count(" ") == 1 for line in lines):
        raise ConfigError(f"{merges}: is no list of merges (two tokens in every line)")
    if any(line.endswith("</w>") for line in lines):
        raise ConfigError(f"{merges}: the tokenizer marks the ends of words (</w>): its tokens' bytes do not join to "
                          "the text, so there is no byte view of it")  # fmt: skip
    table = byte_characters()
    added = [{"id": i, "content": text, "special": True} for text, i in ids.items()
             if (text.startswith("<|") and text.endswith("|>")) or not all(c in table for c in text)]  # fmt: skip
    split = {"type": "Split", "pattern": {"Regex": pattern}, "behavior": "Isolated"}
    steps = [split, {"type": "ByteLevel", "add_prefix_space": False, "use_regex": False}]
    return {
        "model": {"type": "BPE", "vocab": ids, "merges": lines}, "added_tokens": added,
        "pre_tokenizer": {"type": "Sequence", "pretokenizers": steps},
        "normalizer": {"type": normal} if normal else None,
    }  # fmt: skip


def vocabulary_of(
    data: dict[str, Any], *, size: int = 0, start: int | None = None, ends: Sequence[int] = ()
) -> Vocabulary:
    """The vocabulary of a tokenizer.json's contents. `size`: ids of the model, where it has more than the tokenizer;
    `start`, `ends`: what the model's config says."""
    model = data["model"]
    unigram = model.get("type") == "Unigram"
    if not unigram and model.get("type", "BPE") != "BPE":
        raise ConfigError(f"a tokenizer of type {model['type']} gives tokens whose bytes do not join to the text, or "
                          "is not known (BPE and Unigram are)")  # fmt: skip
    for name in ("continuing_subword_prefix", "end_of_word_suffix"):
        if model.get(name):
            raise ConfigError(f"the tokenizer marks words by {name}={model[name]!r}: its tokens' bytes do not join to "
                              "the text, so there is no byte view of it")  # fmt: skip
    steps, normal, lead, byte_level = _steps(data.get("pre_tokenizer")), "", "", False
    spaces = once = False  # whether a space is written as SPACE; whether the lead stands at the very beginning only
    for part in _parts(data.get("normalizer")):
        kind = part["type"]
        if kind in ("NFC",):
            normal = kind
        elif kind == "Prepend":
            lead += part["prepend"]
        elif kind == "Replace" and part.get("pattern") == {"String": " "} and part.get("content") == SPACE:
            spaces = True
        else:
            raise ConfigError(f"the tokenizer's normalizer {kind} changes the text: many texts would have the same "
                              "tokens, so there is no byte view of it")  # fmt: skip
    for part in _parts(data.get("pre_tokenizer")):
        if part["type"] == "ByteLevel":
            byte_level = True
            lead += " " if part.get("add_prefix_space") else ""
        if part["type"] == "Metaspace":
            spaces = True
            scheme = part.get("prepend_scheme", "always" if part.get("add_prefix_space", True) else "never")
            lead += "" if scheme == "never" else SPACE
            once = scheme == "first"
    added = data.get("added_tokens") or []
    vocab: dict[str, int] = {t: i for i, (t, _) in enumerate(model["vocab"])} if unigram else model["vocab"]
    count = max([size, *(i + 1 for i in vocab.values()), *(t["id"] + 1 for t in added)])
    tokens: list[bytes | None] = [None] * count
    fallback = [False] * count
    table = byte_characters()
    controls = {t["content"]: t["id"] for t in added}
    check_added((t["content"] for t in added if not t.get("special")), "the tokenizer")
    marked = {*controls.values(), *ends}
    for text, i in vocab.items():
        if i in marked:
            continue
        if byte_level:
            if all(c in table for c in text):
                tokens[i] = bytes(table[c] for c in text)
        elif model.get("byte_fallback") and regex.fullmatch(r"<0x[0-9A-F]{2}>", text):
            tokens[i], fallback[i] = bytes([int(text[3:5], 16)]), True
        else:
            tokens[i] = text.replace(SPACE, " ").encode() if spaces else text.encode()
    merges = []
    for merge in model.get("merges", []):
        left, right = merge.split(" ", 1) if isinstance(merge, str) else merge
        if left in vocab and right in vocab and left + right in vocab:
            merges.append((vocab[left], vocab[right], vocab[left + right]))
    if byte_level:
        segmenter: Segmenter = BytePairs(tokens, merges, units=byte_units(tokens))
    elif unigram:
        scores = [float(score) for _, score in model["vocab"]]
        segmenter = Unigram(tokens, scores + [0.0] * (count - len(scores)), fallback)
        if steps and any(t and b" " in t[1:] for t in tokens):
            raise ConfigError("a unigram tokenizer that cuts at spaces and has tokens with spaces inside is not known")
    else:
        segmenter = CharacterPairs(tokens, merges, fallback=fallback)
    return Vocabulary(
        tuple(tokens), segmenter, Pretokenizer(steps), list(ends) or usual_end(controls, "the tokenizer"), start,
        lead.replace(SPACE, " ").encode(), once, controls, bool(model.get("ignore_merges")), normal,
    )  # fmt: skip


def _parts(step: dict[str, Any] | None) -> list[dict[str, Any]]:
    """The steps of a normalizer or pre-tokenizer, sequences opened."""
    if step is None:
        return []
    if step.get("type") == "Sequence":
        inner = step.get("pretokenizers") or step.get("normalizers") or []
        return [part for one in inner for part in _parts(one)]
    return [step]


_BEHAVIORS = {"Isolated": "isolated", "MergedWithPrevious": "previous", "MergedWithNext": "next",
              "Contiguous": "contiguous"}  # fmt: skip


def _steps(pre: dict[str, Any] | None) -> tuple[Split, ...]:
    out = []
    for part in _parts(pre):
        kind = part["type"]
        if kind == "ByteLevel":
            if part.get("use_regex", True):
                out.append(Split(GPT2))
        elif kind == "Split":
            pattern = part["pattern"]
            pattern = pattern["Regex"] if "Regex" in pattern else regex.escape(pattern["String"])
            behavior = part.get("behavior", "Isolated")
            if behavior == "Removed" and part.get("invert"):
                behavior = "Isolated"  # what does not match is removed: patterns in use match everything
            if behavior not in _BEHAVIORS:
                raise ConfigError(f"the tokenizer's pre-tokenizer takes text away (Split, {behavior})")
            out.append(Split(pattern, _BEHAVIORS[behavior]))
        elif kind == "Digits":
            out.append(Split(r"\p{N}" if part.get("individual_digits") else r"\p{N}+"))
        elif kind == "Punctuation":
            out.append(Split(r"[\p{P}$+<=>^`|~]", _BEHAVIORS[part.get("behavior", "Isolated")]))
        elif kind == "Metaspace":
            if part.get("split", True):
                out.append(Split(" ", "next"))
        else:
            raise ConfigError(f"the tokenizer's pre-tokenizer {kind} is not known, or takes text away")
    return tuple(out)
