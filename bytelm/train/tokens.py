"""The tokenizer of a run whose model reads tokens: learned from its text or given, kept beside its checkpoints; and the
training text in its tokens, found once and kept on disk."""

import fcntl
import hashlib
import os
import re
import shutil
import time
import unicodedata
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np

from bytelm.byteview.dropout import MergeDropout
from bytelm.byteview.tokenizer_files import RUN_TOKENIZER, run_tokenizer, tokenizer_hash, vocabulary_in
from bytelm.byteview.vocabulary import Vocabulary
from bytelm.config import Config, ConfigError, DataConfig, TokensConfig
from bytelm.data.corpus import Corpus
from bytelm.data.marks import corpus_identity
from bytelm.data.readers import DataError
from bytelm.data.sources import cache_folder
from bytelm.data.tokens import RandomSplits, Recut, TokenIds, TokenText, ends_table

LONGEST_WORD = 1024  # characters
LEARNED_FROM = 256 << 20  # bytes of text at most that a tokenizer is learned from
END = "<|endoftext|>"  # the control token of a tokenizer that is learned here

Note = Callable[[str], None]


class Tokenizer:
    """A run's tokenizer."""

    def __init__(self, path: Path, reserved: str = "error"):
        """`reserved`: bytes that are no text are refused (error), or become U+FFFD (replace)."""
        self.path, self.vocabulary, self.replaces = path, vocabulary_in(path), reserved == "replace"
        widths = np.array([len(t or b"") for t in self.vocabulary.tokens], np.int32)
        assert self.vocabulary.start is not None
        self.ids = TokenIds(self.vocabulary.start, self.vocabulary.ends[0], widths, len(self.vocabulary.lead))

    def characters(self, text: bytes, where: str) -> str:
        """A document as the tokenizer reads it. Raises DataError for what is no text, or not in its normal form."""
        normal = self.vocabulary.normal
        try:
            found = text.decode(errors="replace" if self.replaces else "strict")
        except UnicodeDecodeError as e:
            raise DataError(f"{where}: byte {e.start} of the document is no UTF-8, which a tokenizer needs: clean the "
                            "text, or set data.reserved=replace (U+FFFD instead)") from None  # fmt: skip
        if not normal or unicodedata.is_normalized(normal, found):
            return found
        if not self.replaces:
            raise DataError(f"{where}: is not in the form {normal}, which the tokenizer needs: normalize the text, or "
                            "set data.reserved=replace (it is done then)")  # fmt: skip
        return unicodedata.normalize(normal, found)

    def encode(self, text: bytes, where: str) -> list[int]:
        """Tokens of a document. Raises DataError for what has none."""
        ids = self.vocabulary.encode(self.characters(text, where).encode())
        if ids is None:
            raise DataError(f"{where}: holds what the tokenizer has no tokens for")
        return ids

    def recut(self, config: DataConfig) -> Recut | None:
        """What cuts the text anew each time it is read, if anything does."""
        if config.token_splits:
            return RandomSplits(self.vocabulary.tokens, config.token_splits)
        return MergeDropout(self.path, config.merge_dropout) if config.merge_dropout else None


def open_tokenizer(config: Config, run_dir: Path, sources: list[Corpus], begun: str | None, note: Note) -> Tokenizer:
    """The tokenizer of a run, in its folder. `begun`: the hash of the one that the run's checkpoint was trained with,
    which it must be; None: the run begins now, with the one given, that of train.init_from, or one learned from the
    text. Raises ConfigError when it does not fit the model, or is another one than it should be."""
    assert isinstance(config.model, TokensConfig)
    path, given = run_dir / RUN_TOKENIZER, config.data.tokenizer
    if given and not Path(given).is_file():
        raise ConfigError(f"data.tokenizer={given}: no such file")
    if begun is None:
        _begin(config, path, sources, note)
    elif not path.is_file() or tokenizer_hash(path) != begun:
        raise ConfigError(f"{path}: {'is not what' if path.is_file() else 'is not there any more, but'} the weights of "
                          "this run were trained with; put it back")  # fmt: skip
    elif given and tokenizer_hash(Path(given)) != begun:
        raise ConfigError(f"data.tokenizer={given} is not what the run began with ({path})")
    tokenizer = Tokenizer(path, config.data.reserved)
    check_size(config, tokenizer.vocabulary, given or str(path))
    return tokenizer


def check_given(config: Config) -> None:
    """Raises ConfigError where the tokenizer that a config names cannot be the model's."""
    given = config.data.tokenizer
    if given and not Path(given).is_file():
        raise ConfigError(f"data.tokenizer={given}: no such file")
    if given:
        check_size(config, vocabulary_in(Path(given)), given)
        Tokenizer(Path(given)).recut(config.data)


def check_size(config: Config, vocabulary: Vocabulary, where: str) -> None:
    assert isinstance(config.model, TokensConfig)
    if len(vocabulary.tokens) > config.model.vocabulary:
        raise ConfigError(f"model.vocabulary={config.model.vocabulary}: {where} has {len(vocabulary.tokens)} tokens; "
                          "set it to that, or more")  # fmt: skip


def _begin(config: Config, path: Path, sources: list[Corpus], note: Note) -> None:
    """Puts the tokenizer of a run that begins into its folder, unless another process has, or an earlier start of the
    same run."""
    assert isinstance(config.model, TokensConfig)
    given = Path(config.data.tokenizer) if config.data.tokenizer else None
    if config.train.init_from:
        there = run_tokenizer(Path(config.train.init_from))
        if there is None:
            raise ConfigError(
                f"train.init_from={config.train.init_from}: has no {RUN_TOKENIZER} that its weights are for"
            )
        if given is not None and tokenizer_hash(given) != tokenizer_hash(there):
            raise ConfigError(f"data.tokenizer={given} is not what the weights of train.init_from are for ({there})")
        given = there
    if given is not None:
        wanted = tokenizer_hash(given)
    else:
        wanted = f"{config.model.vocabulary} byte pairs of {' '.join(map(corpus_identity, sources))}"
    path.parent.mkdir(parents=True, exist_ok=True)
    origin = path.with_suffix(".from")  # what the tokenizer there was made of
    with open(path.with_suffix(".lock"), "w") as lock:  # several processes want it: one makes it
        fcntl.flock(lock, fcntl.LOCK_EX)
        if path.exists() and origin.exists() and origin.read_text(encoding="utf-8") == wanted:
            return
        temporary = path.with_suffix(".tmp")
        if given is not None:
            vocabulary_in(given)  # says what is wrong with it
            shutil.copyfile(given, temporary)
        else:
            note(f"learning {config.model.vocabulary:,} byte pairs from the training text; kept in {path}")
            _learn(sources, config.model.vocabulary, temporary)
        origin.unlink(missing_ok=True)
        temporary.replace(path)
        origin.write_text(wanted, encoding="utf-8")


def _learn(sources: list[Corpus], size: int, path: Path) -> None:
    try:
        import tokenizers
        from tokenizers import decoders, models, pre_tokenizers, trainers
    except ImportError:
        raise ConfigError("a tokenizer is learned by the package tokenizers: pip install 'bytelm[tokenizers]', or give "
                          "one (data.tokenizer)") from None  # fmt: skip
    tokenizer = tokenizers.Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=size, special_tokens=[END], initial_alphabet=pre_tokenizers.ByteLevel.alphabet(), show_progress=False
    )
    tokenizer.train_from_iterator(_texts(sources), trainer)
    tokenizer.save(str(path))


def _texts(sources: list[Corpus]) -> Iterator[str]:
    left = LEARNED_FROM
    for corpus in sources:
        for document in range(len(corpus)):
            if left <= 0:
                return
            text = corpus.read(document, 0, left)
            left -= len(text)
            yield from _stretches(text.decode(errors="replace"))  # what is no text is refused later, with its place


def _stretches(text: str) -> Iterator[str]:
    """A text, cut inside what has no white space for very long, or nothing else: the time that the trainer takes grows
    with the square of the longest word (a million bases or binary digits: hours)."""
    start = 0
    for run in re.finditer(rf"(?<!\S)\S{{{LONGEST_WORD},}}|(?<!\s)\s{{{LONGEST_WORD},}}", text):
        for cut in range(run.start() + LONGEST_WORD, run.end(), LONGEST_WORD):
            yield text[start:cut]
            start = cut
    yield text[start:]


def text_tokens(tokenizer: Tokenizer, sources: list[Corpus], cache_dir: str, note: Note) -> list[TokenText]:
    """The tokens of each training source."""
    return [TokenText(_stored(tokenizer, corpus, cache_dir, note), tokenizer.ids, len(corpus)) for corpus in sources]


def _stored(tokenizer: Tokenizer, corpus: Corpus, cache_dir: str, note: Note) -> Path:
    """The file of a corpus's tokens; made where it does not exist yet."""
    identity = hashlib.sha256(
        f"{corpus_identity(corpus)} {tokenizer.replaces}".encode() + tokenizer.path.read_bytes()
    ).hexdigest()[:24]
    path = cache_folder(cache_dir) / "tokens" / f"{identity}.tokens"
    if path.exists():
        return path
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with open(path.with_suffix(".lock"), "w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            if not path.exists():
                note(f"cutting {corpus.describe()} into tokens, once; kept in {path}")
                _write(path, tokenizer, corpus, note)
    except OSError as e:
        raise ConfigError(f"{path}: cannot be written: {e}; name another data.cache_dir") from None
    return path


def _write(path: Path, tokenizer: Tokenizer, corpus: Corpus, note: Note) -> None:
    """Token by token; what a process that was killed left is written over."""
    ends, said, done = np.zeros(len(corpus), np.int64), time.monotonic(), 0
    temporary = path.with_suffix(".tmp")
    with open(temporary, "wb") as file:
        for document in range(len(corpus)):
            text = corpus.read(document)
            name, offset = corpus.place(document)
            ids = tokenizer.encode(text, f"{name}[{offset}:{offset + len(text)}]")
            file.write(np.array(ids, np.uint32).tobytes())
            ends[document] = len(ids) + (ends[document - 1] if document else 0)
            done += len(text)
            if time.monotonic() - said > 30:
                said = time.monotonic()
                note(f"tokens: {done / max(corpus.total_bytes, 1):.0%} of the text")
        file.flush()
        os.fsync(file.fileno())
    np.save(ends_table(path), ends)
    temporary.replace(path)
