"""The tokenizer of a run whose model reads tokens: learned from its text or given, kept beside its checkpoints; and the
training text in its tokens, found once and kept on disk."""

import fcntl
import hashlib
import os
import shutil
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np

from bytelm.byteview.dropout import MergeDropout
from bytelm.byteview.tokenizer_files import vocabulary_in
from bytelm.config import Config, ConfigError, DataConfig, TokensConfig
from bytelm.data.corpus import Corpus
from bytelm.data.marks import corpus_identity
from bytelm.data.readers import DataError
from bytelm.data.sources import cache_folder
from bytelm.data.tokens import RandomSplits, Recut, TokenIds, TokenText, ends_table

FILE = "tokenizer.json"  # in a run's folder
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

    def encode(self, text: bytes, where: str) -> list[int]:
        """Tokens of a document. Raises DataError for what has none."""
        try:
            ids = self.vocabulary.encode(text.decode(errors="replace").encode() if self.replaces else text)
        except UnicodeDecodeError as e:
            raise DataError(f"{where}: byte {e.start} of the document is no UTF-8, which a tokenizer needs: clean the "
                            "text, or set data.reserved=replace (U+FFFD instead)") from None  # fmt: skip
        if ids is None:
            raise DataError(f"{where}: holds what the tokenizer has no tokens for")
        return ids

    def recut(self, config: DataConfig) -> Recut | None:
        """What cuts the text anew each time it is read, if anything does."""
        if config.token_splits:
            return RandomSplits(self.vocabulary.tokens, config.token_splits)
        return MergeDropout(self.path, config.merge_dropout) if config.merge_dropout else None


def open_tokenizer(config: Config, run_dir: Path, sources: list[Corpus], note: Note) -> Tokenizer:
    """The tokenizer of a run: the one in its folder; else the one given, or one learned now, which are put there.
    Raises ConfigError when it does not fit the model, or another one is given than the run began with."""
    assert isinstance(config.model, TokensConfig)
    path, given = run_dir / FILE, config.data.tokenizer
    run_dir.mkdir(parents=True, exist_ok=True)
    with open(run_dir / "tokenizer.lock", "w") as lock:  # several processes want it: one makes it
        fcntl.flock(lock, fcntl.LOCK_EX)
        if given and not Path(given).is_file():
            raise ConfigError(f"data.tokenizer={given}: no such file")
        if not path.exists():
            temporary = run_dir / "tokenizer.tmp"
            if given:
                vocabulary_in(Path(given))  # says what is wrong with it
                shutil.copyfile(given, temporary)
            else:
                note(f"learning {config.model.vocabulary:,} byte pairs from the training text; kept in {path}")
                _learn(sources, config.model.vocabulary, temporary)
            temporary.replace(path)
        elif given and Path(given).read_bytes() != path.read_bytes():
            raise ConfigError(f"data.tokenizer={given} is not what the run began with ({path})")
    (run_dir / "tokenizer.lock").unlink(missing_ok=True)
    tokenizer = Tokenizer(path, config.data.reserved)
    if len(tokenizer.ids.widths) > config.model.vocabulary:
        raise ConfigError(f"model.vocabulary={config.model.vocabulary}: {given or path} has "
                          f"{len(tokenizer.ids.widths)} tokens; set it to that, or more")  # fmt: skip
    return tokenizer


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
            yield text.decode(errors="replace")  # what is no text is refused later, with its place


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
