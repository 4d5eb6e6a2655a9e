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
      self.start = step_lib.fresh_state(tx, params, self.abstract)
    loss_fn = step_lib.make_loss_fn(self.model, z_loss=z_loss)
    totals_fn = step_lib.make_totals_fn(self.model)
    fn = step_lib.make_train_step(loss_fn, totals_fn, tx, grad_accum=grad_accum)
    self.step = step_lib.jit_train_step(fn, self.abstract, self.mesh)
    self.reset()

  def reset(self):
    self.state = jax.tree.map(jnp.copy, self.start)
    self.schedule = schedules.schedule_arrays(OPTIM.schedule, OPTIM.peak_lr)
    return self

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
def dense(tiny):
  """The compiled step of the dense model with MTP on one device; tests begin with `reset`."""
  return Trainer(kinds(tiny)["dense_mtp"])


@pytest.fixture(scope="module")
def single(tiny, batches, dense):
  """Two steps on one device, for every kind of model."""
  moe = Trainer(kinds(tiny)["moe"])
  return {"dense_mtp": outcome(dense.reset(), batches), "moe": outcome(moe, batches)}


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
    ("dense_mtp", config.MeshConfig(dp=1, fsdp=2, tp=2, cp=2), 8),
    ("moe", config.MeshConfig(dp=1, fsdp=2, ep=2, tp=2), 8),
    pytest.param("dense_mtp", config.MeshConfig(dp=1, fsdp=8), 8, marks=pytest.mark.slow),
    pytest.param("dense_mtp", config.MeshConfig(dp=1, tp=4), 4, marks=pytest.mark.slow),
    pytest.param("dense_mtp", config.MeshConfig(dp=1, cp=4), 4, marks=pytest.mark.slow),
    pytest.param("moe", config.MeshConfig(dp=1, ep=4), 4, marks=pytest.mark.slow),
    pytest.param("moe", config.MeshConfig(dp=2, ep=2, cp=2), 8, marks=pytest.mark.slow),
  ],
  ids=["fsdp_tp_cp", "fsdp_ep_tp", "fsdp", "tp", "cp", "ep", "dp_ep_cp"],
)
def test_sharded_equals_unsharded(tiny, single, batches, kind, mesh_cfg, num_devices):
  """Parameters within a thousandth of a step: where a gradient is nothing but rounding, Adam makes
  a step of it all the same (jax 0.12: one number of 16,384 moves by 1.3e-5).
  """
  trainer = Trainer(kinds(tiny)[kind], mesh_cfg, num_devices=num_devices)
  found, expected = outcome(trainer, batches), single[kind]
  assert_same(found[:2], expected[:2])
  assert_same(found[2:], expected[2:], atol=1e-3 * OPTIM.peak_lr)


def test_parameters_and_moments_are_born_sharded(tiny):
  mesh = mesh_lib.make_mesh(config.MeshConfig(dp=1, fsdp=2, ep=2, tp=2))
  model = transformer.Transformer(kinds(tiny)["moe"])
  tx = build.make_optimizer(OPTIM, model.cfg, transformer.abstract_params(model)[0])
  abstract = step_lib.abstract_state(model, tx, mesh)
  found = 0
  for path, x in trees.flatten_paths(abstract).items():
    parts = np.prod(x.shape) / np.prod(x.sharding.shard_shape(x.shape))
    if path.endswith("moe/gate/kernel"):
      found += parts == 8
    if path.endswith("embed/embedding"):
      found += parts == 4
  assert found == 6  # both in params, mu and nu


def test_accumulation_equals_the_large_batch_with_uneven_masks(tiny, single, batches):
  """Two micro-batches on each of two devices."""
  counts = batches[0]["loss_mask"].sum(axis=1)
  assert counts[::2].sum() != counts[1::2].sum()  # a mean of micro-batch means would be wrong
  mesh_cfg = config.MeshConfig(dp=1, fsdp=2)
  trainer = Trainer(kinds(tiny)["dense_mtp"], mesh_cfg, num_devices=2, grad_accum=2)
  assert_same(outcome(trainer, batches), single["dense_mtp"])


def loss_and_gradient(model):
  """Compiled (params, batch) -> ({"loss"}, gradients by path)."""
  totals_fn, loss_fn = step_lib.make_totals_fn(model), step_lib.make_loss_fn(model)

  @jax.jit
  def compute(params, batch):
    def loss(p):
      return loss_fn(p, batch, step_lib.LossContext(totals_fn(batch)))[0]

    value, grads = jax.value_and_grad(loss)(params)
    return {"loss": value}, trees.flatten_paths(grads)

  return compute


@pytest.mark.parametrize("kind, policy", [("dense_mtp", "dots"), ("moe", "full")])
def test_remat_equals_none(tiny, kind, policy):
  cfg, batch = kinds(tiny)[kind], tiny.packed_batch(0)
  params = transformer.init_params(transformer.Transformer(cfg), jax.random.key(0))
  plain, remat = (
    loss_and_gradient(transformer.Transformer(dataclasses.replace(cfg, remat=p)))(params, batch)
    for p in ("none", policy)
  )
  assert_same(remat, plain)


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
  compute = loss_and_gradient(model)
  assert_same(compute(params, packed), compute(params, separate))


def test_update_is_adamw_at_the_scheduled_rate(tiny, dense):
  """One step from the metrics: warm-up 2 steps, so update 1 uses half of the peak."""
  before = jax.device_get(dense.reset().state.params["final_norm"]["scale"])
  metrics, norms = dense.run([tiny.packed_batch(0)])
  after = jax.device_get(dense.state.params["final_norm"]["scale"])
  assert metrics["learning_rate"] == pytest.approx(0.01)
  assert metrics["grad_norm"] == pytest.approx(np.sqrt(sum(v**2 for v in norms.values())), rel=1e-5)
  # Adam's first update has size lr wherever the gradient is far above eps; norms do not decay.
  np.testing.assert_allclose(np.abs(after - before), 0.01, rtol=1e-3)
  assert int(dense.state.step) == 1


def test_one_compiled_step_serves_every_branch(tiny, dense):
  dense.reset()
  rates = []
  for schedule in (
    config.ScheduleConfig(warmup_steps=1, stable_steps=3, decay_steps=2),
    config.ScheduleConfig(warmup_steps=0, decay_steps=4, decay_shape="linear_to"),
    config.ScheduleConfig(kind="cosine", warmup_steps=1, decay_steps=4),
  ):
    dense.schedule = schedules.schedule_arrays(schedule, 0.01)
    rates.append(dense.run([tiny.packed_batch(0)])[0]["learning_rate"])
  # Updates 1, 2, 3: the peak; 1 - 0.9 * 2/4; half a cosine (to 0.1) after 2 of 4 steps.
  np.testing.assert_allclose(rates, [0.01, 0.0055, 0.0055], rtol=1e-5)
  assert dense.step._cache_size() == 1


def test_a_memorisable_batch_is_learned(tiny, dense):
  batch = tiny.packed_batch(0)
  first, _ = dense.reset().run([batch])
  dense.schedule = schedules.schedule_arrays(config.ScheduleConfig(kind="constant"), 0.02)
  last, _ = dense.run([batch] * 60)
  assert first["loss"] > 3.0 and last["loss"] < 0.5 * first["loss"]


def test_loss_of_every_source(tiny):
  """Against the loss of the batch with the other source's tokens masked out."""
  model = transformer.Transformer(tiny.model_config())
  params = transformer.init_params(model, jax.random.key(0))
  batch = tiny.packed_batch(3)
  batch["source_ids"] = np.repeat(np.arange(tiny.rows)[:, None] % 2, tiny.seq, 1).astype(np.int32)
  totals_fn = step_lib.make_totals_fn(model)

  @jax.jit
  def measure(batch):
    loss_fn = step_lib.make_loss_fn(model, z_loss=0.1, sources=("a", "b", "unused"))
    return loss_fn(params, batch, step_lib.LossContext(totals_fn(batch)))[1]

  found = measure(batch)
  for number, name in enumerate("ab"):
    only = batch | {"loss_mask": batch["loss_mask"] * (batch["source_ids"] == number)}
    wanted = measure(only)["loss"]
    np.testing.assert_allclose(found[f"source_loss/{name}"].sum, wanted.sum, rtol=1e-5)
    assert found[f"source_loss/{name}"].weight == wanted.weight > 0
  assert found["source_loss/unused"].weight == 0


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
