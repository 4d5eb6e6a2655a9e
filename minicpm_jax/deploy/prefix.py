"""Prefix tokens of a model: which, and their keys and values in full precision (quantization 5.2).

  tokens = prefix.find(model, params, batches)
  before = prefix.key_values(model, params, tokens)      # quant.prefix.save(folder, before)
  cache = models.cache.with_prefix(cfg, before, batch_size, capacity)

and the evaluation of weights with 8-bit activations behind them, by fake quantisation of the inputs
of every projection: static (one scale a projection, from calibration text) or one scale a token.
"""

import functools
from collections.abc import Callable, Sequence
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from minicpm_jax.config import ModelConfig
from minicpm_jax.core import types
from minicpm_jax.deploy import blocks
from minicpm_jax.models import cache as cache_lib
from minicpm_jax.models import transformer
from minicpm_jax.nn import layers
from minicpm_jax.quant import prefix, qat

Batch = tuple[np.ndarray, np.ndarray]  # tokens [B, T], segment ids [B, T] (0 = padding)
Scales = dict[str, float]  # "layers_3/mlp/down" -> scale of its input


@functools.partial(jax.jit, static_argnames="cfg")
def _block(cfg: ModelConfig, layer: Any, x_BTD: Array, segment_ids_BT: Array, before: Any) -> Any:
  """(output, {name: max |input| of every token [B, T]})."""
  out, seen = blocks.run(cfg, layer, x_BTD, segment_ids_BT, before)

  def size(x: Array) -> Array:
    return jnp.max(jnp.abs(x.reshape(*x.shape[:2], -1)), axis=-1).astype(jnp.float32)

  return out, {name: size(x) for name, (x, y) in seen.items() if y is not None and name != "moe"}


def input_sizes(
  model: transformer.Transformer,
  params: types.Params,
  batch: Batch,
  before: prefix.Prefix | None = None,
) -> list[dict[str, Float[np.ndarray, "B T"]]]:
  """max |input| of every token by layer and projection ("attn/q", ...), behind the prefix."""
  tokens, segments = batch
  x_BTD, found = blocks.embed(model, params, tokens), []
  for i in range(model.cfg.num_layers):
    layer = blocks.layer_params(model.cfg, params, i)
    at = blocks.layer_prefix(model.cfg, before, i)
    x_BTD, sizes = _block(model.cfg, layer, x_BTD, jnp.asarray(segments), at)
    found.append(jax.device_get(sizes))
  return found


def find(
  model: transformer.Transformer,
  params: types.Params,
  batches: Sequence[Batch],
  *,
  threshold: float = prefix.THRESHOLD,
  bos_id: int | None = None,
) -> tuple[int, ...]:
  """Prefix tokens of the model on calibration text, one document a row; () without outliers.

  bos_id: the last of them; default the config's.
  """
  bos_id = model.cfg.bos_id if bos_id is None else bos_id
  if bos_id is None:
    raise ValueError("bos_id: found None in the model's config, expected the id of a first token")
  if not batches:
    raise ValueError("batches: found none, expected calibration text")
  if model.cfg.moe is not None:
    raise ValueError("model.moe: found experts, expected one MLP a block (one down projection)")
  tally = prefix.Tally(model.cfg.num_layers, threshold)
  for tokens, segments in batches:
    sizes = [layer["mlp/down"] for layer in input_sizes(model, params, (tokens, segments))]
    tally.add(tokens, np.stack(sizes), np.asarray(segments) != 0)
  return tally.choose(bos_id)


def key_values(
  model: transformer.Transformer, params: types.Params, tokens: Sequence[int]
) -> prefix.Prefix:
  """Keys and values of `tokens` at positions 0, 1, ..., from the model as it is given."""
  tokens = tuple(int(t) for t in tokens)
  bad = [t for t in tokens if not 0 <= t < model.cfg.vocab_size]
  if not tokens or bad:
    raise ValueError(f"tokens: found {bad or 'none'}, expected ids below {model.cfg.vocab_size}")
  cache = cache_lib.init(model.cfg, 1, len(tokens))
  ids = np.asarray(tokens, np.int32)[None]
  cache = model.apply({"params": params}, ids, cache=cache, return_logits=False).cache
  k, v = (jnp.stack(x)[:, 0] if isinstance(x, tuple) else x[:, 0] for x in (cache.k, cache.v))
  return prefix.Prefix(k, v, tokens)


# --- 8-bit activations ---------------------------------------------------------------------------


def activation_scales(
  model: transformer.Transformer,
  params: types.Params,
  batches: Sequence[Batch],
  before: prefix.Prefix | None = None,
) -> Scales:
  """max |input| / 127 of every projection over the calibration text (the prefix not counted)."""
  if not batches:
    raise ValueError("batches: found none, expected calibration text")
  high: Scales = {}
  for tokens, segments in batches:
    keep_BT = np.asarray(segments) != 0
    for i, layer in enumerate(input_sizes(model, params, (tokens, segments), before)):
      for name, size_BT in layer.items():
        path = f"layers_{i}/{name}"
        high[path] = max(high.get(path, 0.0), float(np.max(size_BT[keep_BT], initial=0.0)))
  return {path: size / 127 if size > 0 else 1.0 for path, size in high.items()}


def fake_inputs(scales: Scales | None) -> Callable[..., Any]:
  """An interceptor (`nn.intercept_methods`) that rounds inputs of projections to 8 bits.

  Static scales, one a projection (values beyond them are clipped), or None: absmax of every token.
  """

  def rounded(call: Callable[..., Any], args: Any, kwargs: Any, where: Any) -> Any:
    if not isinstance(where.module, layers.Linear) or where.method_name != "__call__":
      return call(*args, **kwargs)
    path, x = "/".join(where.module.path), args[0]
    if scales is None:
      flat = x.reshape(-1, int(np.prod(where.module.shape[: where.module.num_in])))
      return call(qat.fake_rows(flat).reshape(x.shape), *args[1:], **kwargs)
    if path not in scales:
      raise ValueError(
        f"scales: found none for {path}, expected one a projection of an unrolled model "
        "(models.convert.unstack_layers)"
      )
    x32 = x.astype(jnp.float32) / scales[path]
    x8 = (jnp.clip(jnp.round(x32), -127, 127) * scales[path]).astype(x.dtype)
    return call(x8, *args[1:], **kwargs)

  return rounded


def forward(
  model: transformer.Transformer,
  params: types.Params,
  tokens_BT: Any,
  *,
  before: prefix.Prefix | None = None,
  act: Scales | None | bool = False,
) -> Float[Array, "B T V"]:
  """Logits of rows that follow the prefix; act: static scales, None = 8 bits a token, False = off.

  Static scales need the unrolled form of the model.
  """
  more = {}
  if before is not None:
    B, T = tokens_BT.shape
    more["cache"] = cache_lib.with_prefix(model.cfg, before, B, before.length + T)
  if act is False:
    return model.apply({"params": params}, tokens_BT, **more).logits
  with nn.intercept_methods(fake_inputs(act)):
    return model.apply({"params": params}, tokens_BT, **more).logits
