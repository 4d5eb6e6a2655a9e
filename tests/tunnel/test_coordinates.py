"""Activation sizes of one layer by hand; slopes of planted power laws."""

import jax
import numpy as np
import pytest

from minicpm_jax.core import rng
from minicpm_jax.models import transformer
from minicpm_jax.tunnel import coordinates, plan
from tests.models import common


def test_sizes_are_what_the_blocks_add():
  """The last block's outputs are the change of the residual stream: h1 - h0 = attn + mlp."""
  cfg = plan.small_model(16, num_layers=1, head_dim=8, base_width=8)
  model = transformer.Transformer(cfg)
  params = transformer.init_params(model, rng.key(0, "init"))
  ids = np.random.default_rng(0).integers(0, 128, (2, 12))
  found = coordinates.activation_rms(cfg, params, ids)
  assert set(found) == {"embed", "logits", "layer0/attn", "layer0/mlp"}
  table = np.asarray(params["embed"]["embedding"])
  embedded = 12.0 * table[ids]
  assert found["embed"] == pytest.approx(np.sqrt(np.mean(embedded**2)), rel=1e-5)
  logits = common.apply(model, params, ids).logits
  assert found["logits"] == pytest.approx(np.sqrt(np.mean(np.square(logits))), rel=1e-5)
  # A zero o kernel leaves nothing of attention, twice the down kernel doubles the MLP.
  params["layers"]["attn"]["o"]["kernel"] *= 0
  silent = coordinates.activation_rms(cfg, params, ids)
  params["layers"]["mlp"]["down"]["kernel"] *= 2
  doubled = coordinates.activation_rms(cfg, params, ids)
  assert silent["layer0/attn"] == 0
  assert doubled["layer0/mlp"] == pytest.approx(2 * silent["layer0/mlp"], rel=1e-5)
  normed = embedded / np.sqrt(np.mean(embedded**2, -1, keepdims=True) + cfg.norm_eps)
  gate, up, down = (
    np.asarray(params["layers"]["mlp"][n]["kernel"][0]) for n in ("gate", "up", "down")
  )
  mlp = (np.asarray(jax.nn.silu(normed @ gate)) * (normed @ up)) @ down
  assert doubled["layer0/mlp"] == pytest.approx(1.4 * np.sqrt(np.mean(mlp**2)), rel=1e-4)


def test_slopes_of_power_laws():
  sizes = {w: {"flat": 2.0, "root": w**0.5, "inverse": 3 / w} for w in (16, 32, 128)}
  found = coordinates.slopes(sizes)
  assert found == {
    "flat": pytest.approx(0, abs=1e-9),
    "root": pytest.approx(0.5),
    "inverse": pytest.approx(-1),
  }
  with pytest.raises(ValueError, match="at least two"):
    coordinates.slopes({16: {"x": 1.0}})
