"""Draft trees: building one from beam candidates, verifying one by matching (inference.md 7, 8.1).

Everything here is bookkeeping on int32 arrays of a few dozen nodes, for a batch of rows.
"""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int

from minicpm_jax.infer.drafters import base


def num_candidates(k: int, num_levels: int) -> int:
  """Length of the flat candidate list: k on the first level, k * k on each later one."""
  if k < 1 or num_levels < 1:
    raise ValueError(f"k, num_levels: found {k}, {num_levels}, expected numbers >= 1")
  return k + (num_levels - 1) * k * k


def build(
  root_B: Int[Array, " B"],
  scores_BC: Float[Array, "B C"],
  tokens_BC: Int[Array, "B C"],
  beams_BLK: Int[Array, "B L K"],
  num_nodes: int,
) -> base.Tree:
  """The best num_nodes - 1 of all candidates as a tree under the root (EAGLE-2's reranking).

  Candidates lie flat: level 0 its k first, then of every later level row r's child c at
  k + (level - 1) k^2 + r k + c. Scores are cumulative log-probabilities in float32, so a child is
  never above its parent, and ties go to the lower index: a node's parent is always in the tree.
  beams_BLK[:, i]: flat indices of the k candidates that level i + 1 grew from, best first
  (beams_BLK[:, 0] = arange(k)). A candidate that may not be taken has score -inf; if it is needed
  to fill the tree it becomes a cut node.
  """
  B, L, k = beams_BLK.shape
  if scores_BC.shape[1] != num_candidates(k, L):
    raise ValueError(
      f"scores_BC: found {scores_BC.shape[1]} candidates, expected {num_candidates(k, L)} for "
      f"{L} levels of {k}"
    )
  if not 1 <= num_nodes <= scores_BC.shape[1] + 1:
    raise ValueError(f"num_nodes: found {num_nodes}, expected 1..{scores_BC.shape[1] + 1}")

  def one(root, scores_C, tokens_C, beams_LK):
    best, at = jax.lax.top_k(scores_C, num_nodes - 1)
    order = jnp.argsort(at)  # ascending flat index: parents come before children
    sel, score = at[order].astype(jnp.int32), best[order]
    level = jnp.where(sel < k, 0, (sel - k) // k**2 + 1)
    row = ((sel - k) % k**2) // k
    above = beams_LK[jnp.maximum(level - 1, 0), row]
    at_parent = jnp.searchsorted(sel, above, method="compare_all")  # the default is a loop
    parent = jnp.where(level == 0, 0, at_parent + 1).astype(jnp.int32)
    zero = jnp.zeros((1,), jnp.int32)
    tok = jnp.where(jnp.isneginf(score), base.CUT, tokens_C[sel])
    parent = jnp.concatenate((zero, parent))
    depth = jnp.concatenate((zero, level.astype(jnp.int32) + 1))
    tok = jnp.concatenate((root[None], tok.astype(jnp.int32)))
    return tok, parent, depth, ancestors(parent, L)

  tok, parent, depth, anc = jax.vmap(one)(root_B, scores_BC, tokens_BC, beams_BLK)
  return base.Tree(tok_BP=tok, parent_BP=parent, depth_BP=depth, anc_BPP=anc)


def ancestors(parent_P: Int[Array, " P"], num_levels: int) -> Bool[Array, "P P"]:
  """[i, j]: j is i or above it; the root is its own parent and everybody's ancestor."""
  own = jnp.eye(parent_P.shape[0], dtype=bool)
  anc = own
  for _ in range(num_levels):
    anc = own | anc[parent_P]
  return anc


def match(
  tree: base.Tree, y_BP: Int[Array, "B P"], num_levels: int
) -> tuple[Int[Array, " B"], Int[Array, "B A"], Int[Array, "B A"]]:
  """(accepted, path, new): how many tokens a round emits, by which nodes, and which tokens.

  y_BP: the target's own sample after each node. A node is accepted iff every node on its path is
  what the target sampled at its parent; the deepest such node ends the path (siblings differ, so it
  is unique). new[:accepted] are the accepted drafts and one token more; A = num_levels + 1.
  """

  def one(tok, parent, depth, anc, y):
    is_match = (tok == y[parent]) & (tok >= 0)
    is_match = is_match.at[0].set(True)
    is_ok = jnp.all(~anc | is_match[None, :], axis=1)
    best = jnp.argmax(jnp.where(is_ok, depth, -1))
    levels_A1 = jnp.arange(num_levels + 1, dtype=jnp.int32)[:, None]
    is_at = anc[best][None, :] & (depth[None, :] == levels_A1)
    path = jnp.argmax(is_at, axis=1).astype(jnp.int32)  # 0 beyond the deepest
    return depth[best] + 1, path, y[path]

  return jax.vmap(one)(tree.tok_BP, tree.parent_BP, tree.depth_BP, tree.anc_BPP, y_BP)


def seen_by_nodes(
  seen_BV: Bool[Array, "B V"], tree: base.Tree, num_levels: int
) -> Bool[Array, "BP V"]:
  """Tokens of the context of every node: those of its row, its ancestors' and its own."""

  def one(seen_V, tok, depth, anc):
    P, V = tok.shape[0], seen_V.shape[0]
    levels_1A1 = jnp.arange(num_levels + 1, dtype=jnp.int32)[None, :, None]
    is_at_PAP = anc[:, None, :] & (depth[None, None, :] == levels_1A1)
    ids_PA = jnp.where(jnp.any(is_at_PAP, -1), tok[jnp.argmax(is_at_PAP, -1)], V)
    ids_PA = jnp.where(ids_PA < 0, V, ids_PA)
    rows_P1 = jnp.arange(P)[:, None]
    return jnp.broadcast_to(seen_V, (P, V)).at[rows_P1, ids_PA].set(True, mode="drop")

  seen_BPV = jax.vmap(one)(seen_BV, tree.tok_BP, tree.depth_BP, tree.anc_BPP)
  return jnp.reshape(seen_BPV, (-1, seen_BV.shape[1]))


# --- Host side: a constraint walks the tree -------------------------------------------------------


def walk(
  constraint: Any,
  tok_P: np.ndarray,
  parent_P: np.ndarray,
  mask_PW: np.ndarray,
  *,
  fast_forward: bool = False,
) -> np.ndarray:
  """Fills row i of int32 mask_PW with the tokens that may follow node i; tok_P with nodes cut.

  `constraint` (fill_mask, consume, rollback, is_stopped) stands behind the root, node 0, and stands
  there again afterwards. Nodes that it forbids are cut with all below them (inference.md 16);
  their rows, and those of nodes behind which nothing may follow, allow everything: nobody samples
  there. fast_forward: a node behind which tokens are forced is cut too. The round then ends with
  its token, and what follows is appended as without a draft, in no cut of the draft's.
  """
  children: list[list[int]] = [[] for _ in tok_P]
  for node in range(1, len(tok_P)):
    children[parent_P[node]].append(node)
  out_P = np.full_like(tok_P, base.CUT)
  out_P[0] = tok_P[0]
  mask_PW[:] = -1
  if not constraint.is_stopped():
    constraint.fill_mask(mask_PW[0])
  pending = [(child, True) for child in reversed(children[0])]  # True = go in, False = leave
  while pending:
    node, is_entry = pending.pop()
    if not is_entry:
      constraint.rollback(1)
    elif tok_P[node] >= 0 and constraint.consume(int(tok_P[node])):
      if fast_forward and len(constraint.forced_tokens()) > 1:
        constraint.rollback(1)
        continue
      out_P[node] = tok_P[node]
      if not constraint.is_stopped():
        constraint.fill_mask(mask_PW[node])
      pending.append((node, False))
      pending += [(child, True) for child in reversed(children[node])]
  return out_P
