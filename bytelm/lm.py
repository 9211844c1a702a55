"""Networks trained on bytes as byte language models, and `load`."""

import copy
import dataclasses
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import jax
import numpy as np
from flax import nnx
from numpy.typing import NDArray

from bytelm.boundaries import Boundaries, first_rows, text_boundaries
from bytelm.byteview.byte_view import TokenizedLM
from bytelm.byteview.token_model import TokenModel
from bytelm.byteview.tokenizer_files import (
    read_chat_template,
    read_vocabulary,
    run_tokenizer,
    token_ids,
    tokenizer_hash,
    vocabulary_in,
)
from bytelm.byteview.tokenizer_json import vocabulary_of
from bytelm.byteview.vocabulary import Vocabulary
from bytelm.cached_steps import CachedSteps
from bytelm.checkpoint import (
    CheckpointError,
    find_checkpoint,
    list_steps,
    read_meta,
    restore_params,
    stored_config,
)
from bytelm.config import (
    Config,
    ConfigError,
    HATConfig,
    MeshConfig,
    ModelConfig,
    T5Config,
    TokensConfig,
    longest_row,
)
from bytelm.copying import Counts
from bytelm.data.words import WordRule
from bytelm.drafts import Draft, Drafting, check_draft, drafted_bytes
from bytelm.generate import Decoder, bucket, generate_bytes, pad_rows, visible_inputs
from bytelm.interop import token_lm
from bytelm.interop.gguf_file import open_gguf
from bytelm.interop.published import NO_MODEL, is_model, open_model, open_tensors, read_record, weights_file
from bytelm.interop.trained_tokens import decoder_params, own_config
from bytelm.kernels import on_any_device
from bytelm.models.build import Params, byte_ids, structure, word_rule
from bytelm.models.slot_guess import SlotGuess
from bytelm.models.token_lm import token_structure
from bytelm.parallel.mesh import compiler_options, make_mesh
from bytelm.parallel.rules import TOKEN_RULES, cast_matrices, state_shardings
from bytelm.protocol import ByteLM, Score, Text, in_context, log_softmax, no_inputs
from bytelm.seq2seq_lm import Seq2SeqLM
from bytelm.vocab import REPLACEMENT, encode
from bytelm.windows import DEFAULT_WINDOW, document_windows


@partial(jax.jit, static_argnames=("graph", "slots"))
def _forward(graph, params, symbols, inputs, lengths, marks=None, slots=None):
    """Logits over the symbols, and the slots that rows of these lengths need at each level."""
    more = {} if marks is None else {"marks": marks}
    out = nnx.merge(graph, params)(inputs, capacity=slots, **more)
    real = (level.boundary & (level.position < lengths[:, None]) for level in out.levels)
    return out.logits[..., symbols], [jax.numpy.sum(boundary, axis=1).max() for boundary in real]


@partial(jax.jit, static_argnames="graph")
def _levels(graph, params, inputs):
    return nnx.merge(graph, params)(inputs).levels


@partial(jax.jit, static_argnames="graph")
def _forward_last(graph, params, symbols, inputs, lengths):
    logits = nnx.merge(graph, params)(inputs).logits
    return jax.numpy.take_along_axis(logits, (lengths - 1)[:, None, None], axis=1)[:, 0, symbols]


class NetworkLM(ByteLM):
    """A network trained on bytes, as a ByteLM."""

    def __init__(
        self,
        config: ModelConfig,
        params: Params,
        context: int,
        batch_bytes: int = 1 << 15,
        reserved: str = "error",
        wait: float = 0.0,
        draft: Draft = "none",
    ):
        """`context` is the row length it was trained on; forward passes take about `batch_bytes` positions at once.

        `reserved`: what happens to bytes in a text that the family keeps for itself: error, or replace (by U+FFFD).
        `wait`: in batched generation with an H-Net, rows wait at their boundaries until this share of them
        does, so that the inner network runs less often; 0: they never wait. The bytes are the same.
        `draft`: how next bytes are guessed, to be verified several at once (`drafts.py`): not at all, copied from the
        text, by a chunk model's own decoder, or by heads for further bytes; the bytes are the same but where
        rounding decides, and `counts` says how often it guessed right.
        """
        if not 0 <= wait <= 1:
            raise ConfigError(f"wait={wait}: must be in [0, 1]")
        self.config = config
        self.params = params = cast_matrices(params, config.dtype)
        self.ids = byte_ids(config, reserved)
        self.wait = wait
        self.window = min(DEFAULT_WINDOW, context, longest_row(config, context))
        self.graph, abstract = structure(config)
        check_draft(draft, nnx.merge(self.graph, abstract))
        self.decoder = Decoder(self.graph, params)
        if wait and draft != "none":
            raise ConfigError(f"wait={wait} with draft={draft!r}: choose one")
        self.draft: Draft = draft
        self.counts = Counts()
        self._symbols = self.ids.symbol_ids()
        self._possible = self.ids.possible()
        self._batch_bytes = batch_bytes
        self._marks: WordRule | None = None  # how rows to score are marked; None: the network finds its units
        self._slots = SlotGuess(config)

    def released(self) -> "NetworkLM":
        """The same HAT, scoring as it is published: guides change with a word's first byte, before a reader of bytes
        can know of the word. Its other answers stay as they are. Raises ConfigError for other families."""
        if not isinstance(self.config, HATConfig):
            raise ConfigError(f"a {self.config.family} model has no guides that could be released ones")
        other = copy.copy(self)
        other.graph, _ = structure(dataclasses.replace(self.config, guide="released"))
        other._marks = word_rule(self.config)
        return other

    def _batches(self, rows: list[NDArray[np.int32]]) -> Iterator[tuple[list[int], NDArray, NDArray]]:
        """Groups rows of like length into padded batches: (indices, inputs, lengths)."""
        order = sorted(range(len(rows)), key=lambda i: len(rows[i]))
        while order:
            width = bucket(len(rows[order[-1]]), 32)
            count = min(max(self._batch_bytes // width, 1), bucket(len(order)))
            group, order = order[-count:], order[:-count]
            yield group, *pad_rows([rows[i] for i in group], bucket(len(group)), width)

    def logprobs_batch(self, prefixes: Sequence[Text], *, inputs: Sequence[Text] | None = None) -> NDArray[np.float64]:
        no_inputs(inputs)
        rows = [visible_inputs(self._clean(p), self.ids, self.window) for p in prefixes]
        out = np.zeros((len(rows), len(self._symbols)))
        for group, padded, lengths in self._batches(rows):
            logits = _forward_last(self.graph, self.params, self._symbols, padded, lengths)
            out[group] = log_softmax(np.asarray(logits)[: len(group)], self._possible)
        return out

    def score_batch(
        self,
        texts: Sequence[Text],
        contexts: Sequence[Text] | None = None,
        window: int | None = None,
        *,
        inputs: Sequence[Text] | None = None,
    ) -> list[Score]:
        no_inputs(inputs)
        if window is not None and window < 1:
            raise ConfigError(f"window={window}: must be at least 1")
        window = window or self.window
        originals = in_context(texts, contexts)
        cleaned = [(self._clean(context), self._clean(text)) for context, text in originals]
        scores = [np.zeros(len(text)) for _, text in cleaned]
        greedy = [np.zeros(len(text), bool) for _, text in cleaned]
        rows = [
            (n, start, x, y)
            for n, (context, text) in enumerate(cleaned)
            for start, x, y in self._text_windows(context, text, window)
        ]
        for group, padded, lengths in self._batches([x for _, _, x, _ in rows]):
            marks = None
            if self._marks is not None:
                marks = np.zeros(padded.shape, np.int32)
                for line, row in zip(marks, group):
                    _, _, x, y = rows[row]  # with the byte behind the inputs, whose first bytes may be the row's last
                    text = x.astype(np.uint8).tobytes() + bytes([y[-1]])
                    line[: len(x)] = self._marks.marks(text)[: len(x)]
            logits = self._logits(padded, lengths, marks)
            for line, row in zip(logits, group):
                n, start, x, y = rows[row]
                scored = log_softmax(line[len(x) - len(y) : len(x)], self._possible)
                scores[n][start : start + len(y)] = scored[np.arange(len(y)), y]
                greedy[n][start : start + len(y)] = scored.argmax(axis=1) == y
        return [self._score(text, s, g) for (_, text), s, g in zip(originals, scores, greedy)]

    def _logits(self, padded: NDArray[np.int32], lengths: NDArray[np.int32], marks: NDArray | None) -> NDArray:
        """Logits of rows, [b, t, 257]: with few slots for chunks, and where those were not enough, with all."""
        slots = self._slots.slots(padded.shape[1])
        logits, needs = _forward(self.graph, self.params, self._symbols, padded, lengths, marks, slots)
        if slots is not None and not self._slots.enough(slots, [int(need) for need in needs]):
            logits, _ = _forward(self.graph, self.params, self._symbols, padded, lengths, marks)
        return np.asarray(logits)

    def _score(self, text: bytes, logs: NDArray[np.float64], greedy: NDArray[np.bool_]) -> Score:
        """A score per byte of the caller's text: a replaced byte has the sum of what stands in its place."""
        if len(logs) != len(text):
            widths = np.ones(len(text), np.int64)
            widths[self.ids.reserved_positions(text)] = len(REPLACEMENT)
            first = np.cumsum(widths) - widths
            logs, greedy = np.add.reduceat(logs, first), np.logical_and.reduceat(greedy, first)
        return Score(float(logs.sum()), logs, greedy)

    def _clean(self, text: Text) -> bytes:
        return self.ids.clean(encode(text))

    def _text_windows(self, context: bytes, text: bytes, window: int):
        """(offset in text, inputs, bytes scored) of each window; the scored bytes are the last of the inputs."""
        start = 0
        for inputs, targets, first in document_windows(context + text, self.ids, window, len(context)):
            scored = targets[first:] - self.ids.offset
            yield start, inputs, scored
            start += len(scored)

    def _continue(self, prompts, inputs, max_bytes, sampling, seed, stop, block):
        no_inputs(inputs)
        if self.draft != "none":
            texts = [self._clean(p) for p in prompts]
            make = partial(
                Drafting, self.decoder, self.ids, texts, window=self.window, max_bytes=max_bytes,
                sampling=sampling, seed=seed, draft=self.draft, counts=self.counts,
            )  # fmt: skip
            return drafted_bytes(make, len(prompts), max_bytes, stop, block)
        return generate_bytes(
            self.decoder, self.ids, [self._clean(p) for p in prompts], window=self.window,
            max_bytes=max_bytes, sampling=sampling, seed=seed, stop=stop, block=block, wait=self.wait,
        )  # fmt: skip

    def follow(self, prompts: Sequence[Text], *, inputs: Sequence[Text] | None = None) -> CachedSteps:
        no_inputs(inputs)
        texts = [encode(p) for p in prompts]
        return self._steps(texts, lambda text: visible_inputs(self._clean(text), self.ids, self.window))

    def reopen(self, text: bytes, first: int) -> CachedSteps:
        def inputs_of(grown: bytes) -> NDArray[np.int32]:
            body = np.frombuffer(self._clean(grown), np.uint8).astype(np.int32) + self.ids.offset
            return body if first else np.concatenate([[np.int32(self.ids.start)], body]).astype(np.int32)

        return self._steps([text[max(first - 1, 0) :]], inputs_of)

    def _steps(self, texts: list[bytes], inputs_of: Callable[[bytes], NDArray[np.int32]]) -> CachedSteps:
        return CachedSteps(self.decoder, self.ids, texts, inputs_of, self.window)

    def boundaries(self, text: Text) -> list[Boundaries]:
        def levels_of(row: NDArray[np.int32]):
            inputs, _ = pad_rows([row], 1, bucket(len(row) + 1, 32))  # room behind it, to see that a character is none
            return first_rows(_levels(self.graph, self.params, inputs))

        return text_boundaries(levels_of, encode(text), self.ids, self.window)


def load(
    path: str | Path,
    *,
    checkpoint: str = "latest",
    dtype: str | None = None,
    config: str | Path | None = None,
    reserved: str | None = None,
    wait: float = 0.0,
    draft: Draft = "none",
    deletion: str | None = None,
    semantics: str | None = None,
    beam: int = 64,
    long_text: str = "refuse",
    mesh: MeshConfig | None = None,
) -> ByteLM:
    """Loads a model as a ByteLM: a run directory of `bytelm train`, one of its checkpoints, a weights directory of
    `bytelm convert`, a folder with an H-Net, ByT5, MrT5, HAT, SpaceByte, MegaByte or BLT checkpoint and its
    config.json, a bare file of weights with its `config`, a folder of transformers with a tokenized model (GPT-2,
    Llama, Mistral, Qwen) and its tokenizer, or a .gguf file of one.

    `checkpoint` is latest, best, or a step; `dtype` overrides the compute type (float32, bfloat16); `reserved` (None:
    as the run was trained, else error), `wait` and `draft` as in `NetworkLM`; `deletion` as in `Seq2SeqLM`;
    `semantics` (None: masked), `beam` and `long_text` as in `TokenizedLM`, whose weights are laid over the devices by
    `mesh`. Raises CheckpointError when nothing readable is there, ConfigError for what this version cannot load.
    """
    path = Path(path)
    if not path.exists():
        raise CheckpointError(f"{path}: no such file or directory")
    bytes_of_tokens = dict(semantics=semantics or "masked", beam=beam, long_text=long_text, draft=draft)
    if path.suffix == ".gguf" or (path.is_dir() and token_lm.is_token_lm(read_record(path))):
        return _tokenized(path, dtype, mesh, **bytes_of_tokens)
    trained = run_tokenizer(path) is not None
    if mesh is not None:
        raise ConfigError(
            f"mesh: {path} is no published tokenized model; only those are laid over several devices to be asked"
        )
    if semantics is not None and not trained:
        raise ConfigError(
            f"semantics={semantics!r}: {path} is no tokenized model, its byte probabilities mean one thing"
        )
    if is_model(path):
        stored = open_model(path, Path(config) if config else None)
        network = _for_here(stored.config, dtype)
        return _as_lm(
            network, jax.device_put(stored.read()), stored.context, reserved or "error", wait, draft, deletion
        )
    if config is not None:
        raise ConfigError(f"{path} is a run with a config of its own; config goes with a bare file of weights")
    run, params = load_run(path, checkpoint)
    if isinstance(run.model, TokensConfig):
        for name, given in (("wait", wait), ("deletion", deletion), ("reserved", reserved)):
            if given:
                raise ConfigError(f"{name}: {path} is a tokenized model, which has none")
        return _trained_tokens(path, checkpoint, run, params, dtype, **bytes_of_tokens)
    kept = reserved or run.data.reserved
    return _as_lm(_for_here(run.model, dtype), params, run.data.seq_len, kept, wait, draft, deletion)


def _tokenized(path: Path, dtype: str | None, mesh: MeshConfig | None, **options: Any) -> TokenizedLM:
    if dtype not in (None, "float32", "bfloat16"):
        raise ConfigError(f"dtype {dtype!r}: choose float32 or bfloat16")
    vocabulary = load_vocabulary(path)
    if path.suffix == ".gguf":
        record, tensors, _ = open_gguf(path)
        file, template = path, record["chat_template"]
    else:
        record, file = read_record(path), weights_file(path)
        tensors, template = open_tensors(file), read_chat_template(path)
    config = token_lm.config_from(record, str(path), dtype or "float32")
    abstract = token_structure(config)[1]
    devices = None if mesh is None else make_mesh(mesh)
    shardings = None if devices is None else state_shardings(devices, abstract, TOKEN_RULES)
    params = token_lm.params_from(tensors, config, abstract, str(file), shardings)
    model = TokenModel(config, params, devices, compiler_options(devices))
    return TokenizedLM(model, vocabulary, chat_template=template, **options)


def _trained_tokens(
    path: Path, checkpoint: str, run: Config, params: Params, dtype: str | None, **options: Any
) -> TokenizedLM:
    model = _for_here(run.model, dtype)
    assert isinstance(model, TokensConfig)
    config = own_config(model, run.data.seq_len)
    vocabulary = vocabulary_in(trained_tokenizer(path, checkpoint), model.vocabulary)
    return TokenizedLM(TokenModel(config, decoder_params(params, model)), vocabulary, **options)


def trained_tokenizer(path: Path, checkpoint: str = "latest") -> Path:
    """The tokenizer that a checkpoint of a run was trained with. Raises CheckpointError where it is not there."""
    file, wanted = run_tokenizer(path), read_meta(_checkpoint_of(path, checkpoint)).get("tokenizer")
    if file is None or tokenizer_hash(file) != wanted:
        why = "is not there any more" if file is None else "is not the one that its weights were trained with"
        raise CheckpointError(f"{path}: the run's tokenizer.json {why} (it stands in the run's folder)")
    return file


def load_vocabulary(path: Path) -> Vocabulary:
    """The tokens of a tokenized model's folder or .gguf file, or of a run. Raises ConfigError where there are none."""
    file = run_tokenizer(path)
    if file is not None:
        return vocabulary_in(file)
    if path.suffix == ".gguf":
        record, _, tokenizer = open_gguf(path)
        return vocabulary_of(tokenizer, **token_ids(record))
    return read_vocabulary(path, read_record(path))


def _as_lm(
    config: ModelConfig, params: Params, context: int, reserved: str, wait: float, draft: Draft, deletion: str | None
) -> ByteLM:
    if isinstance(config, T5Config):
        return Seq2SeqLM(config, params, context, deletion=deletion or "hard", draft=draft)
    if deletion is not None:
        raise ConfigError(f"deletion={deletion!r}: a {config.family} model deletes nothing")
    return NetworkLM(config, params, context, reserved=reserved, wait=wait, draft=draft)


def _checkpoint_of(path: Path, checkpoint: str) -> Path:
    """The folder of a run's checkpoint, or the checkpoint that `path` is. Raises CheckpointError."""
    if list_steps(path / "checkpoints") or list_steps(path / "best"):
        return find_checkpoint(path, checkpoint)
    if (path / "meta").is_dir():
        return path
    open_model(path)  # says what this folder is instead
    raise CheckpointError(f"{path}: {NO_MODEL}")


def load_run(path: Path, checkpoint: str = "latest") -> tuple[Config, Params]:
    """Config and weights of a run directory or one of its checkpoints. Raises CheckpointError, ConfigError."""
    folder = _checkpoint_of(path, checkpoint)
    config = stored_config(read_meta(folder), str(folder))
    device = jax.sharding.SingleDeviceSharding(jax.local_devices()[0])
    abstract = jax.tree.map(
        lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=device), structure(config.model)[1]
    )
    return config, restore_params(folder, abstract)


def _for_here(model: ModelConfig, dtype: str | None) -> ModelConfig:
    if dtype not in (None, "float32", "bfloat16"):
        raise ConfigError(f"dtype {dtype!r}: choose float32 or bfloat16")
    return dataclasses.replace(on_any_device(model), **({"dtype": dtype} if dtype else {}))
