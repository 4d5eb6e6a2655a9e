"""Sharded equals unsharded on eight host devices: loss and gradients."""

import jax
import numpy as np
import pytest

from minicpm_jax.config import MeshConfig
from minicpm_jax.core import mesh as mesh_lib
from minicpm_jax.models import transformer
from tests.models import common

TOKENS = common.tokens((4, 24))


def gradients(model):
  ids = np.repeat([1, 2, 0], [10, 12, 2])[None].repeat(4, axis=0)

  def loss(params, tokens_BT):
    return common.mean_loss(model, params, tokens_BT, segment_ids_BT=ids)

  return jax.jit(jax.value_and_grad(loss))


@pytest.fixture(scope="module", params=["minicpm4_8b", "minicpm_moe_8x2b"])
def reference(request):
  cfg = common.config(request.param)
  model, params = common.build(cfg)
  return request.param, model, params, *gradients(model)(params, TOKENS)


@pytest.mark.parametrize(
  "sizes",
  [{"tp": 2, "fsdp": 2, "dp": 1}, {"cp": 2, "ep": 2, "dp": 1}],
  ids=["tp-fsdp", "cp-ep"],
)
def test_sharded_equals_unsharded(reference, sizes):
  _, model, params, loss, grads = reference
  mesh = mesh_lib.make_mesh(MeshConfig(**sizes), jax.devices()[:4])
  shapes, specs = transformer.abstract_params(model)
  places = mesh_lib.tree_shardings(mesh, specs, shapes)
  with jax.set_mesh(mesh):
    placed = jax.device_put(params, places)
    tokens_BT = jax.device_put(TOKENS, mesh_lib.batch_sharding(mesh))
    found_loss, found = gradients(model)(placed, tokens_BT)
  np.testing.assert_allclose(found_loss, loss, rtol=1e-5)
  common.assert_trees_close(jax.device_get(found), grads, atol=1e-5)


def test_sharded_logits_of_one_row():
  """Batch 1 cannot be cut: decoding on a mesh leaves it whole and agrees."""
  cfg = common.config("minicpm_moe_8x2b")
  model, params = common.build(cfg)
  expected = common.apply(model, params, TOKENS[:1]).logits
  mesh = mesh_lib.make_mesh(MeshConfig(dp=1, ep=2, tp=2), jax.devices()[:4])
  shapes, specs = transformer.abstract_params(model)
  with jax.set_mesh(mesh):
    placed = jax.device_put(params, mesh_lib.tree_shardings(mesh, specs, shapes))
    found = common.apply(model, placed, TOKENS[:1]).logits
  np.testing.assert_allclose(jax.device_get(found), expected, atol=1e-5)
