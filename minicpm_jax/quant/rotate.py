"""QuaRot's function-preserving rotations R1 and R2 (quantization.md 7), in float64, once.

Norm weights are folded into the kernels behind them, tied embeddings get a head of their own, the
residual stream is turned by R1 (embedding E R, readers R^T W, writers W R in our [in, out] layout)
and the values of every head by R2. scale_emb, the residual multiplier and the logit divisor commute
with R1. The embedding's mean is not subtracted: that is right for LayerNorm only. R is a randomly
signed Hadamard matrix where one is known for the width, else the Q of a Gaussian; the seed rebuilds
it. The online Hadamards of activation quantisation are not built.
"""

import dataclasses
from typing import Any

import jax.numpy as jnp
import numpy as np
from jaxtyping import Float

from minicpm_jax.config import ModelConfig
from minicpm_jax.core import types
from minicpm_jax.quant import qat, tree

_R1, _R2 = 1, 2  # streams of the seed


def rotation(width: int, seed: int, stream: int = _R1) -> Float[np.ndarray, "W W"]:
  """An orthogonal matrix, the same for the same (width, seed, stream)."""
  rng = np.random.default_rng((seed, stream, width))
  base = hadamard(width)
  if base is not None:
    return base * rng.choice([-1.0, 1.0], width)[None, :] / np.sqrt(width)
  q, r = np.linalg.qr(rng.normal(size=(width, width)))
  return q * np.sign(np.diag(r))[None, :]


def hadamard(width: int) -> Float[np.ndarray, "W W"] | None:
  """A matrix of +-1 with orthogonal rows: 2^k times a Paley matrix, or None where none is built."""
  core, doublings = width, 0
  while True:
    found = np.ones((1, 1)) if core == 1 else _paley(core)
    if found is not None:
      break
    if core % 2:
      return None
    core, doublings = core // 2, doublings + 1
  for _ in range(doublings):
    found = np.block([[found, found], [found, -found]])
  return found


def _paley(size: int) -> Float[np.ndarray, "W W"] | None:
  """Paley, of a prime power q: size q + 1 (q = 3 mod 4) and 2 (q + 1) (q = 1 mod 4)."""
  if size % 4:
    return None
  field = _prime_power(size - 1)  # q = 3 mod 4
  if field is not None:
    skew = np.zeros((size, size))
    skew[0, 1:], skew[1:, 0], skew[1:, 1:] = 1, -1, _jacobsthal(*field)
    return skew + np.eye(size)
  q = size // 2 - 1
  field = _prime_power(q)
  if q % 4 != 1 or field is None:
    return None
  sym = np.zeros((q + 1, q + 1))
  sym[0, 1:], sym[1:, 0], sym[1:, 1:] = 1, 1, _jacobsthal(*field)
  plus, minus = np.array([[1.0, 1], [1, -1]]), np.array([[1.0, -1], [-1, -1]])
  return np.kron(sym, plus) + np.kron(np.eye(q + 1), minus)


def _jacobsthal(p: int, k: int) -> Float[np.ndarray, "q q"]:
  """chi(a - b) over GF(p^k): 1 for squares, -1 for others, 0 for 0; k is at most 3."""
  q = p**k
  digits_qk = np.stack([np.arange(q) // p**i % p for i in range(k)], axis=1)
  squares_qk = _square(digits_qk, p, _irreducible(p, k))
  weights_k = p ** np.arange(k)
  symbol_q = np.full(q, -1.0)
  symbol_q[squares_qk @ weights_k] = 1
  symbol_q[0] = 0
  return symbol_q[(digits_qk[:, None] - digits_qk[None]) % p @ weights_k]


def _square(a_qk: np.ndarray, p: int, low_k: np.ndarray) -> np.ndarray:
  """Squares of polynomials of degree below k, modulo x^k + low (coefficients, lowest first)."""
  k = a_qk.shape[1]
  full = np.zeros((len(a_qk), 2 * k - 1), np.int64)
  for i in range(k):
    full[:, i : i + k] += a_qk[:, i : i + 1] * a_qk
  for top in range(2 * k - 2, k - 1, -1):
    full[:, top - k : top] -= full[:, top : top + 1] * low_k
  return full[:, :k] % p


def _irreducible(p: int, k: int) -> np.ndarray:
  """Coefficients below x^k of a monic polynomial of degree k <= 3 without a root modulo p."""
  x = np.arange(p)
  for number in range(p**k):
    low_k = np.array([number // p**i % p for i in range(k)])
    if k == 1 or np.all((x**k + sum(c * x**i for i, c in enumerate(low_k))) % p):
      return low_k
  raise AssertionError(f"no irreducible polynomial of degree {k} modulo {p}")


def _prime_power(q: int) -> tuple[int, int] | None:
  """(p, k) with q = p^k, p prime, k <= 3 (for larger k a polynomial without roots may factor)."""
  for k in (1, 2, 3):
    p = round(q ** (1 / k))
    if p**k == q and p > 1 and all(p % d for d in range(2, int(p**0.5) + 1)):
      return p, k
  return None


def rotate(
  cfg: ModelConfig, params: types.Params, seed: int = 0
) -> tuple[ModelConfig, types.Params]:
  """(untied config, rotated parameters) of a model with grouped-query attention.

  Kernels are floats, every projection its own: joined and quantised ones are refused by name, and
  latent weights, which turned ones do not stand for.
  """
  if cfg.mla is not None:
    raise ValueError("model.mla: found latent attention, expected grouped-query attention")
  if cfg.mtp is not None:
    raise ValueError("model.mtp: found an MTP module, expected none (drop params['mtp'] first)")
  qat.check_not_latent(cfg.quant)
  tree.check_floats(params)
  r1, r2 = rotation(cfg.model_dim, seed), rotation(cfg.head_dim, seed, _R2)
  embedding = params["embed"]["embedding"]
  head = embedding.T if cfg.tie_embeddings else params["lm_head"]["kernel"]
  norm = np.asarray(params["final_norm"]["scale"], np.float64)
  done: types.Params = {
    "embed": {"embedding": _cast(np.asarray(embedding, np.float64) @ r1, embedding)},
    "final_norm": {"scale": jnp.ones_like(params["final_norm"]["scale"])},
    "lm_head": {"kernel": _cast(r1.T @ (norm[:, None] * np.asarray(head, np.float64)), head)},
  }
  for name, layer in params.items():
    if name.startswith("layers"):
      done[name] = _rotate_layer(layer, r1, r2)
  return dataclasses.replace(cfg, tie_embeddings=False), done


def draft_features(
  cfg: ModelConfig, params: types.Params, seed: int = 0
) -> Float[np.ndarray, "D D"]:
  """M with f_plain = f_rotated @ M: a draft model reads the target's final hidden state.

  `params` are the original ones: f_rotated is the weightless norm's output times R1, f_plain the
  weighted norm's. Multiply M into the feature half of the draft's fc, which costs nothing.
  """
  norm = np.asarray(params["final_norm"]["scale"], np.float64)
  return rotation(cfg.model_dim, seed).T * norm[None, :]


def _cast(x: np.ndarray, like: Any) -> Any:
  return jnp.asarray(x.astype(np.dtype(like.dtype)))


def _rotate_layer(layer: types.Params, r1: np.ndarray, r2: np.ndarray) -> types.Params:
  """One layer, or all of them stacked."""

  def f64(x: Any) -> np.ndarray:
    return np.asarray(x, np.float64)

  lead = layer["attn_norm"]["scale"].ndim - 1
  norms = {n: f64(layer[n]["scale"]) for n in ("attn_norm", "mlp_norm")}

  def read(w: Any, norm: str) -> np.ndarray:
    """R^T diag(norm) W, W = [*lead, (experts,) D, ...]."""
    x = f64(w)
    axis = lead + (1 if x.ndim - lead == 3 and norm == "mlp_norm" else 0)
    scale = norms[norm].reshape(*norms[norm].shape[:-1], *(1,) * (axis - lead), -1)
    scale = scale.reshape(*scale.shape, *(1,) * (x.ndim - axis - 1))
    return np.moveaxis(np.tensordot(r1.T, x * scale, axes=(1, axis)), 0, axis)

  attn = layer["attn"]
  value = read(attn["v"]["kernel"], "attn_norm") @ r2
  out = np.moveaxis(np.tensordot(r2.T, f64(attn["o"]["kernel"]), axes=(1, -2)), 0, -2) @ r1
  new = {
    "attn": {
      "q": read(attn["q"]["kernel"], "attn_norm"),
      "k": read(attn["k"]["kernel"], "attn_norm"),
      "v": value,
      "o": out,
    }
  }
  mlp = "mlp" if "mlp" in layer else "moe"
  new[mlp] = {
    name: f64(part["kernel"]) @ r1 if name == "down" else read(part["kernel"], "mlp_norm")
    for name, part in layer[mlp].items()
  }
  done = {
    block: {n: {"kernel": _cast(x, layer[block][n]["kernel"])} for n, x in parts.items()}
    for block, parts in new.items()
  }
  for name in norms:
    done[name] = {"scale": jnp.ones_like(layer[name]["scale"])}
  return done
