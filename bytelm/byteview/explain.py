"""What a tokenized model says behind a prompt, with the prompt's tokens fixed and by the byte view, side by side."""

import dataclasses

import numpy as np
from numpy.typing import NDArray

from bytelm.byteview.byte_view import TokenizedLM
from bytelm.byteview.cover import Node, log_sum
from bytelm.byteview.healing import uncorrected
from bytelm.protocol import ImpossibleText
from bytelm.vocab import END


@dataclasses.dataclass(frozen=True)
class Explanation:
    """Probabilities of the next symbol, [257], and the covers that make them up."""

    tokens: list[bytes]  # of the prompt, as the tokenizer cuts it; empty where it cannot
    plain: NDArray[np.float64] | None  # the prompt's tokens taken as they are, a new token behind them
    view: NDArray[np.float64]
    covers: list[tuple[list[bytes], float]]  # the most probable ones: their tokens, and their share


def explain(lm: TokenizedLM, prompt: bytes, covers: int = 6) -> Explanation:
    """Raises ImpossibleText where no text begins with the prompt."""
    v, grown = lm.vocabulary, lm.follow([prompt])
    view, tree = np.exp(grown.logprobs()[0]), grown.trees[0]
    assert tree is not None
    total, n = log_sum(tree.log_mass()), len(tree.text)

    def words(node: Node) -> list[bytes]:
        return [v.tokens[a.token] or b"" for a in reversed(node.ancestors()) if a.end > 0]

    found: list[tuple[list[bytes], float]] = []
    for node in (*tree.open, *getattr(tree, "waiting", ())):
        if node.end == n:
            found.append((words(node), float(np.exp(node.logp - total))))
        if node.end == n or node.row is None:
            continue
        low, high = node.ranges[-1]
        ids = v.order[low:high][v.lengths[low:high] > n - node.end]
        mask = tree.mask(node) if lm.semantics == "canonical" else None
        row = node.row[ids] if mask is None else np.where(mask[ids], node.row[ids], -np.inf)
        for place in np.argsort(-row)[:covers]:
            found.append(([*words(node), v.tokens[ids[place]] or b""], float(np.exp(row[place] + node.logp - total))))
    found.sort(key=lambda cover: -cover[1])
    tokens, plain = _plain(lm, prompt)
    return Explanation(tokens, plain, view, found[:covers])


def _plain(lm: TokenizedLM, prompt: bytes) -> tuple[list[bytes], NDArray[np.float64] | None]:
    """The prompt's own tokens, and what the model says behind them."""
    try:
        plain = uncorrected(lm, prompt)
    except ImpossibleText:
        return [], None
    tokens = [lm.vocabulary.tokens[i] or b"" for i in plain.trunk[len(lm.trunk) :]]
    return tokens, np.exp(plain.logprobs())


def table(explanation: Explanation, top: int = 6) -> str:
    """The explanation as lines of text."""
    e, lines = explanation, []
    lines.append("tokens of the prompt:  " + " | ".join(_show(t) for t in e.tokens) if e.tokens else
                 "the prompt is empty, or ends inside a character: it has no tokens")  # fmt: skip
    lines += ["", f"{'next byte':<12}{'byte view':>11}{'plain':>11}"]
    ranked = list(np.argsort(-e.view)[:top])
    if e.plain is not None:
        ranked += [s for s in np.argsort(-e.plain)[:top] if s not in ranked]
    for symbol in ranked:
        name = "end of text" if symbol == END else _show(bytes([symbol]))
        plain = "-" if e.plain is None else f"{e.plain[symbol]:.4f}"
        lines.append(f"{name:<12}{e.view[symbol]:>11.4f}{plain:>11}")
    lines += ["", "covers of the prompt (what its tokens may have been), by share:"]
    for tokens, share in e.covers:
        shown = tokens[-6:]
        lines.append(f"{share:>8.4f}  " + ("... | " if len(tokens) > 6 else "") + " | ".join(_show(t) for t in shown))
    return "\n".join(lines)


def _show(data: bytes) -> str:
    return repr(data.decode("utf-8", "backslashreplace"))[1:-1].replace(" ", "\u2423") if data else "(empty)"
