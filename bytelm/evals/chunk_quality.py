"""What a model's units are like: learned chunks, words, entropy patches, kept bytes and BPE tokens alike.

Lengths and where units begin, agreement with words and morphemes (beside what random boundaries of the same density
would reach), stability under a slip of one letter, and what languages cost. Rényi efficiency (Zouhar et al. 2023) is of
the units' types, alpha 2.5: a diagnostic only, with known counterexamples (Cognetta et al. 2024).
"""

import math
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from bytelm.byteview.byte_view import TokenizedLM
from bytelm.byteview.plain_tokens import PlainTokens
from bytelm.config import ConfigError
from bytelm.data.noise import ALPHABET, LETTERS, Draws
from bytelm.data.words import split_bytes
from bytelm.evals.entrants import Continuing, Entrant
from bytelm.protocol import ByteLM

ENGLISH = ("en", "eng")  # what the file of the language that others are compared with may be called
Starts = NDArray[np.int64]  # byte offsets at which units begin, the text's own start not among them


def unit_starts(lm: ByteLM, text: bytes) -> list[Starts]:
    """Where units begin in a text, level by level, outermost first; tokens of a tokenized model are one level."""
    if isinstance(lm, (PlainTokens, TokenizedLM)):
        view = lm.lm if isinstance(lm, PlainTokens) else lm
        vocabulary = view.vocabulary
        sizes = [len(vocabulary.tokens[i] or b"") for i in view.token_ids(text)]
        ends = np.cumsum(sizes, dtype=np.int64) - len(view.before)
        return [ends[:-1][ends[:-1] > 0]]
    if isinstance(lm, Continuing):  # an encoder reads whole texts: in pieces of the length that it was trained on
        places = range(0, max(len(text), 1), lm.window)
        pieces = [[starts + at for starts in lm.lm.chunks(text[at : at + lm.window])] for at in places]
        levels = (np.concatenate(level) for level in zip(*pieces))
        return [starts[starts > 0] for starts in levels]
    return [starts[starts > 0] for starts in lm.chunks(text)]


def has_chunks(entrant: Entrant) -> bool:
    """Whether a model has units above bytes; a tokenized one is asked by its tokens."""
    if isinstance(entrant.lm, TokenizedLM):
        return False
    return bool(unit_starts(entrant.lm, b"the units of a text"))


def renyi_efficiency(counts: Sequence[int], alpha: float = 2.5) -> float:
    """Rényi entropy of order alpha of types with these counts, over ln of their number; nan for fewer than two."""
    p = np.asarray(counts, np.float64)
    if len(p) < 2:
        return math.nan
    return float(np.log(((p / p.sum()) ** alpha).sum()) / (1 - alpha) / np.log(len(p)))


def word_gaps(text: bytes) -> list[tuple[int, int]]:
    """Places (first, last) at any of which a boundary falls between two words: before, in and behind the white space
    between them, or where the word rule cuts without white space. The ends of the text are none."""
    space = np.isin(np.frombuffer(text, np.uint8), list(b" \t\n\v\f\r"))
    gaps = []
    for start in split_bytes(text).tolist():
        first = last = start
        while first > 0 and space[first - 1]:
            first -= 1
        while last < len(text) and space[last]:
            last += 1
        if first > 0 and last < len(text):
            gaps.append((first, last))
    return sorted(set(gaps))


@dataclass
class Agreement:
    """How far unit boundaries are boundaries of another kind, added up over texts."""

    boundaries: int = 0
    inside: int = 0  # boundaries that fall in a gap
    gaps: int = 0
    hit: int = 0  # gaps with a boundary
    places: int = 0  # where a boundary could be
    open: int = 0  # places in gaps
    expected: float = 0.0  # gaps that as many boundaries at random places would hit

    def add(self, starts: Starts, gaps: Sequence[tuple[int, int]], size: int) -> "Agreement":
        """A text of `size` bytes, its unit boundaries, and the gaps (first, last place) in which others fall."""
        at, free = np.zeros(size + 1, np.int64), np.zeros(size + 1, bool)
        at[starts] = 1
        sums = np.concatenate([[0], np.cumsum(at)])
        for first, last in gaps:
            free[first : last + 1] = True
        density = len(starts) / max(size - 1, 1)
        self.boundaries += len(starts)
        self.gaps += len(gaps)
        self.places += size - 1
        self.inside += int(free[starts].sum())
        self.hit += sum(int(sums[last + 1] > sums[first]) for first, last in gaps)
        self.open += int(free[1:size].sum())
        self.expected += sum(1 - (1 - density) ** (last - first + 1) for first, last in gaps)
        return self

    def figures(self) -> dict[str, float]:
        """Precision (share of the boundaries that fall in a gap), recall (of the gaps with a boundary), F1, and `lift`,
        F1 over that of as many boundaries at random places of the same texts (in expectation)."""
        precision, recall = self.inside / max(self.boundaries, 1), self.hit / max(self.gaps, 1)
        by_chance = _f1(self.open / max(self.places, 1), self.expected / max(self.gaps, 1)) if self.boundaries else 0.0
        f1 = _f1(precision, recall)
        return {"precision": precision, "recall": recall if self.gaps else math.nan, "f1": f1,
                "lift": f1 / by_chance if by_chance else math.nan}  # fmt: skip


def _f1(precision: float, recall: float) -> float:
    return 2 * precision * recall / (precision + recall) if precision + recall > 0 else 0.0


def stability(lm: ByteLM, texts: Sequence[bytes], level: int, seed: int = 0, near: int = 16) -> float:
    """Under a slip of one letter in the middle of each text: of the boundaries further than `near` bytes from it, those
    in both versions over those in either (a mean over texts)."""
    shares = []
    for n, text in enumerate(texts):
        words = [m for m in LETTERS.finditer(text.decode("latin-1")) if m[0].isascii()]
        if not words:
            continue
        place = min(words, key=lambda m: abs(m.start() - len(text) // 2)).start()
        draws = Draws(seed, "slip", n)
        letter = next(c for c in draws.shuffled(list(ALPHABET)) if ord(c) != text[place])
        changed = text[:place] + letter.encode() + text[place + 1 :]
        a, b = ({s for s in unit_starts(lm, t)[level].tolist() if abs(s - place) > near} for t in (text, changed))
        if a | b:
            shares.append(len(a & b) / len(a | b))
    return float(np.mean(shares)) if shares else math.nan


def chunk_unit(entrant: Entrant, documents: Iterable[bytes], seed: int) -> tuple[dict[str, float], dict[str, Any]]:
    """Figures of every level over some documents (those of level i end in _i)."""
    texts = [d for d in documents if len(d) > 1]
    found = [unit_starts(entrant.lm, text) for text in texts]
    metrics: dict[str, float] = {"levels": float(len(found[0])) if found else 0.0}
    details: dict[str, Any] = {}
    for level in range(len(found[0]) if found else 0):
        figures, lengths = level_figures(texts, [starts[level] for starts in found])
        slices = [text[i : i + 400] for text in texts for i in range(0, len(text) - 99, 400)]
        slices = slices[:: max(len(slices) // 16, 1)][:16]  # from all over the text, one long document or many
        slices = [whole_characters(text) for text in slices]
        figures["stability"] = stability(entrant.lm, slices, level, seed)
        metrics |= {f"{name}_{level}": value for name, value in figures.items()}
        details[f"lengths_{level}"] = np.bincount(np.minimum(lengths, 32), minlength=33).tolist()
    if texts:
        passage = whole_characters(texts[0][:400])
        details |= {"passage": passage.decode(), "starts": [s.tolist() for s in unit_starts(entrant.lm, passage)]}
    return metrics, details


def whole_characters(text: bytes) -> bytes:
    """A stretch of a text without what is left of characters at its ends (and without bytes that are none)."""
    return text.decode("utf-8", "ignore").encode()


def level_figures(texts: Sequence[bytes], starts: Sequence[Starts]) -> tuple[dict[str, float], NDArray[np.int64]]:
    """Figures of one level over some texts, and the length of every unit."""
    lengths, types = [], Counter[bytes]()
    words = Agreement()
    inside = at_space = total = 0
    for text, at in zip(texts, starts):
        bounds = np.concatenate([[0], at, [len(text)]])
        lengths.append(np.diff(bounds))
        types.update(text[a:b] for a, b in zip(bounds[:-1].tolist(), bounds[1:].tolist()))
        data = np.frombuffer(text, np.uint8)
        space = np.isin(data, list(b" \t\n\v\f\r"))
        inside += int(((data[at] & 0xC0) == 0x80).sum())
        at_space += int((space[at] | space[at - 1]).sum())
        total += len(at)
        words.add(at, word_gaps(text), len(text))
    every = np.concatenate(lengths)
    p5, p50, p95 = np.percentile(every, (5, 50, 95), method="lower")
    return {
        "bytes_per_unit": float(every.mean()), "variation": float(every.std() / every.mean()), "p5": float(p5),
        "p50": float(p50), "p95": float(p95), "longest": float(every.max()), "single": float((every == 1).mean()),
        "inside_character": inside / max(total, 1), "at_space": at_space / max(total, 1),
        "renyi": renyi_efficiency(list(types.values())), **{f"word_{k}": v for k, v in words.figures().items()},
    }, every  # fmt: skip


def read_parallel(folder: Path, most: int) -> tuple[dict[str, list[bytes]], bool]:
    """(sentences of a parallel corpus, whether they are aligned): one file LANGUAGE.txt a language. Where all files
    have as many lines, line n of each is the same sentence, and at most `most` are taken (0: all), at even distances;
    else each file is taken whole."""
    files = sorted(folder.glob("*.txt")) if folder.is_dir() else []
    texts = {file.stem: file.read_bytes().splitlines() for file in files}
    if not texts.keys() & set(ENGLISH):
        raise ConfigError(f"{folder}: expected one file LANGUAGE.txt a language, {' or '.join(ENGLISH)}.txt among them")
    total = len(next(iter(texts.values())))
    aligned = all(len(lines) == total for lines in texts.values())
    if aligned:
        full = [n for n in range(total) if all(lines[n].strip() for lines in texts.values())]
        texts, total = {language: [lines[n] for n in full] for language, lines in texts.items()}, len(full)
        kept = [n * total // min(most or total, total) for n in range(min(most or total, total))]
        texts = {language: [lines[n] for n in kept] for language, lines in texts.items()}
    texts = {language: [line for line in lines if line.strip()] for language, lines in texts.items()}
    if not all(texts.values()):
        raise ConfigError(f"{folder}: {next(k for k, v in texts.items() if not v)}.txt is empty")
    return texts, aligned


def language_unit(entrant: Entrant, sentences: Sequence[bytes]) -> tuple[dict[str, float], dict[str, Any]]:
    """What sentences take: bytes, units of the innermost level, and nats where the model's scores are bits."""
    metrics = {"bytes": float(sum(map(len, sentences)))}
    if has_chunks(entrant):
        metrics["units"] = float(sum(len(unit_starts(entrant.lm, text)[-1]) + 1 for text in sentences))
    if entrant.bits:
        metrics["nats"] = -sum(s.total for s in entrant.lm.score_batch(sentences))
    return metrics, {}


def read_morphemes(path: Path) -> list[tuple[str, list[int]]]:
    """Words and the byte offsets of morphemes inside them, from lines `surface TAB morpheme @@morpheme ...` of
    SIGMORPHON 2022 (words or sentences); only words whose morphemes spell the surface, with a boundary inside."""
    found: dict[str, list[int]] = {}
    try:
        text = path.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as e:
        raise ConfigError(f"{path}: is no UTF-8 text ({e.reason} at byte {e.start})") from None
    for line in text.splitlines():
        surface, _, rest = line.partition("\t")
        groups = rest.split("\t")[0].replace(" @@", "\0").split(" ")
        for word, group in zip(surface.split(" "), groups):
            morphemes = group.split("\0")
            if len(morphemes) > 1 and "".join(morphemes) == word:
                found.setdefault(word, np.cumsum([len(m.encode()) for m in morphemes[:-1]]).tolist())
    if not found:
        raise ConfigError(f"{path}: no line `word TAB morpheme @@morpheme` whose morphemes spell the word")
    return list(found.items())


def morpheme_unit(entrant: Entrant, words: Sequence[tuple[str, Sequence[int]]]) -> tuple[dict[str, float], dict]:
    """Agreement of units inside words with morphemes, each word behind a space. Boundaries of the innermost level."""
    metrics = dict.fromkeys(("hits", "boundaries", "morphemes", "places"), 0.0)
    for word, cuts in words:
        text = b" " + word.encode()
        inner = {s - 1 for s in unit_starts(entrant.lm, text)[-1].tolist() if s > 1}
        metrics["hits"] += len(inner & set(cuts))
        metrics["boundaries"] += len(inner)
        metrics["morphemes"] += len(cuts)
        metrics["places"] += len(text) - 2
    precision = metrics["hits"] / max(metrics["boundaries"], 1)
    recall = metrics["hits"] / metrics["morphemes"]
    by_chance = _f1(metrics["morphemes"] / metrics["places"], metrics["boundaries"] / metrics["places"])
    f1 = _f1(precision, recall)
    return {"precision": precision, "recall": recall, "f1": f1, "lift": f1 / by_chance if by_chance else math.nan,
            "density": metrics["boundaries"] / metrics["places"], "words": float(len(words))}, {}  # fmt: skip
