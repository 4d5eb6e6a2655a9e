"""Parameter trees by path: "layers/attn/q/kernel" names, counts, casts."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp


def path_str(path: Sequence[Any]) -> str:
  """A jax key path as "a/b/c"."""
  return jax.tree_util.keystr(tuple(path), simple=True, separator="/")


def flatten_paths(tree: Any, is_leaf: Callable[[Any], bool] | None = None) -> dict[str, Any]:
  """Path -> leaf, in tree order; `is_leaf` stops at larger nodes (a QTensor)."""
  leaves = jax.tree_util.tree_leaves_with_path(tree, is_leaf=is_leaf)
  return {path_str(path): leaf for path, leaf in leaves}


def unflatten(leaves: Mapping[str, Any]) -> dict[str, Any]:
  """Nested dict of "a/b/c" -> leaf; refuses a path that is both a leaf and a folder."""
  tree: dict[str, Any] = {}
  for path, leaf in leaves.items():
    *parents, name = path.split("/")
    node = tree
    for parent in parents:
      node = node.setdefault(parent, {})
      if not isinstance(node, dict):
        raise ValueError(f"{path}: found a leaf at {parent!r}, expected a subtree")
    if name in node:
      raise ValueError(f"{path}: found twice (as a leaf or a subtree), expected once")
    node[name] = leaf
  return tree


def map_with_path(
  fn: Callable[..., Any], tree: Any, *rest: Any, is_leaf: Callable[[Any], bool] | None = None
) -> Any:
  """`fn(path, leaf, *leaves of rest)` on every leaf, path as "a/b/c"."""

  def one(path: Sequence[Any], *leaves: Any) -> Any:
    return fn(path_str(path), *leaves)

  return jax.tree_util.tree_map_with_path(one, tree, *rest, is_leaf=is_leaf)


def num_params(tree: Any) -> int:
  """Number of scalars in arrays or shape structs."""
  return sum(int(x.size) for x in jax.tree.leaves(tree))


def nbytes(tree: Any) -> int:
  """Bytes of arrays or shape structs."""
  return sum(int(x.size) * jnp.dtype(x.dtype).itemsize for x in jax.tree.leaves(tree))


def cast(tree: Any, dtype: Any) -> Any:
  """Floating-point leaves to `dtype`; integers, bools and keys stay."""

  def one(x: Any) -> Any:
    return x.astype(dtype) if jnp.issubdtype(x.dtype, jnp.floating) else x

  return jax.tree.map(one, tree)
