"""InfLLM v2 from its definition in float64 numpy, one query at a time (infllm_v2.md 4 to 9)."""

import numpy as np

from minicpm_jax.config import SparseAttentionConfig

SMALL = dict(kernel_size=8, kernel_stride=4, block_size=16, window_size=32, topk=3, dense_len=-1)
MODES = [(s, n) for s in ("joint", "split") for n in ("exact", "coarse")]


def small(selection="joint", lse="exact", **overrides):
  return SparseAttentionConfig(**{**SMALL, "selection": selection, "lse": lse, **overrides})


def draw(seed, T, S, N, K, H, B=1, scale=1.0):
  """q, k, v on the bfloat16 grid (8 bits of mantissa), so that every precision starts equal."""
  rng = np.random.default_rng(seed)

  def one(*shape):
    x = rng.normal(size=shape).astype(np.float32)
    bits = x.view(np.uint32) & np.uint32(0xFFFF0000)
    return bits.view(np.float32)

  return one(B, T, N, H) * np.float32(scale), one(B, S, K, H), one(B, S, K, H)


def windows(k_LH, size, stride):
  """Means of complete windows."""
  k_LH = np.asarray(k_LH, np.float64)
  count = max(0, (len(k_LH) - size) // stride + 1)
  means = [k_LH[stride * j : stride * j + size].mean(axis=0) for j in range(count)]
  return np.stack(means) if means else np.zeros((0, k_LH.shape[1]))


def kernel_scores(q_GH, k_LH, pos, cfg):
  """S over the fine windows of one document for the query at `pos`."""
  G, H = q_GH.shape
  p, s = cfg.kernel_size, cfg.kernel_stride
  fine = windows(k_LH, p, s)
  level = 1 if cfg.lse == "exact" else 4
  norm = windows(k_LH, level * p, level * s)
  scores = np.zeros(len(fine))
  for g in range(G):
    q = np.asarray(q_GH[g], np.float64) / np.sqrt(H)
    seen = [q @ c for j, c in enumerate(norm) if level * (s * j + p) - 1 <= pos]
    if not seen:
      continue
    lse = max(seen) + np.log(np.sum(np.exp(np.array(seen) - max(seen))))
    for j, c in enumerate(fine):
      if s * j + p - 1 <= pos:
        scores[j] += np.exp(min(q @ c - lse, 80.0))
  return scores


def block_scores(scores_F, length, cfg):
  """Maximum over windows that overlap the block; -inf where there is none."""
  p, s, size = cfg.kernel_size, cfg.kernel_stride, cfg.block_size
  best = np.full(-(-length // size), -np.inf)
  for j, score in enumerate(scores_F):
    for b in range(s * j // size, (s * j + p - 1) // size + 1):
      best[b] = max(best[b], score)
  return best


def split_of(cur, cfg):
  """(forced blocks inside the budget, candidates for the rest, budget, blocks added outside it)."""
  local = cfg.window_size // cfg.block_size
  init = {b for b in range(cur + 1) if b < cfg.init_blocks}
  if cfg.selection == "joint":
    forced = init | {b for b in range(cur + 1) if b >= cur - local}
    return forced, set(range(cur + 1)) - forced, cfg.topk + local, set()
  window = {b for b in range(cur + 1) if b > cur - local}
  return init, set(range(cur + 1)) - init - window, cfg.topk, window


def choose(scores_M, cur, cfg):
  forced, free, budget, outside = split_of(cur, cfg)
  order = sorted(free, key=lambda b: (-scores_M[b], b))
  return forced | set(order[: max(0, budget - len(forced))]) | outside


def assert_valid_set(found, scores_M, cur, cfg, rtol=1e-5):
  """Size, forced blocks, no future block and no better block left out (section 7.3)."""
  forced, free, budget, outside = split_of(cur, cfg)
  found = list(found)
  assert found == sorted(set(found)), found
  taken = set(found)
  assert forced | outside <= taken <= forced | outside | free, (cur, found)
  picked = taken - forced - outside
  assert len(picked) == min(len(free), max(0, budget - len(forced))), (cur, found)
  left = free - picked
  if picked and left:
    finite = [x for x in scores_M if np.isfinite(x)]
    regret = max(scores_M[b] for b in left) - min(scores_M[b] for b in picked)
    assert not regret > rtol * max(finite, default=1.0), (cur, regret)


def attend(q_GH, k_LH, v_LV, blocks, pos, cfg):
  """One softmax over the tokens of the blocks up to `pos`; [G, V]."""
  tokens = [t for t in range(pos + 1) if t // cfg.block_size in blocks]
  k, v = np.asarray(k_LH, np.float64)[tokens], np.asarray(v_LV, np.float64)[tokens]
  a = np.asarray(q_GH, np.float64) @ k.T / np.sqrt(q_GH.shape[1])
  e = np.exp(a - a.max(axis=1, keepdims=True))
  return e / e.sum(axis=1, keepdims=True) @ v


def check_select(q_TNH, k_LKH, cfg, ids_KTW, counts_KT, q_offset=0, rows=None, rtol=1e-5):
  """Every list of one document against the definition, by score regret."""
  T, N, _ = q_TNH.shape
  K = k_LKH.shape[1]
  G = N // K
  for h in range(K):
    for t in range(T) if rows is None else rows:
      pos = q_offset + t
      scores = kernel_scores(q_TNH[t, h * G : (h + 1) * G], k_LKH[:, h], pos, cfg)
      blocks = block_scores(scores, len(k_LKH), cfg)
      ids, count = np.asarray(ids_KTW[h, t]), int(counts_KT[h, t])
      assert np.all(ids[count:] == -1)
      assert_valid_set(ids[:count].tolist(), blocks, pos // cfg.block_size, cfg, rtol)


def attend_with(q_TNH, k_LKH, v_LKV, cfg, ids_KTW, q_offset=0):
  """Output [T, N, V] of one document with given block lists."""
  T, N, _ = q_TNH.shape
  K = k_LKH.shape[1]
  G = N // K
  out = np.zeros((T, N, v_LKV.shape[2]))
  for h in range(K):
    for t in range(T):
      blocks = set(np.asarray(ids_KTW[h, t]).tolist()) - {-1}
      heads = slice(h * G, (h + 1) * G)
      out[t, heads] = attend(q_TNH[t, heads], k_LKH[:, h], v_LKV[:, h], blocks, q_offset + t, cfg)
  return out


def small_lists(seed, num_queries, num_blocks, width):
  """Lists of distinct blocks up to the current one that contain it."""
  rng = np.random.default_rng(seed)
  ids = np.full((1, 1, num_queries, width), -1, np.int32)
  for t in range(num_queries):
    cur = t * num_blocks // num_queries
    others = rng.permutation(cur)[: rng.integers(0, width)]
    ids[0, 0, t, : len(others) + 1] = np.sort(np.append(others, cur))
  return ids


def gradients(q_TNH, k_LKH, v_LKV, dout_TNV, cfg, ids_KTW):
  """dq, dk, dv of stage 2 in float64 (section 11), over the listed blocks."""
  q, k, v, dout = (np.asarray(x, np.float64) for x in (q_TNH, k_LKH, v_LKV, dout_TNV))
  dq, dk, dv = np.zeros_like(q), np.zeros_like(k), np.zeros_like(v)
  scale = q.shape[2] ** -0.5
  G = q.shape[1] // k.shape[1]
  for t, n in np.ndindex(*q.shape[:2]):
    h = n // G
    tokens = [s for s in range(t + 1) if s // cfg.block_size in set(ids_KTW[h, t].tolist())]
    a = scale * (k[tokens, h] @ q[t, n])
    p = np.exp(a - a.max())
    p /= p.sum()
    ds = scale * p * (v[tokens, h] @ dout[t, n] - dout[t, n] @ (p @ v[tokens, h]))
    dq[t, n] = ds @ k[tokens, h]
    dk[tokens, h] += ds[:, None] * q[t, n]
    dv[tokens, h] += p[:, None] * dout[t, n]
  return dq, dk, dv
