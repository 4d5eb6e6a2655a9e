"""Training with quantised weights: prepared once a step, straight-through, sharded, its metrics."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from minicpm_jax.config import FP8Config, MeshConfig, OptimConfig, QuantConfig
from minicpm_jax.core import mesh as mesh_lib
from minicpm_jax.core import trees
from minicpm_jax.models import transformer
from minicpm_jax.optim import build, schedules
from minicpm_jax.quant import qat, qtensor, tree
from minicpm_jax.train import step as step_lib
from tests.models import common
from tests.train import conftest as training

TERNARY = QuantConfig(scheme="ternary", group_size=16)
FP8 = QuantConfig(scheme="none", fp8=FP8Config())
# sgd with rate 1: updates are the gradients
SGD = OptimConfig(peak_lr=1.0, clip_norm=0.0, weight_decay=0.0, mup=False)


def built(quant, **changes):
  cfg = training.model_config(quant=quant, **changes)
  model, params = common.build(cfg)
  return model, params


def one_step(model, params, batch, **kwargs):
  """(parameters after, metrics, gradient norms) of one AdamW step."""
  optimizer = build.make_optimizer(SGD, model.cfg, params)
  step = step_lib.make_train_step(
    step_lib.make_loss_fn(model), step_lib.make_totals_fn(model), optimizer, **kwargs
  )
  schedule = schedules.schedule_arrays(SGD.schedule, 0.01)
  state = step_lib.TrainState(jnp.int32(100), params, optimizer.init(params))
  state, metrics, norms = jax.jit(step)(state, batch, schedule)
  return state.params, metrics, norms


@pytest.fixture(scope="module")
def batch():
  return jax.tree.map(jnp.asarray, training.packed_batch())


@pytest.mark.parametrize(
  "quant", [TERNARY, pytest.param(FP8, marks=pytest.mark.slow)], ids=["ternary", "fp8"]
)
def test_preparing_once_equals_preparing_in_every_forward(batch, quant):
  """The two micro-batches of an accumulated step share one quantisation; nothing changes."""
  model, params = built(quant, remat="full")
  weights = step_lib.quantized_weights(model.cfg)
  once = one_step(model, params, batch, weights=weights, grad_accum=2)
  spot = one_step(model, params, batch, grad_accum=2)
  common.assert_trees_close(once[2], spot[2], atol=1e-6)
  np.testing.assert_allclose(once[1]["loss"].sum, spot[1]["loss"].sum, rtol=1e-6)


def test_health_counts_zeros_and_flips(batch):
  model, params = built(TERNARY)
  after, metrics, _ = one_step(model, params, batch, weights=step_lib.quantized_weights(model.cfg))
  codes = dataclasses.replace(TERNARY, weights="codes")
  before, after = (tree.selected(codes, tree.quantize_params(codes, p)) for p in (params, after))
  pairs = [(np.asarray(before[p].codes), np.asarray(after[p].codes)) for p in before]
  count = sum(a.size for a, _ in pairs)
  assert float(metrics["zero_share"].weight) == count == tree.num_weights(TERNARY, params)
  assert float(metrics["zero_share"].sum) == sum(np.sum(a == 0) for a, _ in pairs)
  flips = sum(np.sum(a != b) for a, b in pairs)
  assert float(metrics["flip_rate"].sum) == flips > 0


@pytest.mark.parametrize(
  "quant, fsdp, tp",
  [
    (dataclasses.replace(TERNARY, group_size=-1), 2, 2),
    pytest.param(FP8, 4, 1, marks=pytest.mark.slow),
  ],
  ids=["ternary", "fp8"],
)
def test_a_quantised_step_on_a_mesh(batch, quant, fsdp, tp):
  model, params = built(quant)
  weights = step_lib.quantized_weights(model.cfg)
  _, metrics, norms = one_step(model, params, batch, weights=weights)
  mesh = mesh_lib.make_mesh(MeshConfig(dp=1, fsdp=fsdp, tp=tp), jax.devices()[:4])
  shapes, specs = transformer.abstract_params(model)
  with jax.set_mesh(mesh):
    placed = jax.device_put(params, mesh_lib.tree_shardings(mesh, specs, shapes))
    rows = jax.device_put(batch, mesh_lib.batch_sharding(mesh))
    _, found, found_norms = one_step(model, placed, rows, weights=weights)
  np.testing.assert_allclose(found["loss"].sum, metrics["loss"].sum, rtol=1e-5)
  common.assert_trees_close(jax.device_get(found_norms), norms, atol=1e-5)


@pytest.mark.parametrize("g, device", [(-1, "cpu"), (-1, "gpu"), (16, "cpu")])
def test_low_precision_keeps_the_scale_out_of_the_product(g, device, monkeypatch):
  """bf16 compute, one scale a channel: T is exact, so only x, dy and the result are rounded.

  (On an accelerator the sums too, before the scale.)
  """
  monkeypatch.setattr(jax, "default_backend", lambda: device)
  rng = np.random.default_rng(0)
  w = jnp.asarray(rng.normal(size=(64, 8)), jnp.float32)
  x = jnp.asarray(rng.integers(-8, 9, (16, 64)), jnp.bfloat16)  # exact in bf16
  cfg = dataclasses.replace(TERNARY, group_size=g)
  kernel = qat.prepare_kernel(cfg, "w", w, num_in=1, num_lead=0, dtype=jnp.bfloat16)
  assert (kernel.scale is None) == (g == 16)

  def run(w):
    return qat.matmul(x, kernel.replace(latent=w))

  y, pull = jax.vjp(run, w)
  (dw,) = pull(jnp.ones_like(y))
  expected = np.asarray(x, np.float64) @ np.asarray(qat.as_array(kernel, jnp.float32), np.float64)
  np.testing.assert_allclose(
    y.astype(jnp.float32), expected, rtol=2**-7, atol=0.2 if g == 16 else 0
  )
  sums = np.asarray(x, np.float64).sum(axis=0)[:, None]
  np.testing.assert_array_equal(dw, np.broadcast_to(sums, w.shape))  # x^T dy, no scale in it


def test_int8_activations_by_hand():
  x = jnp.asarray([[1.0, -0.5, 0.004], [0.0, 0.0, 0.0]])
  found = qat.fake_rows(x)
  np.testing.assert_allclose(found[0], [1.0, -64 / 127, 1 / 127], rtol=1e-6)
  np.testing.assert_array_equal(found[1], 0)
  kernel = qat.prepare_kernel(
    QuantConfig(act_bits=8), "w", jnp.ones((3, 2)), num_in=1, num_lead=0, dtype=jnp.float32
  )
  np.testing.assert_allclose(qat.matmul(x, kernel)[0], float(found[0].sum()), rtol=1e-6)
  grad = jax.grad(lambda x: jnp.sum(qat.matmul(x, kernel)))(x)
  np.testing.assert_allclose(grad, 2.0, rtol=1e-6)


def test_inputs_are_rounded_for_the_selected_codes_alone():
  cfg = QuantConfig(scheme="int4", weights="codes", act_bits=8, exclude=("mlp/", "attn/o"))
  qt = qtensor.quantize(jnp.ones((8, 4)), "int4")
  layout = dict(num_in=1, num_lead=0, dtype=jnp.float32)
  found = {n: qat.view(cfg, f"a/{n}/kernel", qt, **layout).act_bits
           for n in ("attn/q", "attn/o", "attn/qkv", "mlp/gate_up", "mlp/down")}  # fmt: skip
  assert found == dict.fromkeys(found) | {"attn/q": 8, "attn/qkv": 8}


def test_only_projections_are_touched():
  _, params = built(TERNARY)
  attached = qat.prepare(TERNARY, params, jnp.float32)(params)
  leaves = trees.flatten_paths(attached, qat.is_leaf)
  prepared = {path for path, x in leaves.items() if isinstance(x, qat.Prepared)}
  expected = {f"layers/attn/{n}/kernel" for n in "qkvo"}
  assert prepared == expected | {f"layers/mlp/{n}/kernel" for n in ("gate", "up", "down")}
  assert qat.prepare(None, params, jnp.float32)(params) is params
