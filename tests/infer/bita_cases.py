"""BiTA by hand: the small models of the tests in float64 numpy, mask tokens in one long sequence.

Nothing of minicpm_jax but the parameters and the config's numbers is used here.
"""

import functools

import numpy as np


def params_of(cfg, seed=3, size=0.4):
  """Random weights by the paths of models/bita.py."""
  rng = np.random.default_rng(seed)
  heads = (cfg.num_prompts, cfg.num_layers, 2, cfg.num_kv_heads, cfg.head_dim)
  return {
    "masks": {"embedding": (size * rng.normal(size=(cfg.num_masks, cfg.model_dim))).astype("f")},
    "prompts": {"kernel": (size * rng.normal(size=heads)).astype("f")},
  }


def _norm(x, scale, eps):
  return x / np.sqrt(np.mean(x * x, axis=-1, keepdims=True) + eps) * scale


def _rotated(x_TNH, positions_T, theta):
  half = x_TNH.shape[-1] // 2
  angle = positions_T[:, None] * theta ** (-np.arange(half) / half)
  cos, sin = np.cos(angle)[:, None, :], np.sin(angle)[:, None, :]
  a, b = x_TNH[..., :half], x_TNH[..., half:]
  return np.concatenate((a * cos - b * sin, b * cos + a * sin), axis=-1)


def logits(cfg, params, draft, tokens, positions, sees, number):
  """[T, V]. number[t] = 0: the token tokens[t]; i: mask i. sees[t, s]: row t sees row s."""
  f64 = lambda x: np.asarray(x, np.float64)  # noqa: E731
  number, positions = np.asarray(number), np.asarray(positions)
  table = f64(params["embed"]["embedding"])
  x = np.where(number[:, None] > 0, f64(draft["masks"]["embedding"])[number - 1], table[tokens])
  x = x * cfg.scale_emb
  G = cfg.num_heads // cfg.num_kv_heads
  for i in range(cfg.num_layers):
    at = functools.partial(_weight, params, i)
    h = _norm(x, at("attn_norm", "scale"), cfg.norm_eps)
    q, k, v = (np.einsum("td,dnh->tnh", h, at("attn", n, "kernel")) for n in "qkv")
    q, k = (_rotated(y, positions, cfg.rope.theta) for y in (q, k))
    prompts = f64(draft["prompts"]["kernel"])[:, i]
    k, v = np.concatenate((prompts[:, 0], k)), np.concatenate((prompts[:, 1], v))
    k, v = np.repeat(k, G, axis=1), np.repeat(v, G, axis=1)
    is_mask = np.repeat((number > 0)[:, None], len(prompts), axis=1)
    seen = np.concatenate((is_mask, sees), axis=1)
    scores = np.einsum("tnh,snh->tns", q, k) / np.sqrt(cfg.head_dim)
    scores = np.where(seen[:, None, :], scores, -np.inf)
    probs = np.exp(scores - scores.max(-1, keepdims=True))
    probs /= probs.sum(-1, keepdims=True)
    out = np.einsum("tns,snh->tnh", probs, v)
    x = x + cfg.residual_scale * np.einsum("tnh,nhd->td", out, at("attn", "o", "kernel"))
    h = _norm(x, at("mlp_norm", "scale"), cfg.norm_eps)
    gate, up = (h @ at("mlp", n, "kernel") for n in ("gate", "up"))
    x = x + cfg.residual_scale * ((gate / (1 + np.exp(-gate)) * up) @ at("mlp", "down", "kernel"))
  x = _norm(x, f64(params["final_norm"]["scale"]), cfg.norm_eps)
  head = table.T if cfg.tie_embeddings else f64(params["lm_head"]["kernel"])
  return (x / cfg.logit_divisor) @ head[:, : cfg.vocab_size]


def _weight(params, i, *path):
  """A weight of layer i, stacked or not, in float64."""
  tree = params["layers"] if "layers" in params else params[f"layers_{i}"]
  for name in path:
    tree = tree[name]
  return np.asarray(tree[i] if "layers" in params else tree, np.float64)


def after(cfg, params, draft, context):
  """[1 + M, V]: logits of the last token of a context and of the M masks behind it."""
  c, M = len(context), len(draft["masks"]["embedding"])
  number = [0] * c + list(range(1, M + 1))
  tokens = [*context, *[0] * M]
  sees = np.tril(np.ones((c + M, c + M), bool))
  return logits(cfg, params, draft, tokens, np.arange(c + M), sees, number)[c - 1 :]
