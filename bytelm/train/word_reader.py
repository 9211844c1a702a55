"""Teaches the word reader of a HAT around a tokenized model's blocks (train.backbone) what those blocks were trained to
be given: of each word, the mean of the embeddings that the tokenizer's tokens for it have. It costs the encoder and the
pooling alone, and the blocks then see what they know from the first step on."""

import itertools
from collections.abc import Sequence
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx
from numpy.typing import NDArray

from bytelm.byteview.vocabulary import Vocabulary
from bytelm.config import Config, HATConfig
from bytelm.data.corpus import Corpus
from bytelm.data.words import split_bytes
from bytelm.interop.backbone import Blocks
from bytelm.models.build import Params, byte_ids, structure
from bytelm.models.flops import TRAIN_FACTOR, reader_flops, target_bytes_per_chunk
from bytelm.parallel.mesh import compiler_options

ROWS, LEARNING_RATE = 8, 3e-3
READER = ("embed", "encoder", "pool")  # the parameters that are taught


class Words:
    """Rows of training text, drawn at random, and what each of their words should become."""

    def __init__(self, config: Config, sources: Sequence[Corpus], vocabulary: Vocabulary, embeddings: NDArray):
        assert isinstance(config.model, HATConfig)
        self.rule, self.most, self.length = config.model.rule, config.model.max_word, config.data.seq_len
        self.ids, self.vocabulary, self.embeddings = byte_ids(config.model, "replace"), vocabulary, embeddings
        self.sources, self.ends = sources, [np.cumsum(corpus.lengths) for corpus in sources]
        self.sizes = np.array([ends[-1] for ends in self.ends], np.float64)
        self.rng = np.random.default_rng([config.train.seed, 0x776F7264])
        self.known: dict[bytes, NDArray | None] = {}

    def embedding(self, word: bytes) -> NDArray | None:
        """Mean of the embeddings of a word's tokens; None where it has none."""
        if word not in self.known:
            text = word.removeprefix(b" ") if self.vocabulary.lead else word
            try:
                ids = self.vocabulary.encode(text, behind_special=not self.vocabulary.lead)
            except UnicodeDecodeError:
                ids = None
            self.known[word] = self.embeddings[ids].mean(axis=0) if ids else None
        return self.known[word]

    def draw(self) -> tuple[NDArray[np.int32], NDArray[np.float32], NDArray[np.bool_]]:
        """Inputs [b, t], at the first byte of each word what it should become [b, t, e], and where that is known. The
        last word of a row may be cut and is left out."""
        inputs = np.zeros((ROWS, self.length), np.int32)
        wanted = np.zeros((ROWS, self.length, self.embeddings.shape[1]), np.float32)
        known = np.zeros((ROWS, self.length), bool)
        for row in range(ROWS):
            source = int(self.rng.choice(len(self.sources), p=self.sizes / self.sizes.sum()))
            corpus, ends = self.sources[source], self.ends[source]
            document = int(np.searchsorted(ends, self.rng.integers(ends[-1]), side="right"))
            room = max(int(corpus.lengths[document]) - self.length + 1, 0)
            first = int(self.rng.integers(room + 1))
            text = self.ids.clean(corpus.read(document, first, first + self.length - 1))[: self.length - 1]
            inputs[row, 0] = self.ids.start
            inputs[row, 1 : len(text) + 1] = np.frombuffer(text, np.uint8)
            starts = split_bytes(text, self.rule, self.most).tolist()
            for begin, end in itertools.pairwise(starts):
                vector = self.embedding(text[begin:end])
                at = begin + 1 if begin else 0  # the first word begins at the start symbol
                if vector is not None:
                    wanted[row, at], known[row, at] = vector, True
        return inputs, wanted, known


def teach_words(
    config: Config, params: Params, blocks: Blocks, vocabulary: Vocabulary, sources: Sequence[Corpus]
) -> tuple[Params, float, float]:
    """(parameters with a taught word reader, its error at the end over the embeddings' mean square, FLOPs)."""
    model, steps = config.model, config.train.word_steps
    assert isinstance(model, HATConfig)
    graph, _ = structure(model)
    words, size = Words(config, sources, vocabulary, blocks.embeddings), blocks.embedding_size
    optimizer = optax.adam(optax.warmup_cosine_decay_schedule(0.0, LEARNING_RATE, min(20, steps // 2), steps))

    def loss(reader, rest, inputs, wanted, known):
        e, units = nnx.merge(graph, {**rest, **reader}).words(inputs)
        at = jnp.minimum(units.first, inputs.shape[1] - 1)
        target = jnp.take_along_axis(wanted, at[..., None], axis=1)
        real = jnp.take_along_axis(known, at, axis=1) & (units.first < inputs.shape[1])
        error = jnp.mean((e.astype(jnp.float32) - target) ** 2, axis=-1) / size**2
        return jnp.sum(jnp.where(real, error, 0)) / jnp.maximum(jnp.sum(real), 1)

    @partial(jax.jit, compiler_options=compiler_options(jax.sharding.get_mesh()))
    def step(reader, state, rest, *batch):
        value, grads = jax.value_and_grad(loss)(reader, rest, *batch)
        updates, state = optimizer.update(grads, state)
        return optax.apply_updates(reader, updates), state, value

    rest = {name: value for name, value in params.items() if name not in READER}
    reader = {name: params[name] for name in READER}
    state, errors = optimizer.init(reader), []
    for _ in range(steps):
        reader, state, error = step(reader, state, rest, *words.draw())
        errors.append(error)
    t = config.data.seq_len
    spent = TRAIN_FACTOR * reader_flops(model, t, target_bytes_per_chunk(model)[0]) * steps * ROWS * t
    return {**params, **reader}, float(np.mean(jax.device_get(errors[-20:]))), spent
