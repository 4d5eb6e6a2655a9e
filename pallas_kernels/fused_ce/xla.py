"""Cross entropy over chunks of tokens; the gradients are taken while the logits are at hand.

One chunk of logits lives at a time, [chunk, V] float32. Under differentiation the forward pass
already forms d loss / d hidden and d loss / d weight, so the backward pass only scales them and
no logits are computed twice (Liger-Kernel, arXiv 2410.10989, section 3.2).

Residuals: d hidden [T, D] and d weight [D, V] in the dtypes of hidden and weight.
Deterministic: chunks are summed in order.
"""

import dataclasses
import functools

import jax
import jax.numpy as jnp


@dataclasses.dataclass(frozen=True, kw_only=True)
class XlaConfig:
  """`chunk` = tokens whose logits are held at once."""

  chunk: int = 512

  def __post_init__(self):
    if self.chunk < 1:
      raise ValueError(f"XlaConfig.chunk: found {self.chunk}, expected 1 or more")


def default_config(num_columns: int) -> XlaConfig:
  """Logits of 16 MB on a CPU, in multiples of 128 tokens; elsewhere a power of two of tokens.

  At most 2 GB on an accelerator. A power of two divides the usual batches, so that products have
  no odd number of rows (ten chunks of 3277, for one, of 32768 tokens).
  """
  if jax.default_backend() == "cpu":
    return XlaConfig(chunk=max(128, 2**22 // num_columns // 128 * 128))
  return XlaConfig(chunk=max(128, 1 << (2**29 // num_columns).bit_length() - 1))


def fused_cross_entropy_xla(
  hidden_TD,
  weight_DV,
  targets_T,
  mask_T,
  *,
  divisor: float,
  z_loss: float,
  vocab_size: int,
  config: XlaConfig | None = None,
):
  """As `api.fused_cross_entropy` with `per_token`."""
  config = default_config(weight_DV.shape[1]) if config is None else config
  static = _Static(float(divisor), float(z_loss), vocab_size, config.chunk)
  (loss, z, correct), nll_T = _cross_entropy(static, hidden_TD, weight_DV, targets_T, mask_T)
  return loss, *jax.lax.stop_gradient((z, correct, nll_T))


@dataclasses.dataclass(frozen=True)
class _Static:
  divisor: float
  z_loss: float
  vocab_size: int
  chunk: int


def _chunks(static: _Static, *arrays):
  """[T, ...] -> [I, C, ...] each, zero rows at the end; a chunk takes every I-th token.

  Strided, so that a token axis that is sharded over devices stays sharded inside every chunk.
  """
  T = arrays[0].shape[0]
  num = -(-T // static.chunk)
  size = -(-T // num)

  def split(x_T):
    x_T = jnp.pad(x_T, [(0, num * size - T)] + [(0, 0)] * (x_T.ndim - 1))
    return jnp.swapaxes(jnp.reshape(x_T, (size, num, *x_T.shape[1:])), 0, 1)

  return tuple(split(x_T) for x_T in arrays)


def _unsplit(x_IC, T: int):
  x_CI = jnp.swapaxes(x_IC, 0, 1)
  return jnp.reshape(x_CI, (-1, *x_CI.shape[2:]))[:T]


def _chunk_loss(static: _Static, hidden_CD, weight_DV, targets_C, mask_C):
  """(sums, exp(logits - top), what turns them into softmax, log Z, loss of every token)."""
  logits_CV = jnp.matmul(hidden_CD, weight_DV, preferred_element_type=jnp.float32)
  logits_CV = logits_CV * (1.0 / static.divisor)
  V = logits_CV.shape[1]
  if static.vocab_size < V:
    is_real_1V = (jnp.arange(V) < static.vocab_size)[None, :]
    logits_CV = jnp.where(is_real_1V, logits_CV, jnp.finfo(jnp.float32).min)
  top_C = jnp.max(logits_CV, axis=-1)
  exp_CV = jnp.exp(logits_CV - top_C[:, None])
  sum_C = jnp.sum(exp_CV, axis=-1)
  log_z_C = top_C + jnp.log(sum_C)
  picked_C = jnp.take_along_axis(logits_CV, targets_C[:, None], axis=-1)[:, 0]
  z_C = static.z_loss * jnp.square(log_z_C)
  nll_C = log_z_C - picked_C
  loss = jnp.sum(mask_C * (nll_C + z_C))
  sums = (loss, jnp.sum(mask_C * z_C), jnp.sum(mask_C * (picked_C >= top_C)))
  return sums, exp_CV, sum_C, log_z_C, nll_C


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _cross_entropy(static: _Static, hidden_TD, weight_DV, targets_T, mask_T):
  def body(sums, chunk):
    hidden_CD, targets_C, mask_C = chunk
    more, *_, nll_C = _chunk_loss(static, hidden_CD, weight_DV, targets_C, mask_C)
    return _add(sums, more), nll_C

  chunks = _chunks(static, hidden_TD, targets_T, mask_T.astype(jnp.float32))
  sums, nll_IC = jax.lax.scan(body, (jnp.float32(0),) * 3, chunks)
  return sums, _unsplit(nll_IC, hidden_TD.shape[0])


def _cross_entropy_fwd(static: _Static, hidden_TD, weight_DV, targets_T, mask_T):
  def gradients(chunk):
    hidden_CD, targets_C, mask_C = chunk
    sums, exp_CV, sum_C, log_z_C, nll_C = _chunk_loss(
      static, hidden_CD, weight_DV, targets_C, mask_C
    )
    weight_C = mask_C / static.divisor
    # d (log Z - picked + z (log Z)^2) / d logits = softmax (1 + 2 z log Z) - one hot.
    soft_C = weight_C * (1.0 + 2.0 * static.z_loss * log_z_C) / sum_C
    is_target_CV = jnp.arange(exp_CV.shape[1])[None, :] == targets_C[:, None]
    dlogits_CV = exp_CV * soft_C[:, None] - jnp.where(is_target_CV, weight_C[:, None], 0.0)
    dlogits_CV = dlogits_CV.astype(hidden_CD.dtype)
    dhidden_CD = jax.lax.dot_general(dlogits_CV, weight_DV, (((1,), (1,)), ((), ())))
    dweight_DV = jax.lax.dot_general(
      hidden_CD, dlogits_CV, (((0,), (0,)), ((), ())), preferred_element_type=jnp.float32
    )
    return sums, (dhidden_CD.astype(hidden_CD.dtype), nll_C), dweight_DV

  def body(carry, chunk):
    sums, dweight_DV = carry
    more_sums, rows_C, more_DV = gradients(chunk)
    return (_add(sums, more_sums), dweight_DV + more_DV), rows_C

  chunks = _chunks(static, hidden_TD, targets_T, mask_T.astype(jnp.float32))
  if chunks[0].shape[0] == 1:
    sums, (dhidden_TD, nll_T), dweight_DV = gradients(tuple(x[0] for x in chunks))
  else:
    start = ((jnp.float32(0),) * 3, jnp.zeros(weight_DV.shape, jnp.float32))
    (sums, dweight_DV), rows_IC = jax.lax.scan(body, start, chunks)
    dhidden_TD, nll_T = (_unsplit(x_IC, hidden_TD.shape[0]) for x_IC in rows_IC)
  return (sums, nll_T), (dhidden_TD, dweight_DV.astype(weight_DV.dtype))


def _cross_entropy_bwd(static: _Static, residuals, cotangents):
  del static
  dhidden_TD, dweight_DV = residuals
  scale = cotangents[0][0]
  return (
    (scale * dhidden_TD).astype(dhidden_TD.dtype),
    (scale * dweight_DV).astype(dweight_DV.dtype),
    None,
    None,
  )


def _add(a, b):
  return jax.tree.map(jnp.add, a, b)


_cross_entropy.defvjp(_cross_entropy_fwd, _cross_entropy_bwd)
