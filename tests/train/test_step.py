"""Loss, accumulation, sharding: against NumPy and against each other."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from minicpm_jax import config
from minicpm_jax.core import mesh as mesh_lib
from minicpm_jax.core import trees
from minicpm_jax.models import transformer
from minicpm_jax.optim import build, schedules
from minicpm_jax.train import step as step_lib

MOE = config.MoEConfig(num_experts=4, experts_per_token=2)
OPTIM = config.OptimConfig(
  peak_lr=0.02, schedule=config.ScheduleConfig(warmup_steps=2, stable_steps=8, decay_steps=4)
)


class Trainer:
  """A compiled step over a mesh, with its state."""

  def __init__(self, cfg, mesh_cfg=None, *, num_devices=1, grad_accum=1, z_loss=0.0):
    devices = jax.devices()[:num_devices]
    self.mesh = mesh_lib.make_mesh(mesh_cfg or config.MeshConfig(), devices)
    self.model = transformer.Transformer(cfg)
    shapes, _ = transformer.abstract_params(self.model)
    tx = build.make_optimizer(OPTIM, cfg, shapes)
    with jax.set_mesh(self.mesh):
      self.abstract = step_lib.abstract_state(self.model, tx, self.mesh)
      params = step_lib.init_params(self.model, self.abstract, 0)
      self.state = step_lib.fresh_state(tx, params, self.abstract)
    loss_fn = step_lib.make_loss_fn(self.model, z_loss=z_loss)
    totals_fn = step_lib.make_totals_fn(self.model)
    fn = step_lib.make_train_step(loss_fn, totals_fn, tx, grad_accum=grad_accum)
    self.step = step_lib.jit_train_step(fn, self.abstract, self.mesh)
    self.schedule = schedules.schedule_arrays(OPTIM.schedule, OPTIM.peak_lr)

  def run(self, batches):
    with jax.set_mesh(self.mesh):
      for batch in batches:
        sharded = mesh_lib.shard_batch(self.mesh, batch)
        self.state, metrics, norms = self.step(self.state, sharded, self.schedule)
    return {k: float(m.mean) for k, m in metrics.items()}, jax.device_get(norms)


def outcome(trainer, batches):
  metrics, norms = trainer.run(batches)
  return metrics, norms, jax.device_get(trees.flatten_paths(trainer.state.params))


def assert_same(a, b, rtol=1e-5, atol=1e-5):
  for x, y in zip(a, b, strict=True):
    assert x.keys() == y.keys()
    for name in x:
      np.testing.assert_allclose(x[name], y[name], rtol=rtol, atol=atol, err_msg=name)


def kinds(tiny):
  return {
    "dense_mtp": tiny.model_config(mtp=config.MTPConfig()),
    "moe": tiny.model_config(moe=MOE),
  }


@pytest.fixture(scope="module")
def batches(tiny):
  return [tiny.packed_batch(0), tiny.packed_batch(1)]


@pytest.fixture(scope="module")
def single(tiny, batches):
  """Two steps on one device, for every kind of model."""
  return {name: outcome(Trainer(cfg), batches) for name, cfg in kinds(tiny).items()}


@pytest.mark.smoke
def test_loss_is_the_equation(tiny):
  """L = L_NTP + z mean(log Z^2) + lambda L_MTP, from the logits in float64."""
  cfg = tiny.model_config(mtp=config.MTPConfig(loss_weight=0.3))
  model, batch = transformer.Transformer(cfg), tiny.packed_batch(3)
  params = transformer.init_params(model, jax.random.key(1))
  arrays = jax.tree.map(jnp.asarray, batch)
  inputs = (arrays["tokens"], arrays["positions"], arrays["segment_ids"])

  def logits_of(hidden):
    return np.asarray(model.apply({"params": params}, hidden, method="unembed"), np.float64)

  out = model.apply({"params": params}, *inputs)
  mtp = model.apply({"params": params}, out.hidden, *inputs, method="mtp_hidden")
  tokens, segments, mask = batch["tokens"], batch["segment_ids"], batch["loss_mask"]
  sums = {"main": 0.0, "z": 0.0, "mtp": 0.0}
  counts = {"main": 0.0, "mtp": 0.0}
  main, extra = logits_of(out.hidden), logits_of(mtp)
  for b in range(tiny.rows):
    for t in range(tiny.seq):
      if mask[b, t]:
        log_z = np.log(np.exp(main[b, t]).sum())
        sums["main"] += log_z - main[b, t, tokens[b, t + 1]]
        sums["z"] += log_z**2
        counts["main"] += 1
      if t + 2 < tiny.seq and segments[b, t] == segments[b, t + 2] != 0 and mask[b, t + 1]:
        sums["mtp"] += np.log(np.exp(extra[b, t]).sum()) - extra[b, t, tokens[b, t + 2]]
        counts["mtp"] += 1
  expected = (sums["main"] + 1e-2 * sums["z"]) / counts["main"]
  expected += 0.3 * sums["mtp"] / counts["mtp"]
  loss_fn = step_lib.make_loss_fn(model, z_loss=1e-2)
  totals = step_lib.make_totals_fn(model)(arrays)
  loss, metrics = jax.jit(loss_fn)(params, arrays, step_lib.LossContext(totals))
  np.testing.assert_allclose(loss, expected, rtol=1e-5)
  np.testing.assert_allclose(metrics["loss"].mean, sums["main"] / counts["main"], rtol=1e-5)
  np.testing.assert_allclose(metrics["mtp_loss"].mean, sums["mtp"] / counts["mtp"], rtol=1e-5)


@pytest.mark.parametrize(
  "kind, mesh_cfg, num_devices",
  [
    ("dense_mtp", config.MeshConfig(dp=1, fsdp=8), 8),
    ("dense_mtp", config.MeshConfig(dp=1, tp=4), 4),
    ("dense_mtp", config.MeshConfig(dp=1, cp=4), 4),
    ("dense_mtp", config.MeshConfig(dp=1, fsdp=2, tp=2, cp=2), 8),
    ("moe", config.MeshConfig(dp=1, ep=4), 4),
    ("moe", config.MeshConfig(dp=1, fsdp=2, ep=2, tp=2), 8),
  ],
  ids=["fsdp", "tp", "cp", "fsdp_tp_cp", "ep", "fsdp_ep_tp"],
)
def test_sharded_equals_unsharded(tiny, single, batches, kind, mesh_cfg, num_devices):
  trainer = Trainer(kinds(tiny)[kind], mesh_cfg, num_devices=num_devices)
  assert_same(outcome(trainer, batches), single[kind])


def test_parameters_and_moments_are_born_sharded(tiny):
  trainer = Trainer(kinds(tiny)["moe"], config.MeshConfig(dp=1, fsdp=2, ep=2, tp=2), num_devices=8)
  for path, x in trees.flatten_paths(trainer.state).items():
    if path.endswith("moe/gate/kernel"):
      assert x.addressable_shards[0].data.size == x.size // 8, path
    if path.endswith("embed/embedding"):
      assert x.addressable_shards[0].data.size == x.size // 4, path


def test_accumulation_equals_the_large_batch_with_uneven_masks(tiny, single, batches):
  counts = batches[0]["loss_mask"].sum(axis=1)
  assert counts[::2].sum() != counts[1::2].sum()  # a mean of micro-batch means would be wrong
  trainer = Trainer(kinds(tiny)["dense_mtp"], grad_accum=4)
  assert_same(outcome(trainer, batches), single["dense_mtp"])
  sharded = Trainer(
    kinds(tiny)["dense_mtp"], config.MeshConfig(dp=1, fsdp=2), num_devices=2, grad_accum=2
  )
  assert_same(outcome(sharded, batches), single["dense_mtp"])


@pytest.mark.parametrize("policy", ["dots", "full"])
def test_remat_equals_none(tiny, single, batches, policy):
  cfg = dataclasses.replace(kinds(tiny)["dense_mtp"], remat=policy)
  assert_same(outcome(Trainer(cfg), batches), single["dense_mtp"])


def test_packed_equals_separate(tiny):
  """Loss and gradient of packed rows equal those of every document in a row of its own."""
  cfg = tiny.model_config(mtp=config.MTPConfig())
  model, packed = transformer.Transformer(cfg), tiny.packed_batch(5)
  params = transformer.init_params(model, jax.random.key(2))
  pieces = []
  for row, ids in enumerate(packed["segment_ids"]):
    for segment in range(1, ids.max() + 1):
      here = ids == segment
      piece = {k: np.zeros((1, tiny.seq), v.dtype) for k, v in packed.items()}
      for k, v in packed.items():
        piece[k][0, : here.sum()] = v[row][here]
      piece["segment_ids"] = (piece["segment_ids"] > 0).astype(np.int32)
      pieces.append(piece)
  separate = {k: np.concatenate([p[k] for p in pieces]) for k in packed}
  totals_fn, loss_fn = step_lib.make_totals_fn(model), step_lib.make_loss_fn(model)

  def gradient(batch):
    def loss(p, batch):
      return loss_fn(p, batch, step_lib.LossContext(totals_fn(batch)))[0]

    value, grads = jax.jit(jax.value_and_grad(loss))(params, batch)
    return {"loss": value}, trees.flatten_paths(grads)

  assert_same(gradient(packed), gradient(separate))


def test_update_is_adamw_at_the_scheduled_rate(tiny):
  """One step from the metrics: warm-up 2 steps, so update 1 uses half of the peak."""
  trainer = Trainer(tiny.model_config())
  before = jax.device_get(trainer.state.params["final_norm"]["scale"])
  metrics, norms = trainer.run([tiny.packed_batch(0)])
  after = jax.device_get(trainer.state.params["final_norm"]["scale"])
  assert metrics["learning_rate"] == pytest.approx(0.01)
  assert metrics["grad_norm"] == pytest.approx(np.sqrt(sum(v**2 for v in norms.values())), rel=1e-5)
  # Adam's first update has size lr wherever the gradient is far above eps; norms do not decay.
  np.testing.assert_allclose(np.abs(after - before), 0.01, rtol=1e-3)
  assert int(trainer.state.step) == 1


def test_one_compiled_step_serves_every_branch(tiny):
  trainer = Trainer(tiny.model_config())
  batch = tiny.packed_batch(0)
  for schedule in (
    config.ScheduleConfig(warmup_steps=1, stable_steps=3, decay_steps=2),
    config.ScheduleConfig(warmup_steps=1, decay_steps=2, decay_shape="linear_to"),
    config.ScheduleConfig(kind="cosine", warmup_steps=1, decay_steps=5),
  ):
    trainer.schedule = schedules.schedule_arrays(schedule, 0.01)
    trainer.run([batch])
  assert trainer.step._cache_size() == 1


def test_a_memorisable_batch_is_learned(tiny):
  trainer = Trainer(tiny.model_config(mtp=config.MTPConfig()), z_loss=1e-4)
  batch = tiny.packed_batch(0)
  first, _ = trainer.run([batch])
  last, _ = trainer.run([batch] * 40)
  assert first["loss"] > 3.0 and last["loss"] < 0.5 * first["loss"]


def test_eval_step_is_the_plain_loss(tiny):
  cfg = tiny.model_config(mtp=config.MTPConfig())
  model = transformer.Transformer(cfg)
  batch = jax.tree.map(jnp.asarray, tiny.packed_batch(1))
  params = transformer.init_params(model, jax.random.key(0))
  metrics = step_lib.make_eval_step(model)(params, batch)
  logits = model.apply(
    {"params": params}, batch["tokens"], batch["positions"], batch["segment_ids"]
  ).logits
  nll = optax.softmax_cross_entropy_with_integer_labels(logits, batch["targets"])
  mask = batch["loss_mask"]
  np.testing.assert_allclose(metrics["loss"].mean, (nll * mask).sum() / mask.sum(), rtol=1e-5)
  right = (logits.argmax(-1) == batch["targets"]) * mask
  np.testing.assert_allclose(metrics["accuracy"].sum, right.sum())
