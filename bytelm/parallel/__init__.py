"""Mesh and sharding rules."""

from bytelm.parallel.mesh import make_mesh, shard
from bytelm.parallel.rules import logical_axes, path_string, state_shardings

__all__ = ["logical_axes", "make_mesh", "path_string", "shard", "state_shardings"]
