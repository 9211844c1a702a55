"""BPE-dropout (Provilkov et al. 2020): the tokens of a text with merges left out at random."""

from functools import cached_property
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from bytelm.byteview.segmenter import BytePairs
from bytelm.byteview.tokenizer_files import vocabulary_in
from bytelm.byteview.vocabulary import Vocabulary
from bytelm.config import ConfigError
from bytelm.vocab import complete_prefix


class MergeDropout:
    """Cuts tokens' text into tokens anew, each merge left out with a probability. Travels to worker processes as the
    tokenizer's file."""

    def __init__(self, tokenizer: Path, share: float):
        """Raises ConfigError for a tokenizer that does not merge."""
        self.tokenizer, self.share = tokenizer, share
        if not isinstance(self.vocabulary.segmenter, BytePairs):
            raise ConfigError(f"data.merge_dropout={share}: {tokenizer} is no byte pair encoding, it has no merges")

    def __reduce__(self):
        return MergeDropout, (self.tokenizer, self.share)

    @cached_property
    def vocabulary(self) -> Vocabulary:
        return vocabulary_in(self.tokenizer)

    def __call__(self, tokens: NDArray[np.int32], rng: np.random.Generator) -> NDArray[np.int32]:
        """Other tokens of the same bytes. Those at either end that hold parts of a character stay."""
        vocabulary = self.vocabulary
        assert isinstance(vocabulary.segmenter, BytePairs)
        texts = [vocabulary.tokens[i] or b"" for i in tokens.tolist()]
        begin, end = 0, len(texts)
        while begin < end and texts[begin][:1] and texts[begin][0] & 0xC0 == 0x80:
            begin += 1
        whole = b"".join(texts[begin:end])
        while end > begin and complete_prefix(whole) < len(whole):
            end -= 1
            whole = whole[: len(whole) - len(texts[end])]
        out = tokens[:begin].tolist()
        dropped = lambda: rng.random() < self.share  # noqa: E731
        for piece in vocabulary.pretokenizer.pieces(whole.decode()):
            ids = vocabulary.segmenter.encode_with(piece.encode(), dropped)
            assert ids is not None  # the text was made of this tokenizer's tokens
            out += ids
        return np.array(out + tokens[end:].tolist(), np.int32)
