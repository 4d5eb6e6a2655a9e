"""Linen shells that own parameters: Kernel, Linear, RMSNorm, Embed, MLP.

Every kernel names its logical axes (style.md 2.3); initial standard deviations follow MiniCPM
Table 7: init_std / sqrt(width ratio) for matrices, by role, never by fan-in.
"""

import math
from typing import Any

import flax.linen as nn
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from minicpm_jax.config import ModelConfig
from minicpm_jax.core import mesh, types
from minicpm_jax.nn import functional, output_major
from minicpm_jax.quant import leaf, qat, qtensor


def matrix_std(cfg: ModelConfig) -> float:
  """Initial std of a matrix: init_std / sqrt(w)."""
  return cfg.init_std / math.sqrt(cfg.width_ratio)


def embedding_std(cfg: ModelConfig) -> float:
  """Initial std of the embedding table under either reading of Table 7."""
  return matrix_std(cfg) if cfg.mup_embedding == "matrix" else cfg.init_std


def kernel_leaf(
  module: nn.Module,
  cfg: ModelConfig,
  shape: tuple[int, ...],
  axes: tuple[str | None, ...],
  std: float,
  *,
  num_in: int = 1,
  num_lead: int = 0,
) -> Any:
  """The parameter `kernel` of `module` as the matmul wants it: floats in either order, or codes."""
  path, layout = "/".join((*module.path, "kernel")), dict(num_in=num_in, num_lead=num_lead)
  if module.has_variable("params", "kernel"):
    stored = nn.unbox(module.get_variable("params", "kernel"))
    if qtensor.is_qtensor(stored):
      leaf.check_leaf(stored, path, shape)
    if qat.is_leaf(stored):
      return qat.view(cfg.quant, path, stored, **layout, dtype=types.dtype_of(cfg.dtype))
    if isinstance(stored, output_major.OutputMajor):
      if stored.shape != tuple(shape):
        raise ValueError(f"{path}: found shape {stored.shape}, expected {tuple(shape)}")
      return stored
  normal = nn.initializers.normal(std)
  init = nn.with_logical_partitioning(normal, axes)
  if leaf.is_stored(cfg.quant, path):
    init = leaf.stored_init(cfg.quant, path, normal, nn.LogicallyPartitioned, axes, **layout)
  kernel = module.param("kernel", init, shape, types.dtype_of(cfg.param_dtype))
  return qat.view(cfg.quant, path, kernel, **layout, dtype=types.dtype_of(cfg.dtype))


class Kernel(nn.Module):
  """A normal-initialised array under the name `kernel`, in storage dtype."""

  cfg: ModelConfig
  shape: tuple[int, ...]
  axes: tuple[str | None, ...]
  std: float | None = None  # None: matrix_std
  num_lead: int = 0  # leading axes that are not the matrix (experts)

  @nn.compact
  def __call__(self) -> Array:
    cfg, std = self.cfg, matrix_std(self.cfg) if self.std is None else self.std
    kernel = kernel_leaf(self, cfg, self.shape, self.axes, std, num_lead=self.num_lead)
    return qat.as_array(kernel, types.dtype_of(cfg.param_dtype)) if qat.is_leaf(kernel) else kernel


class Linear(nn.Module):
  """Matmul without bias over the last `num_in` axes: kernel [*in, *out], maybe quantised."""

  cfg: ModelConfig
  shape: tuple[int, ...]
  axes: tuple[str | None, ...]
  num_in: int = 1

  @nn.compact
  def __call__(self, x: Float[Array, "..."]) -> Float[Array, "..."]:
    std, num_in = matrix_std(self.cfg), self.num_in
    kernel = kernel_leaf(self, self.cfg, self.shape, self.axes, std, num_in=num_in)
    return functional.linear(x, kernel, num_in)


class RMSNorm(nn.Module):
  """RMSNorm with a scale that starts at 1."""

  cfg: ModelConfig
  eps: float | None = None  # None: cfg.norm_eps
  axis: str | None = "embed"

  @nn.compact
  def __call__(self, x: Float[Array, "*rows D"]) -> Float[Array, "*rows D"]:
    init = nn.with_logical_partitioning(nn.initializers.ones, (self.axis,))
    scale = self.param("scale", init, x.shape[-1:], types.dtype_of(self.cfg.param_dtype))
    return functional.rms_norm(x, scale, self.cfg.norm_eps if self.eps is None else self.eps)


def embedded(
  table: Float[Array, "V D"] | qtensor.QTensor, tokens_BT: Int[Array, "B T"], dtype: Any
) -> Float[Array, "B T D"]:
  """Rows of an embedding table, floats or codes."""
  if qtensor.is_qtensor(table):
    return qtensor.rows(table, tokens_BT, dtype)
  return jnp.take(table, tokens_BT, axis=0).astype(dtype)


class Embed(nn.Module):
  """Token embedding times scale_emb; also the head of a tied model."""

  cfg: ModelConfig

  def setup(self):
    cfg = self.cfg
    init = nn.with_logical_partitioning(
      nn.initializers.normal(embedding_std(cfg)), ("vocab", "embed")
    )
    shape, path = (cfg.padded_vocab_size, cfg.model_dim), "/".join((*self.path, "embedding"))
    if leaf.is_stored(cfg.quant, path):
      normal, layout = nn.initializers.normal(embedding_std(cfg)), dict(num_in=1, is_table=True)
      boxes = (nn.LogicallyPartitioned, ("vocab", "embed"))
      init = leaf.stored_init(cfg.quant, path, normal, *boxes, **layout)
    if self.has_variable("params", "embedding"):
      stored = nn.unbox(self.get_variable("params", "embedding"))
      if qtensor.is_qtensor(stored):
        leaf.check_leaf(stored, path, shape)
        dtype = types.dtype_of(cfg.dtype)
        self.embedding = qat.view(cfg.quant, path, stored, num_in=1, dtype=dtype)
        return
      qat.check_running_only(cfg.quant, path)
    self.embedding = self.param("embedding", init, shape, types.dtype_of(cfg.param_dtype))

  def __call__(self, tokens_BT: Int[Array, "B T"]) -> Float[Array, "B T D"]:
    x_BTD = embedded(self.embedding, tokens_BT, types.dtype_of(self.cfg.dtype))
    x_BTD = x_BTD if self.cfg.scale_emb == 1.0 else x_BTD * self.cfg.scale_emb
    return mesh.constrain(x_BTD, "act_batch", "act_seq", "act_embed")

  def attend(self, hidden_BTD: Float[Array, "B T D"]) -> Float[Array, "B T V"]:
    """float32 logits with the table as head."""
    return functional.unembed(hidden_BTD, self.embedding, self.cfg.logit_divisor, is_tied=True)


class Head(nn.Module):
  """Output head of an untied model."""

  cfg: ModelConfig

  @nn.compact
  def __call__(self, hidden_BTD: Float[Array, "B T D"]) -> Float[Array, "B T V"]:
    cfg, shape = self.cfg, (self.cfg.model_dim, self.cfg.padded_vocab_size)
    kernel = kernel_leaf(self, cfg, shape, ("embed", "vocab"), matrix_std(cfg))
    return functional.unembed(hidden_BTD, kernel, cfg.logit_divisor, is_tied=False)


class MLP(nn.Module):
  """down(act(gate x) * up x)."""

  cfg: ModelConfig

  @nn.compact
  def __call__(self, x_BTD: Float[Array, "B T D"]) -> Float[Array, "B T D"]:
    cfg = self.cfg
    D, F = cfg.model_dim, cfg.mlp_dim
    if self.has_variable("params", "gate_up"):  # models/joined.py
      joined = Linear(cfg, (D, 2 * F), ("embed", "mlp"), name="gate_up")(x_BTD)
      gate_BTF, up_BTF = jnp.split(joined, 2, axis=-1)
    else:
      gate_BTF = Linear(cfg, (D, F), ("embed", "mlp"), name="gate")(x_BTD)
      up_BTF = Linear(cfg, (D, F), ("embed", "mlp"), name="up")(x_BTD)
    h_BTF = functional.gated(gate_BTF, up_BTF, cfg.act, cfg.act_threshold)
    h_BTF = mesh.constrain(h_BTF, "act_batch", "act_seq", "act_mlp")
    return Linear(cfg, (F, D), ("mlp", "embed"), name="down")(h_BTF)
