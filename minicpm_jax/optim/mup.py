"""muP by role of a parameter (training.md section 1, MiniCPM Table 7); w = width_ratio.

| role      | leaves                                             | init std       | lr   | decay |
|-----------|----------------------------------------------------|----------------|------|-------|
| matrix    | attn/*/kernel, mlp/*/kernel, moe/*/kernel, mtp/proj | init_std/sqrt w | 1/w  | yes   |
| head      | lm_head/kernel (untied)                            | init_std/sqrt w | 1/w  | yes   |
| router    | moe/router/kernel                                  | 0.1 (P1 7.3)   | 1/w  | yes   |
| embedding | embed/embedding, `mup_embedding="matrix"`          | init_std/sqrt w | 1/w  | yes   |
| embedding | embed/embedding, `mup_embedding="vector"`          | init_std       | 1    | yes   |
| norm      | */scale                                            | 1 (constant)   | 1    | no    |
| vector    | */bias (no member has one)                         | init_std       | 1    | no    |

Decided by path, never by `ndim`: stacked layers [L, D, N, H] and experts [L, E, D, F] are matrices.
All matrices share w (down's fan-in is 2.5 D), so there is no per-matrix fan-in. Whether the table
of embeddings is a "two-dimensional tensor" the paper does not say; both readings are offered. Decay
on embeddings and none on norms is Megatron's default, not the paper's. Forward multipliers
(scale_emb, residual_scale, logit_divisor) live in the model.
"""

from typing import Literal

from minicpm_jax import config

Role = Literal["matrix", "vector", "embedding", "head", "router", "norm"]

DECAYED: tuple[Role, ...] = ("matrix", "head", "router", "embedding")


def role_of(path: str) -> Role:
  """Role of the parameter at `path` ("layers/attn/q/kernel"); ValueError for an unknown name."""
  *parents, leaf = path.split("/")
  parent = parents[-1] if parents else ""
  if leaf == "scale":
    return "norm"
  if leaf == "bias":
    return "vector"
  if leaf == "embedding":
    return "embedding"
  if leaf == "kernel":
    return {"lm_head": "head", "router": "router"}.get(parent, "matrix")
  raise ValueError(
    f"{path}: found leaf name {leaf!r}, expected one of kernel, embedding, scale, bias"
  )


def lr_scale(model_cfg: config.ModelConfig, role: Role) -> float:
  """Factor of the base learning rate for a parameter of this role."""
  if role in ("norm", "vector"):
    return 1.0
  if role == "embedding" and model_cfg.mup_embedding == "vector":
    return 1.0
  return 1.0 / model_cfg.width_ratio
