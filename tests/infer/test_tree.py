"""Building and matching trees against brute force over explicit paths."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from minicpm_jax.infer import tree as tree_lib
from minicpm_jax.infer.drafters import base

SHAPES = [(10, 2, 12), (10, 6, 60), (3, 4, 9), (1, 5, 6), (4, 3, 5)]  # k, levels, nodes


def beam(k, levels, seed, vocab=50):
  """Flat candidates of a beam search and, apart, every candidate's path and score.

  Log-probabilities are multiples of 1/8, so that ties abound.
  """
  rng = np.random.default_rng(seed)
  scores, tokens, beams, paths = [], [], [], []
  heads = [((), 0.0)]
  for level in range(levels):
    first = len(scores)
    for path, score in heads:
      drawn = rng.choice(vocab, k, replace=False)
      steps = np.sort(-np.round(rng.exponential(size=k) * 8) / 8)[::-1]
      for token, step in zip(drawn, steps, strict=True):
        scores.append(score + step)
        tokens.append(int(token))
        paths.append((*path, int(token)))
    if level == 0:
      best = list(range(k))
    else:
      new = range(first, len(scores))
      best = sorted(new, key=lambda i: (-scores[i], i))[:k]
    beams.append(best)
    heads = [(paths[i], scores[i]) for i in best]
  return np.array(scores, np.float32), np.array(tokens), np.array(beams), paths


@pytest.mark.parametrize("k, levels, num", SHAPES)
def test_build_takes_the_best_candidates_and_is_closed(k, levels, num):
  build = jax.jit(tree_lib.build, static_argnums=4)
  batch = [beam(k, levels, seed) for seed in range(6)]
  stack = lambda i: jnp.asarray(np.stack([b[i] for b in batch]))  # noqa: E731
  root = jnp.arange(100, 106, dtype=jnp.int32)
  tree = build(root, stack(0), stack(1).astype(jnp.int32), stack(2).astype(jnp.int32), num)
  for row, (scores, _, _, paths) in enumerate(batch):
    best = sorted(range(len(scores)), key=lambda i: (-scores[i], i))[: num - 1]
    expected = {paths[i] for i in best}
    tok, parent = np.asarray(tree.tok_BP[row]), np.asarray(tree.parent_BP[row])
    anc = np.asarray(tree.anc_BPP[row])
    found = []
    for node in range(1, num):
      path, at = [], node
      while at:
        assert parent[at] < at
        path.append(int(tok[at]))
        at = parent[at]
      found.append(tuple(path[::-1]))
      assert tree.depth_BP[row, node] == len(path)
      chain = {node}
      at = node
      while at:
        at = int(parent[at])
        chain.add(at)
      assert set(np.nonzero(anc[node])[0]) == chain
    assert len(set(found)) == num - 1 and set(found) == expected
    assert tok[0] == 100 + row and set(np.nonzero(anc[0])[0]) == {0}


def test_candidates_that_must_not_be_taken_are_cut():
  scores = jnp.asarray([[0.0, -jnp.inf, -jnp.inf]])
  tokens = jnp.asarray([[7, 8, 9]], jnp.int32)
  beams = jnp.asarray([[[0, 1, 2]]], jnp.int32)
  build = jax.jit(tree_lib.build, static_argnums=4)
  tree = build(jnp.asarray([5], jnp.int32), scores, tokens, beams, 4)
  assert tree.tok_BP.tolist() == [[5, 7, base.CUT, base.CUT]]


def test_match_walks_to_the_child_that_the_target_sampled():
  """Random trees of distinct siblings against the walk of the definition; cut nodes included."""
  rng = np.random.default_rng(0)
  P, D = 9, 4
  trees, ys, expected = [], [], []
  for _ in range(200):
    parent, depth, anc = np.zeros(P, np.int32), np.zeros(P, np.int32), np.eye(P, dtype=bool)
    children = {0: []}
    for node in range(1, P):
      options = [i for i in range(node) if depth[i] < D and len(children[i]) < 3]
      parent[node] = rng.choice(options)
      children[parent[node]].append(node)
      children[node] = []
      depth[node] = depth[parent[node]] + 1
      anc[node] |= anc[parent[node]]
    tok = np.zeros(P, np.int32)
    for nodes in children.values():
      tok[nodes] = rng.permutation(3)[: len(nodes)]
    tok[rng.random(P) < 0.1] = base.CUT
    tok[0] = 1
    y = rng.integers(0, 3, P).astype(np.int32)
    at, path, new = 0, [0], [y[0]]
    while (step := [c for c in children[at] if tok[c] == y[at]]) != []:
      at = step[0]
      path.append(at)
      new.append(y[at])
    trees.append((tok, parent, depth, anc))
    ys.append(y)
    expected.append((path, new))
  tree = base.Tree(*(jnp.asarray(np.stack(x)) for x in zip(*trees, strict=True)))
  acc, path_BA, new_BA = jax.jit(tree_lib.match, static_argnums=2)(tree, np.stack(ys), D)
  assert max(acc) >= 4
  for row, (path, new) in enumerate(expected):
    assert acc[row] == len(path)
    assert path_BA[row, : len(path)].tolist() == path
    assert new_BA[row, : len(new)].tolist() == new


def test_seen_tokens_of_nodes_are_those_of_their_path():
  rng = np.random.default_rng(1)
  parent = np.array([0, 0, 1, 1, 3], np.int32)
  depth, anc = np.array([0, 1, 2, 2, 3], np.int32), np.eye(5, dtype=bool)
  for node in range(1, 5):
    anc[node] |= anc[parent[node]]
  tok = np.array([4, 7, 2, base.CUT, 9], np.int32)
  tree = base.Tree(*(jnp.asarray(x)[None] for x in (tok, parent, depth, anc)))
  seen = rng.random((1, 12)) < 0.2
  found = np.asarray(jax.jit(tree_lib.seen_by_nodes, static_argnums=2)(seen, tree, 3))
  for node in range(5):
    expected = set(np.nonzero(seen[0])[0]) | {int(tok[i]) for i in np.nonzero(anc[node])[0]}
    assert set(np.nonzero(found[node])[0]) == expected - {base.CUT}


def base_tree(num_nodes):
  """One level of two candidates."""
  ids = jnp.zeros((1, 2), jnp.int32)
  return tree_lib.build(ids[:, 0], jnp.zeros((1, 2)), ids, ids[:, None], num_nodes)


@pytest.mark.parametrize(
  "call, text",
  [
    (lambda: base.check_tree_size(65, 3), "found 65 tree nodes, expected 1..64"),
    (lambda: base.check_tree_size(4, 4), "num_levels: found 4, expected 0..3"),
    (lambda: tree_lib.num_candidates(4, 0), "k, num_levels: found 4, 0, expected numbers >= 1"),
    (lambda: base_tree(num_nodes=0), "num_nodes: found 0, expected 1..3"),
    (lambda: base_tree(num_nodes=4), "num_nodes: found 4, expected 1..3"),
    (
      lambda: tree_lib.build(
        jnp.zeros(1, jnp.int32),
        jnp.zeros((1, 5)),
        jnp.zeros((1, 5), jnp.int32),
        jnp.zeros((1, 2, 2), jnp.int32),
        3,
      ),
      "scores_BC: found 5 candidates, expected 6 for 2 levels of 2",
    ),
  ],
)
def test_bad_sizes_are_refused(call, text):
  with pytest.raises(ValueError, match=text):
    call()
