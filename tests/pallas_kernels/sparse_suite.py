"""One suite for every backend of the sparse ops: inputs, references, and what must agree.

A backend is a function with the arguments of `select_xla`, `attend_xla` or `decode_xla`. Callers:
Triton in its interpreter, Pallas TPU and Mosaic GPU in theirs, and hardware under `-m gpu`.
"""

import jax
import jax.numpy as jnp
import numpy as np

from pallas_kernels.sparse_attention import ref as attention_ref
from pallas_kernels.sparse_decode import cases
from pallas_kernels.sparse_topk import nodes as nodes_lib
from pallas_kernels.sparse_topk import ref as topk_ref
from pallas_kernels.sparse_topk import rule as rules
from pallas_kernels.sparse_topk import xla as topk_xla

BLOCK = 16


def small_rule(selection: str, lse: str) -> rules.Rule:
  return rules.Rule(
    kernel_size=8,
    kernel_stride=4,
    block_size=BLOCK,
    local_blocks=1,
    topk=2,
    selection=selection,
    lse=lse,
  )


def normal(rng, *shape, dtype=jnp.float32):
  """On the bf16 grid, so that runs in both types start from equal numbers."""
  return jnp.asarray(rng.normal(size=shape), jnp.bfloat16).astype(dtype)


# --- Selection -----------------------------------------------------------------------------------


def check_select(
  select, rule: rules.Rule, *, dtype=jnp.float32, offset=75, num_queries=21, H=8, group=3
):
  """Forced blocks in, none of the future, full lists, ascending, and no better block left out."""
  rng = np.random.default_rng(0)
  B, T, N, K = 1, num_queries, 2 * group, 2
  S = offset + T
  q, k = normal(rng, B, T, N, H, dtype=dtype), normal(rng, B, S, K, H, dtype=dtype)
  fine, coarse = topk_xla.compress(k, rule), topk_xla.compress(k, rule, rules.COARSE)
  start = jnp.zeros((B, T), jnp.int32)
  ids, counts = jax.jit(lambda *a: select(*a, offset, start, rule, S))(q, fine, coarse)
  ids, counts = np.asarray(ids), np.asarray(counts)
  pos = offset + jnp.arange(T, dtype=jnp.int32)[None, :]
  kernel_scores = topk_ref.kernel_scores(
    q.astype(jnp.float32), k.astype(jnp.float32), pos, start, rule
  )
  scores = np.asarray(topk_ref.block_scores(kernel_scores, start, rule, rule.num_blocks(S)))
  tolerance = 1e-5 if dtype == jnp.float32 else 2e-2
  for b, h, t in np.ndindex(B, K, T):
    cur = (offset + t) // rule.block_size
    taken = ids[b, h, t, : counts[b, h, t]]
    assert np.all(np.diff(taken) > 0) and np.all(ids[b, h, t, len(taken) :] == -1)
    forced = {*range(rule.init_blocks), *range(max(0, cur - rule.num_local + 1), cur + 1)}
    if rule.selection == "joint":
      size = min(cur + 1, rule.num_selected)
    else:
      num_free = max(0, cur + 1 - len(forced))
      size = len(forced) + min(num_free, rule.topk - rule.init_blocks)
    assert len(taken) == size and forced <= set(taken.tolist()) and taken[-1] == cur, (t, taken)
    left_out = sorted(set(range(cur + 1)) - set(taken.tolist()))
    free = sorted(set(taken.tolist()) - forced)
    if left_out and free:
      row = scores[b, h, t]
      assert row[left_out].max() - row[free].min() <= tolerance * row.max(), (t, taken)


def check_select_packed(select, rule: rules.Rule, H=8, T=30):
  """Two documents and padding in a row, in runs of a few queries: the ids of the XLA form."""
  rng = np.random.default_rng(1)
  B, N, K = 2, 4, 1
  q, k = normal(rng, B, T + 70, N, H)[:, 70:], normal(rng, B, T + 70, K, H)
  fine, coarse = topk_xla.compress(k, rule), topk_xla.compress(k, rule, rules.COARSE)
  start = np.zeros((B, T), np.int32)
  start[1, : T // 3], start[1, T // 3 : -T // 6], start[1, -T // 6 :] = 16, 80, rules.NOWHERE
  args = (q, fine, coarse, jnp.full((B,), 70, jnp.int32), jnp.asarray(start), rule, T + 70)
  for found, expected in zip(select(*args), topk_xla.select_xla(*args), strict=True):
    np.testing.assert_array_equal(found, expected)


def tree_inputs(rule: rules.Rule, num_nodes: int, dtype=jnp.float32, H=8, group=3, slots=760):
  """(arguments of select_xla, nodes): rows of 700 and 75 tokens; own windows that weigh much."""
  rng = np.random.default_rng(4)
  B, K, R = 2, 2, 3
  q = normal(rng, B, num_nodes, K * group, H, dtype=dtype)
  length = np.array([700, 75], np.int32)
  start = jnp.zeros((B, num_nodes), jnp.int32)
  depth = np.arange(num_nodes) * 7 % 11
  keys, own = [], []
  for level in (1, rules.COARSE):
    size, stride = level * rule.kernel_size, level * rule.kernel_stride
    keys.append(normal(rng, B, rule.num_windows(slots, level), K, H, dtype=dtype))
    first = jnp.asarray((length - size) // stride + 1)
    more = 8 * normal(rng, B, num_nodes, R, K, H, dtype=dtype)
    own.append(nodes_lib.Own(first, more))
  pos = jnp.asarray(length[:, None] + depth[None, :], jnp.int32)
  args = (q, *keys, jnp.asarray(length), start, rule, slots)
  return args, nodes_lib.Nodes(pos, *own)


# --- Attention -----------------------------------------------------------------------------------


def lists(rng, pos_BT, start_BT, heads: int, width: int, num_local: int, block: int = BLOCK):
  """Ascending random lists [B, K, T, W] on the row's grid that end with the local blocks."""
  B, T = pos_BT.shape
  ids = np.full((B, heads, T, width), -1, np.int32)
  for b, h, t in np.ndindex(B, heads, T):
    cur, first = pos_BT[b, t] // block, start_BT[b, t] // block
    if pos_BT[b, t] < start_BT[b, t]:
      continue
    local = np.arange(max(first, cur - num_local + 1), cur + 1)
    others = rng.permutation(np.arange(first, local[0]))[: width - len(local)]
    row = np.sort(np.concatenate([others, local]))
    ids[b, h, t, : len(row)] = row
  return ids


def check_attend(
  attend,
  *,
  num_local: int,
  has_grad=True,
  dtype=jnp.float32,
  T=45,
  W=3,
  H=8,
  G=3,
  block=BLOCK,
  is_repeated=False,
):
  """out, lse and gradients against one masked softmax over all keys in float32.

  is_repeated: run twice, bitwise equal.
  """
  rng = np.random.default_rng(2)
  B, K, S = 2, 2, T + 9
  q, k, v = (normal(rng, B, n, h, H, dtype=dtype) for n, h in ((T, K * G), (S, K), (S, K)))
  dout = normal(rng, B, T, K * G, H)
  start = np.zeros((B, T), np.int32)
  start[1, 31], start[1, 32:-4], start[1, -4:] = rules.NOWHERE, 32, rules.NOWHERE
  pos = np.broadcast_to(np.arange(T, dtype=np.int32), (B, T))
  ids = lists(rng, pos, start, K, W, max(1, num_local), block)
  pos, start, ids = jnp.asarray(pos), jnp.asarray(start), jnp.asarray(ids)

  def run(function, *arrays):
    # Lists are arguments: as constants, their sorts would be folded at compile time.
    def loss(q, k, v, *lists):
      out, lse = function(q, k, v, *lists)
      seen = jnp.where(lse > -jnp.inf, lse, 0.0)
      return jnp.sum(out.astype(jnp.float32) * dout) + jnp.sum(seen * dout[..., 0]), (out, lse)

    def every(*arrays):
      if not has_grad:
        return loss(*arrays)[1]
      grads, aux = jax.grad(loss, argnums=(0, 1, 2), has_aux=True)(*arrays)
      return (*aux, *grads)

    compiled = jax.jit(every)
    found = compiled(*arrays, ids, pos, start)
    if is_repeated:
      for x, y in zip(found, compiled(*arrays, ids, pos, start), strict=True):
        assert jnp.array_equal(x, y), "a second run gave other bits"
    return found

  def reference(q, k, v, ids, pos, start):
    mask = attention_ref.block_mask(ids, pos, jnp.zeros_like(start), S, block)
    mask = mask & (jnp.arange(S)[None, None, :] >= start[:, :, None])[:, None]
    return attention_ref.attend_ref(q, k, v, mask)

  def backend(q, k, v, ids, pos, start):
    return attend(q, k, v, ids, pos, start, block_size=block, num_local=num_local)

  expected = run(reference, *(x.astype(jnp.float32) for x in (q, k, v)))
  found = run(backend, q, k, v)
  names = ("out", "lse", "dq", "dk", "dv")[: len(found)]
  plain = expected if dtype == jnp.float32 else run(reference, q, k, v)
  for name, x, y, z in zip(names, found, expected, plain, strict=True):
    x, y, z = (np.asarray(a.astype(jnp.float32)) for a in (x, y, z))
    assert np.array_equal(np.isneginf(x), np.isneginf(y)), name
    x, y, z = (np.where(np.isneginf(a), 0, a) for a in (x, y, z))
    if dtype == jnp.float32:
      tolerance = 1e-5 if name in ("out", "lse") else 1e-4
      np.testing.assert_allclose(x, y, rtol=tolerance, atol=tolerance, err_msg=name)
    else:
      assert np.abs(x - y).max() <= 3 * np.abs(z - y).max() + 1e-3, name
  if has_grad and dtype == jnp.float32 and T <= 100 and block == BLOCK:
    exact = loop_gradients(q, k, v, ids, pos, start, dout, dout[..., 0])
    for name, x, y in zip(names[2:], found[2:], exact, strict=True):
      np.testing.assert_allclose(x, y, rtol=1e-4, atol=1e-4, err_msg=f"{name} in float64")
  return found


def loop_gradients(q, k, v, ids, pos, start, dout, dlse):
  """(dq, dk, dv) of section 11, one softmax a query and head, float64."""
  q, k, v, ids, pos, start, dout, dlse = (
    np.asarray(x.astype(jnp.float32), np.float64) for x in (q, k, v, ids, pos, start, dout, dlse)
  )
  dq, dk, dv = np.zeros(q.shape), np.zeros(k.shape), np.zeros(v.shape)
  scale = q.shape[-1] ** -0.5
  for b, t, n in np.ndindex(q.shape[:3]):
    h = n * k.shape[2] // q.shape[2]
    listed = set(ids[b, h, t].astype(int).tolist()) - {-1}
    slots = [s for s in range(int(pos[b, t]) + 1) if s // BLOCK in listed and s >= start[b, t]]
    if not slots:
      continue
    exps = np.exp(scale * k[b, slots, h] @ q[b, t, n])
    probs = exps / exps.sum()
    dprobs = v[b, slots, h] @ dout[b, t, n]
    dscores = scale * probs * (dprobs - probs @ dprobs + dlse[b, t, n])
    dq[b, t, n] = dscores @ k[b, slots, h]
    dk[b, slots, h] += dscores[:, None] * q[b, t, n]
    dv[b, slots, h] += probs[:, None] * dout[b, t, n]
  return dq, dk, dv


# --- Decoding ------------------------------------------------------------------------------------

LAYOUTS = ("row", "shifted_row", "paged")


def decode_inputs(layout: str, dtype=jnp.float32, H=8, block=BLOCK):
  """(q, k, v, ids, pos, start, base, page table) and the row caches k, v that they stand for."""
  rng = np.random.default_rng(3)
  case = cases.TINY["tiny_row"]
  B, T, K, W, S = case.batch, case.num_queries, case.num_kv_heads, case.num_listed, 10 * block
  q = normal(rng, B, T, case.num_heads, H, dtype=dtype)
  k, v = normal(rng, B, S, K, H, dtype=dtype), normal(rng, B, S, K, H, dtype=dtype)
  pos = np.array([140 * block // 16, 40 * block // 16, 3], np.int32)[:, None]
  pos = pos + np.arange(T, dtype=np.int32)[None, :]
  start = np.array([[0, 0], [block, block], [0, rules.NOWHERE]], np.int32)
  ids = lists(rng, pos, start, K, W, 1, block)
  base = page_table = None
  cache_k, cache_v = k, v
  if layout == "shifted_row":
    base = np.array([0, 7, 19], np.int32)
    cache_k, cache_v = (
      jnp.stack([jnp.roll(row, int(n), axis=0) for row, n in zip(x, base, strict=True)])
      for x in (k, v)
    )
    base = jnp.asarray(base)
  elif layout == "paged":
    order = rng.permutation(B * S // block)
    cache_k, cache_v = (jnp.reshape(x, (-1, block, K, H))[order] for x in (k, v))
    page_table = jnp.asarray(np.argsort(order).reshape(B, -1), jnp.int32)
  arrays = (q, cache_k, cache_v, jnp.asarray(ids), jnp.asarray(pos), jnp.asarray(start))
  return (*arrays, base, page_table), (k, v)


def loop_decode(q, k, v, ids, pos, start, block=BLOCK):
  """(out, lse) by one softmax a query and head, float64."""
  q, k, v, ids, pos, start = (np.asarray(x.astype(jnp.float32)) for x in (q, k, v, ids, pos, start))
  B, T, N, H = q.shape
  out, lse = np.zeros((B, T, N, H)), np.full((B, T, N), -np.inf)
  for b, t, n in np.ndindex(B, T, N):
    h = n * k.shape[2] // N
    listed = set(ids[b, h, t].astype(int).tolist()) - {-1}
    slots = [s for s in range(int(pos[b, t]) + 1) if s // block in listed and s >= start[b, t]]
    if slots:
      scores = k[b, slots, h].astype(np.float64) @ q[b, t, n] / np.sqrt(H)
      lse[b, t, n] = np.log(np.sum(np.exp(scores)))
      out[b, t, n] = np.exp(scores - lse[b, t, n]) @ v[b, slots, h]
  return out, lse


def check_decode(decode, layout: str, dtype=jnp.float32, H=8, block=BLOCK):
  """out and lse against a loop over queries and heads in float64."""
  inputs, (k, v) = decode_inputs(layout, dtype, H, block)
  found = jax.jit(lambda *a: decode(*a, block_size=block))(*inputs)
  q, _, _, ids, pos, start, _, _ = inputs
  tolerance = 1e-5 if dtype == jnp.float32 else 2e-2
  for x, y in zip(found, loop_decode(q, k, v, ids, pos, start, block), strict=True):
    np.testing.assert_allclose(x.astype(jnp.float32), y, rtol=tolerance, atol=tolerance)
