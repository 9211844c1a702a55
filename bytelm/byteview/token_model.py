"""A token decoder that is asked about nodes of trees: it keeps what it has read in slots of one cache."""

import contextlib
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from numpy.typing import NDArray

from bytelm.byteview.cover import Node
from bytelm.config import ConfigError
from bytelm.models.build import Params
from bytelm.models.token_lm import TokenLMConfig, token_structure


def _extend(graph, params, ids, positions, slots, seen, places, wanted, cache):
    return nnx.merge(graph, params).extend(ids, positions, slots, seen, places, wanted, cache)


class TokenModel:
    """Runs a decoder over nodes; over the devices of `mesh`, if the parameters lie there. `options` are told to the
    compiler."""

    def __init__(
        self,
        config: TokenLMConfig,
        params: Params,
        mesh: jax.sharding.Mesh | None = None,
        options: dict[str, bool] | None = None,
    ):
        self.config, self.params, self.mesh = config, params, mesh
        self.graph, _ = token_structure(config)
        self._extend = jax.jit(_extend, static_argnames="graph", donate_argnames="cache", compiler_options=options)

    def extend(self, *arguments: Any) -> Any:
        """`TokenLM.extend`, compiled."""
        with contextlib.nullcontext() if self.mesh is None else jax.set_mesh(self.mesh):
            return self._extend(self.graph, self.params, *arguments)

    def session(self, slots: int = 256, lanes: int = 1) -> "Session":
        """An empty cache for so many texts side by side."""
        return Session(self, slots, lanes)


class Session:
    """A cache, which nodes are in it, and what the model said behind them. It grows as it is needed."""

    def __init__(self, model: TokenModel, slots: int, lanes: int):
        self.model = model
        self.room = slots
        self.cache = nnx.merge(model.graph, model.params).empty_cache(slots, lanes)
        self.used = [0] * lanes
        self.free: list[list[int]] = [[] for _ in range(lanes)]
        self.places = np.zeros((lanes, slots), np.int32)
        self.ancestors = np.zeros((lanes, slots, slots), bool)
        self.tokens_read = 0

    def _grow(self) -> None:
        more = self.room
        self.cache = jax.tree.map(lambda x: jnp.pad(x, ((0, 0), (0, 0), (0, 0), (0, more), (0, 0))), self.cache)
        self.places = np.pad(self.places, ((0, 0), (0, more)))
        self.ancestors = np.pad(self.ancestors, ((0, 0), (0, more), (0, more)))
        self.room += more

    def _seat(self, node: Node) -> None:
        """Gives a node a slot."""
        lane = node.lane
        if self.free[lane]:
            node.slot = self.free[lane].pop()
        else:
            while self.used[lane] >= self.room:
                self._grow()
            node.slot, self.used[lane] = self.used[lane], self.used[lane] + 1
        self.places[lane, node.slot] = node.depth
        row = self.ancestors[lane, node.slot]
        row[:] = False if node.parent is None else self.ancestors[lane, node.parent.slot]
        row[node.slot] = True

    def read(self, nodes: Sequence[Node]) -> NDArray[np.float32]:
        """Logits behind each node, [n, v]. Nodes come behind their parents, in the list or read before."""
        if not nodes:
            return np.zeros((0, self.model.config.vocabulary), np.float32)
        deep = max(node.depth for node in nodes)
        if deep >= self.model.config.context:
            raise ConfigError(f"the text has {deep + 1} tokens, the model knows {self.model.config.context} positions: "
                              "shorten the text, or ask for a window")  # fmt: skip
        lanes = len(self.used)
        columns, counts = [], [0] * lanes  # of each node: its place among those of its lane that are read now
        for node in nodes:
            self._seat(node)
            columns.append(counts[node.lane])
            counts[node.lane] += 1
        size = _power(max(counts))
        ids, positions = np.zeros((lanes, size), np.int32), np.zeros((lanes, size), np.int32)
        slots = np.full((lanes, size), self.room, np.int32)  # past the end: nowhere
        seen = np.zeros((lanes, size, self.room), bool)
        for node, column in zip(nodes, columns):
            at = node.lane, column
            ids[at], positions[at], slots[at] = node.token, node.depth, node.slot
            seen[at] = self.ancestors[node.lane, node.slot]
        wanted = np.zeros(_power(len(nodes)), np.int32)
        wanted[: len(nodes)] = [node.lane * size + column for node, column in zip(nodes, columns)]
        logits, self.cache = self.model.extend(ids, positions, slots, seen, self.places.copy(), wanted, self.cache)
        self.tokens_read += len(nodes)
        return np.asarray(logits)[: len(nodes)]

    def forget(self, nodes: Sequence[Node]) -> None:
        """Frees the slots of nodes that no node will look at any more."""
        for node in nodes:
            if node.slot >= 0:
                self.free[node.lane].append(node.slot)
                node.slot = -1


def _power(n: int) -> int:
    """The least power of two that is not below n: few sizes, so that few are compiled."""
    return 1 << (n - 1).bit_length()
