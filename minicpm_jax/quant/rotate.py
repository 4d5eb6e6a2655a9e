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
  """Paley's constructions for prime q: size q + 1 (q = 3 mod 4) and 2 (q + 1) (q = 1 mod 4)."""
  if size % 4:
    return None
  q = size - 1
  if _is_prime(q):  # q = 3 mod 4
    skew = np.zeros((size, size))
    skew[0, 1:], skew[1:, 0], skew[1:, 1:] = 1, -1, _jacobsthal(q)
    return skew + np.eye(size)
  q = size // 2 - 1
  if q % 4 != 1 or not _is_prime(q):
    return None
  sym = np.zeros((q + 1, q + 1))
  sym[0, 1:], sym[1:, 0], sym[1:, 1:] = 1, 1, _jacobsthal(q)
  plus, minus = np.array([[1.0, 1], [1, -1]]), np.array([[1.0, -1], [-1, -1]])
  return np.kron(sym, plus) + np.kron(np.eye(q + 1), minus)


def _jacobsthal(q: int) -> Float[np.ndarray, "q q"]:
  squares = {x * x % q for x in range(1, q)}
  symbol = np.array([0.0] + [1.0 if x in squares else -1.0 for x in range(1, q)])
  return symbol[(np.arange(q)[:, None] - np.arange(q)[None]) % q]


def _is_prime(q: int) -> bool:
  return q > 1 and all(q % p for p in range(2, int(q**0.5) + 1))


def rotate(
  cfg: ModelConfig, params: types.Params, seed: int = 0
) -> tuple[ModelConfig, types.Params]:
  """(untied config, rotated parameters) of a model with grouped-query attention."""
  if cfg.mla is not None:
    raise ValueError("model.mla: found latent attention, expected grouped-query attention")
  if cfg.mtp is not None:
    raise ValueError("model.mtp: found an MTP module, expected none (drop params['mtp'] first)")
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
