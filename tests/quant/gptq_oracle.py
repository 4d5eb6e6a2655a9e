"""GPTQ in float64 numpy, HF orientation [out, in], written from quantization.md 4."""

import numpy as np


def params(w, bits, sym):
  """(scale, zero) of one group, rows [out, g]."""
  maxq = 2**bits - 1
  low, high = np.minimum(w.min(1), 0), np.maximum(w.max(1), 0)
  if sym:
    high = np.maximum(np.abs(low), high)
    low = np.where(low < 0, -high, -high)
  empty = (low == 0) & (high == 0)
  low[empty], high[empty] = -1, 1
  scale = (high - low) / maxq
  zero = np.full_like(scale, (maxq + 1) // 2) if sym else np.rint(-low / scale)
  return scale, zero


def gptq(w, h, *, bits=4, g=128, sym=True, act=False, static=False, damp=0.01, block=128):
  """(codes, scales [out, Q], zeros, g_idx, dequantised)."""
  w, h = w.astype(np.float64).copy(), h.astype(np.float64).copy()
  rows, cols = w.shape
  g = cols if g == -1 else g
  dead = np.diag(h) == 0
  h[dead, dead] = 1
  w[:, dead] = 0
  groups = [params(w[:, i : i + g], bits, sym) for i in range(0, cols, g)]
  perm = np.argsort(-np.diag(h), kind="stable") if act else np.arange(cols)
  w, h = w[:, perm], h[perm][:, perm]
  h[np.arange(cols), np.arange(cols)] += damp * np.mean(np.diag(h))
  u = np.linalg.cholesky(np.linalg.inv(h)).T
  codes, out = np.zeros((rows, cols), int), np.zeros((rows, cols))
  g_idx = np.zeros(cols, int)
  for i1 in range(0, cols, block):
    i2 = min(i1 + block, cols)
    part, errors = w[:, i1:i2].copy(), np.zeros((rows, i2 - i1))
    for i in range(i2 - i1):
      at = i1 + i
      if static:
        group = perm[at] // g
      else:
        group = at // g
        if at % g == 0:
          groups[group] = params(w[:, at : at + g], bits, sym)
      scale, zero = groups[group]
      g_idx[perm[at]] = group
      code = np.clip(np.rint(part[:, i] / scale) + zero, 0, 2**bits - 1)
      value = scale * (code - zero)
      error = (part[:, i] - value) / u[at, at]
      part[:, i:] -= np.outer(error, u[at, at:i2])
      errors[:, i] = error
      codes[:, perm[at]], out[:, perm[at]] = code, value
    w[:, i2:] -= errors @ u[i1:i2, i2:]
  scales, zeros = (np.stack([x[k] for x in groups], 1) for k in (0, 1))
  return codes, scales, zeros, g_idx, out


def error(wq, w, x):
  """Relative output error."""
  return np.linalg.norm((wq - w) @ x.T) / np.linalg.norm(w @ x.T)


def correlated(rng, rows, cols, tokens):
  """(w, x): inputs of a random low-rank mixture plus noise, channels of unequal size."""
  mix = rng.normal(size=(max(cols // 4, 4), cols))
  x = rng.normal(size=(tokens, mix.shape[0])) @ mix + 0.5 * rng.normal(size=(tokens, cols))
  x *= np.exp(0.5 * rng.normal(size=cols))
  return rng.normal(size=(rows, cols)), x
