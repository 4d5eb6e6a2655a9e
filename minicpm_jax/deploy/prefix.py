"""Prefix tokens of a model: which, and their keys and values in full precision (quantization 5.2).

  tokens = prefix.find(model, params, batches)
  before = prefix.key_values(model, params, tokens)      # quant.prefix.save(folder, before)
  cache = models.cache.with_prefix(cfg, before, batch_size, capacity)

and the evaluation of weights with 8-bit activations behind them, by fake quantisation of the inputs
of every projection: static (one scale a projection, from calibration text) or one scale a token.
"""

import functools
from collections.abc import Callable, Sequence
from typing import Any, Literal

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
Scales = list[dict[str, float]]  # by layer: "mlp/down" -> scale of its input


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
  high: Scales = [{} for _ in range(model.cfg.num_layers)]
  for tokens, segments in batches:
    keep_BT = np.asarray(segments) != 0
    for i, layer in enumerate(input_sizes(model, params, (tokens, segments), before)):
      for name, size_BT in layer.items():
        size = float(np.max(size_BT[keep_BT], initial=0.0))
        high[i][name] = max(high[i].get(name, 0.0), size)
  return [{n: size / 127 if size > 0 else 1.0 for n, size in layer.items()} for layer in high]


def _fake_inputs(scales: dict[str, Any] | None) -> Callable[..., Any]:
  """An interceptor (`nn.intercept_methods`) that rounds the inputs of projections to 8 bits."""

  def rounded(call: Callable[..., Any], args: Any, kwargs: Any, where: Any) -> Any:
    if not isinstance(where.module, layers.Linear) or where.method_name != "__call__":
      return call(*args, **kwargs)
    name, x = "/".join(where.module.path), args[0]
    if scales is None:
      flat = x.reshape(-1, int(np.prod(where.module.shape[: where.module.num_in])))
      return call(qat.fake_rows(flat).reshape(x.shape), *args[1:], **kwargs)
    if name not in scales:
      raise ValueError(f"act: found no scale for {name}, expected one a projection and layer")
    codes = jnp.clip(jnp.round(x.astype(jnp.float32) / scales[name]), -127, 127)
    return call((codes * scales[name]).astype(x.dtype), *args[1:], **kwargs)

  return rounded


@functools.partial(jax.jit, static_argnames=("cfg", "is_rounded"))
def _rounded_block(
  cfg: ModelConfig, layer: Any, x_BTD: Array, ids_BT: Array, before: Any, scales: Any, is_rounded
) -> Array:
  if not is_rounded:
    return blocks.run(cfg, layer, x_BTD, ids_BT, before)[0]
  with nn.intercept_methods(_fake_inputs(scales)):
    return blocks.run(cfg, layer, x_BTD, ids_BT, before)[0]


@functools.partial(jax.jit, static_argnames="model")
def _head(model: transformer.Transformer, params: types.Params, x_BTD: Array) -> Array:
  return nn.apply(lambda m, x: m.unembed(m.final_norm(x)), model)({"params": params}, x_BTD)


def forward(
  model: transformer.Transformer,
  params: types.Params,
  batch: Batch,
  *,
  before: prefix.Prefix | None = None,
  act: Scales | Literal["off", "token"] = "off",
) -> Float[Array, "B T V"]:
  """Logits of rows that follow the prefix, block by block, with inputs of projections rounded.

  act: static 8-bit scales (values beyond them are clipped), or "token" = absmax of every token.
  """
  if not isinstance(act, list) and act not in ("off", "token"):
    raise ValueError(f"act: found {act!r}, expected off, token or scales by layer")
  if isinstance(act, list) and len(act) != model.cfg.num_layers:
    raise ValueError(f"act: found scales of {len(act)} layers, expected {model.cfg.num_layers}")
  tokens, segments = batch
  x_BTD, ids_BT = blocks.embed(model, params, tokens), jnp.asarray(segments)
  for i in range(model.cfg.num_layers):
    layer = blocks.layer_params(model.cfg, params, i)
    at = blocks.layer_prefix(model.cfg, before, i)
    scales = act[i] if isinstance(act, list) else None
    args = (model.cfg, layer, x_BTD, ids_BT, at, scales)
    x_BTD = _rounded_block(*args, is_rounded=act != "off")
  rest = {name: leaf for name, leaf in params.items() if not name.startswith("layers")}
  return _head(model, rest, x_BTD)
