"""A tokenized language model as a byte language model, by the Byte-Token Representation Lemma (Phan et al. 2024)."""

import copy
import operator
import unicodedata
from collections.abc import Iterator, Sequence
from typing import get_args

import numpy as np
from numpy.typing import NDArray

from bytelm.byteview.cover import Grammar, Semantics, Tree, chain, log_sum
from bytelm.byteview.covers import Covers
from bytelm.byteview.drafted import draw_drafted
from bytelm.byteview.token_model import Session, TokenModel
from bytelm.byteview.token_sampling import draw_tokens
from bytelm.byteview.vocabulary import Vocabulary
from bytelm.config import ConfigError
from bytelm.copying import Counts
from bytelm.following import score_steps
from bytelm.generate import Sampling
from bytelm.protocol import ByteLM, ImpossibleText, Score, Text, in_context, no_inputs
from bytelm.vocab import END, complete_prefix, encode
from bytelm.windows import DEFAULT_WINDOW, alike, scoring_windows, visible_from

BLOCK = 256  # nodes that the model reads at once
KEPT_ROWS = 1 << 30  # bytes of what the model says of nodes, when texts are scored behind what their contexts share


class TokenizedLM(ByteLM):
    """Next-byte probabilities of a token model, free of the bias of cutting a prompt into tokens.

    `semantics`: masked (each step keeps to tokens with which some text begins, renormalised: an exact distribution over
    canonical strings of tokens), canonical (the same covers with the model's raw probabilities), lastfree (as
    canonical, the last token of a cover not tested), all (every way to cut a text counts: what the model's own samples
    follow; the `beam` most probable strings of tokens are kept, and `follow` bounds the rest).

    `draft`: copy guesses next bytes from what stands earlier in the text, and has them read at once (`drafted.py`); the
    bytes are those of no drafts; `counts` says how often it guessed right. A text that has slid is not guessed.

    `long_text`: whether `generate` refuses what is longer than the model's context, or slides: then the oldest half is
    forgotten.
    """

    def __init__(
        self,
        model: TokenModel,
        vocabulary: Vocabulary,
        semantics: str = "masked",
        *,
        beam: int = 64,
        long_text: str = "refuse",
        chat_template: str = "",
        draft: str = "none",
    ):
        if semantics not in get_args(Semantics):
            raise ConfigError(f"semantics={semantics!r}: choose {', '.join(get_args(Semantics))}")
        if long_text not in ("refuse", "slide"):
            raise ConfigError(f"long_text={long_text!r}: choose refuse or slide")
        if beam < 1:
            raise ConfigError(f"beam={beam}: must be at least 1")
        if vocabulary.start is None:
            raise ConfigError("the tokenizer has no token that starts a text, so the first one has no probability: "
                              "name one (bos_token in tokenizer_config.json)")  # fmt: skip
        if draft not in ("none", "copy") or (draft == "copy" and semantics == "all"):
            raise ConfigError(f"draft={draft!r}: a tokenized model verifies what is copied (copy), and that under "
                              f"semantics masked, canonical or lastfree, not {semantics}")  # fmt: skip
        self.draft, self.counts = draft, Counts()
        self.semantics: Semantics = semantics  # type: ignore[assignment]
        self.model, self.vocabulary, self.chat_template = model, vocabulary, chat_template
        self.beam, self.slides = beam, long_text == "slide"
        self._stand_behind([vocabulary.start], b"", Grammar(vocabulary, vocabulary.lead))

    def _stand_behind(self, trunk: list[int], opening: bytes, grammar: Grammar) -> None:
        self.trunk, self.opening, self.grammar = trunk, opening, grammar
        self.before = grammar.lead + opening  # bytes in front of every text
        room = self.model.config.context - len(trunk) - len(self.before)
        if room < 1:
            raise ConfigError(f"{len(trunk)} tokens and {len(self.before)} bytes stand before every text, the model "
                              f"has {self.model.config.context} positions")  # fmt: skip
        self.window = room  # a text of so many bytes never has more tokens than there are positions left

    def behind(self, *parts: Text | int, start: bool = True) -> "TokenizedLM":
        """This model behind a beginning: what it says of a text is what it says of the text there. A beginning is bytes
        and ids of special tokens; bytes behind the last special token stay open, so that a text may end a token that
        they begin. Without `start`, the symbol that starts a text is left out, unless the parts have it."""
        trunk = list(self.trunk) if start or not parts or isinstance(parts[0], str | bytes) else []
        opening, grammar = self.opening, self.grammar
        for part in parts:
            if isinstance(part, str | bytes):
                opening += encode(part)
                continue
            part = operator.index(part)
            if not 0 <= part < len(self.vocabulary.tokens):
                raise ConfigError(f"token {part}: the tokenizer has {len(self.vocabulary.tokens)}")
            first = grammar.lead == self.vocabulary.lead
            trunk += [*self.token_ids(opening, behind_special=not first), part]
            opening = b""
            if self.vocabulary.lead_once and grammar.lead:
                grammar = Grammar(self.vocabulary)
        out = copy.copy(self)
        out._stand_behind(trunk, opening, grammar)
        return out

    def fixed(self, trunk: list[int], opening: bytes) -> "TokenizedLM":
        """This model behind tokens that are taken as they are, whatever the tokenizer would make of them with what
        follows; every way to go on counts then (semantics all)."""
        out = copy.copy(self)
        out.semantics, out.draft = "all", "none"  # nothing is guessed under it
        out._stand_behind(trunk, opening, Grammar(self.vocabulary))
        return out

    def token_ids(self, text: Text, behind_special: bool = False) -> list[int]:
        """The tokenizer's tokens of a text. Raises ImpossibleText where it has none."""
        data = encode(text)
        self._check_normal(data)
        try:
            ids = self.vocabulary.encode(data, behind_special)
        except UnicodeDecodeError as e:
            raise ImpossibleText(f"the text is no UTF-8 at offset {e.start}: it has no tokens") from None
        if ids is None:
            raise ImpossibleText(self.why(data))
        return ids

    # Trees.

    def seen_from(self, text: bytes) -> int:
        """First byte of a text that is seen when it is gone on with: the first, where it fits."""
        return 0 if len(text) <= self.window else _character(text, visible_from(len(text), _room(self.window, text)))

    def tree(self, text: bytes, lane: int = 0) -> Tree:
        """The covers of a text; the model has seen none of them yet."""
        tree = Tree(self.grammar, self.semantics, self.trunk, lane)
        for byte in self.before + text:
            tree.push(byte)
        return tree

    def read(self, session: Session, trees: Sequence[Tree]) -> None:
        """Lets the model see the new nodes of some trees, all of them at once."""
        while any(tree.new for tree in trees):
            each = max(BLOCK // sum(bool(tree.new) for tree in trees), 1)
            part = [(tree, node) for tree in trees for node in tree.new[:each]]
            for (tree, node), row in zip(part, session.read([node for _, node in part])):
                tree.fill(node, row)
            for tree in trees:
                tree.new = tree.new[each:]

    def logprobs_batch(self, prefixes: Sequence[Text], *, inputs: Sequence[Text] | None = None) -> NDArray[np.float64]:
        """Raises ImpossibleText where no text begins with a prefix."""
        no_inputs(inputs)
        texts = [encode(p) for p in prefixes]
        for text in texts:
            self._check_normal(self.opening + text)
        texts = [t[self.seen_from(t) :] for t in texts]
        if self.semantics == "all":
            return self.follow(texts).logprobs() if texts else np.zeros((0, END + 1))
        trees = [self.tree(t, lane) for lane, t in enumerate(texts)]
        self.read(self.model.session(lanes=max(len(trees), 1)), trees)
        out = np.stack([tree.logprobs() for tree in trees]) if trees else np.zeros((0, END + 1))
        for text, tree in zip(texts, trees):
            if not tree.possible():
                raise ImpossibleText(self.why(text))
        return out

    def _check_normal(self, text: bytes) -> None:
        """Raises ImpossibleText for a text that the tokenizer would first turn into another."""
        form = self.vocabulary.normal
        if form and not unicodedata.is_normalized(form, text.decode(errors="ignore")):
            raise ImpossibleText(f"the text is not in Unicode's {form}, into which the tokenizer puts every text: "
                                 f"normalise it first (unicodedata.normalize({form!r}, text))")  # fmt: skip

    def refusal(self, text: bytes) -> ValueError:
        """What is wrong with a text that the covers do not spell: ImpossibleText, or that the beam has lost it."""
        if self.semantics == "all" and self._stuck(text) is None:
            return ConfigError(f"beam={self.beam}: none of the strings of tokens that were kept spells the text: "
                               "widen it")  # fmt: skip
        return ImpossibleText(self.why(text))

    def why(self, text: bytes) -> str:
        """Why no text of the tokenizer begins with these bytes."""
        place = self._stuck(text)
        if place is None or place < 0:
            return "no text of this tokenizer begins with these bytes, or with what stands before them"
        return (
            f"no text of this tokenizer begins with these bytes: nothing spells byte 0x{text[place]:02X} at offset "
            f"{place} (bytes that are no UTF-8, or a character that its tokens cannot write, have probability 0 "
            f"under semantics={self.semantics})"
        )

    def _stuck(self, text: bytes) -> int | None:
        """Offset of the first byte that nothing spells, below 0 in what stands before the text; None: all is spelled.
        Under semantics all the interior of covers is tested too: a tree of all of them would be exponential."""
        tree = Tree(self.grammar, "lastfree" if self.semantics == "all" else self.semantics, self.trunk)
        for place, byte in enumerate(self.before + text, -len(self.before)):
            tree.push(byte)
            if not tree.possible():
                return place
        return None

    # Scores.

    def score_batch(
        self,
        texts: Sequence[Text],
        contexts: Sequence[Text] | None = None,
        window: int | None = None,
        *,
        inputs: Sequence[Text] | None = None,
    ) -> list[Score]:
        """One pass of the model over the whole tree of a text (semantics all: byte by byte); what contexts in a row
        begin with is read once. A byte that cannot stand where it does has -inf, and so have those behind it."""
        no_inputs(inputs)
        if window is not None and not 1 <= window <= self.window:
            raise ConfigError(f"window={window}: must be in 1 .. {self.window} bytes, which this model has room for")
        scores, window = [], window or min(self.window, DEFAULT_WINDOW)
        pairs = in_context(texts, contexts)
        for context, text in pairs:
            self._check_normal(self.opening + context + text)
        most = KEPT_ROWS // (8 * len(self.vocabulary.tokens))  # what is read once is kept, about a row for each byte
        fits = lambda text: len(text) <= min(_room(window, text), most)  # noqa: E731
        for shared, group in alike(pairs):
            if len(group) > 1 and all(fits(context + text) for context, text in group) and self.semantics != "all":
                scores += self._score_behind(shared, group)
            else:
                scores += [self._score_in_windows(context, text, window) for context, text in group]
        return scores

    def _score_in_windows(self, context: bytes, text: bytes, window: int) -> Score:
        logs = np.zeros(len(text))
        whole = context + text
        for first, end, scored in scoring_windows(len(context), len(whole), _room(window, whole)):
            first = _character(whole, first)
            logs[scored - len(context) : end - len(context)] = self._score(whole[first:end], scored - first)
        return Score(float(logs.sum()), logs)

    def _score_behind(self, shared: bytes, pairs: Sequence[tuple[bytes, bytes]]) -> list[Score]:
        """Scores of texts whose contexts begin with `shared`, which is read once; each goes on from there."""
        try:
            covers = self.follow([shared])
        except ImpossibleText:
            return [Score(-np.inf if text else 0.0, np.full(len(text), -np.inf)) for _, text in pairs]
        scores = []
        for context, text in pairs:
            behind = context[len(shared) :] + text
            (rows,) = covers.look([behind])
            covers.keep([0])
            rows, own = rows[len(behind) - len(text) :], np.frombuffer(text, np.uint8)
            logs = _dead_from_the_first(np.array([row[byte] for row, byte in zip(rows, text)]))
            greedy = np.array([row.argmax() for row in rows[: len(text)]], int) == own
            scores.append(Score(float(logs.sum()), logs, greedy & np.isfinite(logs)))
        return scores

    def _score(self, text: bytes, scored: int) -> NDArray[np.float64]:
        """ln p of each byte of a text from place `scored` on."""
        if self.semantics == "all":
            return self._score_by_bytes(text, scored)
        tree, session = self.tree(text), self.model.session(1 << max(len(text), 1).bit_length())
        lead = len(self.before)
        total, exact = lead + len(text), self.semantics == "masked"
        mass = np.full(total + 1, -np.inf)  # of the covers of the first n bytes
        symbols = np.full((total, END + 1), -np.inf) if not exact else None
        mass[0] = 0.0
        for first in range(0, len(tree.new), BLOCK):
            nodes = tree.new[first : first + BLOCK]
            for node, row in zip(nodes, session.read(nodes)):
                tree.fill(node, row)
                if node.end < 0:
                    continue
                for n, (low, high) in enumerate(node.ranges, node.end):
                    if low == high:
                        continue
                    if symbols is None and n > node.end:
                        mass[n] = np.logaddexp(mass[n], tree.reaching(node, n) + node.logp)
                    if symbols is not None and n < total:
                        symbols[n] = np.logaddexp(symbols[n], tree.inside(node, n) + node.logp)
                node.row = None  # its children know what it says of them
        with np.errstate(invalid="ignore"):
            if symbols is not None:
                rows = symbols[lead + scored :]
                logs = np.array([row[c] - log_sum(row) for row, c in zip(rows, text[scored:])])
            else:
                logs = np.diff(mass[lead + scored :])
        return _dead_from_the_first(logs)

    def _score_by_bytes(self, text: bytes, scored: int) -> NDArray[np.float64]:
        try:
            return score_steps(self.follow([text[:scored]]), text[scored:])
        except ImpossibleText:
            return np.full(len(text) - scored, -np.inf)

    def score_tokens(self, texts: Sequence[Text]) -> list[float]:
        """ln p of the tokens that the tokenizer makes of each text, as token models are usually scored: in windows of
        the model's context, each token once, the first of a later window behind the token before it."""
        if self.opening:
            raise ConfigError("score_tokens: bytes stand before the text, whose tokens would be others with it")
        out, past = [], len(self.trunk)
        for text in texts:
            row, total = [*self.trunk, *self.token_ids(text, behind_special=not self.grammar.lead)], 0.0
            for first, end, scored in scoring_windows(past - 1, len(row) - 1, self.model.config.context):
                session, nodes = self.model.session(), chain(row[first:end])
                for begin in range(0, len(nodes), BLOCK):
                    part = nodes[begin : begin + BLOCK]
                    for n, logits in enumerate(session.read(part), first + begin):
                        if n >= scored:
                            logits = logits.astype(np.float64)
                            total += float(logits[row[n + 1]] - log_sum(logits))
            out.append(total)
        return out

    # Samples.

    def _continue(self, prompts, inputs, max_bytes, sampling, seed, stop, block):
        if not self.slides and any(len(p) + max_bytes > self.window for p in prompts):
            raise ConfigError(f"prompt and continuation are longer than the {self.window} bytes that this model has "
                              "room for: shorten the prompt, ask for fewer bytes, or let it slide "
                              "(long_text)")  # fmt: skip
        if self.draft == "copy":
            no_inputs(inputs)
            covers, kept = self.follow(prompts), self.counts
            return draw_drafted(covers, prompts, max_bytes, sampling, seed, stop, block, kept, self.window)
        if sampling == Sampling() and self.semantics == "masked" and not self.slides:
            no_inputs(inputs)
            return self._by_tokens(prompts, max_bytes, sampling, seed, stop, block)
        return super()._continue(prompts, inputs, max_bytes, sampling, seed, stop, block)

    def _by_tokens(self, prompts, max_bytes, sampling, seed, stop, block) -> Iterator[list[bytes]]:
        covers = self.follow(prompts)
        covers.logprobs()
        trees = [tree for tree in covers.trees if tree is not None]
        return draw_tokens(covers.session, trees, max_bytes, sampling, seed, stop, block)

    def generate_tokens(
        self,
        prompts: Sequence[Text],
        max_bytes: int = 200,
        *,
        temperature: float = 1.0,
        top_k: int = 0,
        top_p: float = 1.0,
        stop: Sequence[Text] = (),
        seed: int = 0,
    ) -> list[bytes]:
        """As `generate_batch`, but temperature, top_k and top_p are of tokens, as token models are usually sampled; the
        prompt's last token is drawn with them too. Raises ConfigError where prompt and continuation do not fit."""
        if self.semantics not in ("masked", "all"):
            raise ConfigError(f"semantics={self.semantics}: its tokens have no law of their own; use masked or all")
        request = self._request(prompts, None, max_bytes, temperature, top_k, top_p, stop, seed)
        if any(len(p) + max_bytes > self.window for p in request[0]):
            raise ConfigError(f"prompt and continuation are longer than the {self.window} bytes that there is room for")
        out = [b""] * len(prompts)
        for new in self._by_tokens(request[0], *request[2:], block=32) if prompts else ():
            out = [a + b for a, b in zip(out, new)]
        return out

    def reopen(self, text: bytes, first: int) -> Covers:
        return self.follow([text[_character(text, first) :]])

    def follow(
        self, prompts: Sequence[Text], *, inputs: Sequence[Text] | None = None, skip: float | None = None
    ) -> Covers:
        """Texts that grow on one cache: about one token read a byte, or fewer where nodes whose share of the mass is at
        most `skip` may wait (`Covers.bounds` then says how far off it is; default: 0, under semantics all 1e-6). Raises
        ImpossibleText."""
        no_inputs(inputs)
        skip = (1e-6 if self.semantics == "all" else 0.0) if skip is None else skip
        if not 0 <= skip < 1:
            raise ConfigError(f"skip={skip}: must be in [0, 1)")
        texts = [encode(p) for p in prompts]
        for text in texts:
            self._check_normal(self.opening + text)
        covers = Covers(self, texts, skip)
        for text, possible in zip(texts, covers.possible()):
            if not possible:
                raise self.refusal(text)
        return covers


def _room(window: int, text: bytes) -> int:
    """The window, with room for a character that it would begin inside of."""
    return window if text.isascii() else max(window - 3, 1)


def _character(text: bytes, place: int) -> int:
    """Where the character begins that a place is inside of: no text begins inside one."""
    near = text[max(place - 3, 0) : place]
    return place - len(near) + complete_prefix(near)


def _dead_from_the_first(logs: NDArray[np.float64]) -> NDArray[np.float64]:
    """With -inf from the first impossible byte on."""
    dead = np.flatnonzero(~np.isfinite(logs))
    if len(dead):
        logs[dead[0] :] = -np.inf
    return logs
