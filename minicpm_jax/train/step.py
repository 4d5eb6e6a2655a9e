"""One training step: loss, gradient accumulation, update; and the evaluation step.

A method is a loss function `loss_fn(params, batch, ctx) -> (loss, metrics)` and a function
`totals_fn(batch) -> {name: total weight}`; `make_train_step` knows nothing else about it. The
totals are of the whole batch, so every micro-batch divides its sums by the same number and
accumulation equals the large batch, however uneven the masks are. (The balance loss of MoE is not
a sum over tokens; it is the mean over micro-batches.)
"""

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

import flax.struct
import jax
import jax.numpy as jnp
import optax
from jaxtyping import Float, Integer

from minicpm_jax import config
from minicpm_jax.core import mesh as mesh_lib
from minicpm_jax.core import metrics as metrics_lib
from minicpm_jax.core import rng, trees, types
from minicpm_jax.models import transformer
from minicpm_jax.nn import mtp
from minicpm_jax.optim import build, schedules
from minicpm_jax.quant import qat
from pallas_kernels.fused_ce import api as fused_ce

Batch = dict[str, jax.Array]
Metrics = dict[str, metrics_lib.Metric]


@flax.struct.dataclass
class TrainState:
  """What a step replaces. `step` counts finished updates and is the only step counter."""

  step: Any  # int32 scalar (or its shape and sharding, in an abstract state)
  params: types.Params
  opt_state: optax.OptState


@flax.struct.dataclass
class LossContext:
  """What a loss must know beyond its micro-batch."""

  totals: dict[str, jax.Array]  # weight of the whole batch, by loss name
  share: float = flax.struct.field(pytree_node=False, default=1.0)  # 1 / number of micro-batches


@dataclasses.dataclass(frozen=True)
class Weights:
  """How a step makes the weights of its forward passes from the trained ones; default: they are.

  prepare(params) is called once a step and gives `attach(params)`, the tree that the loss takes;
  metrics(old params, new params) are added to those of the step.
  """

  prepare: Callable[[types.Params], Callable[[types.Params], types.Params]] = lambda params: (
    lambda latents: latents
  )
  metrics: Callable[[types.Params, types.Params], Metrics] = lambda old, new: {}


def quantized_weights(cfg: config.ModelConfig) -> Weights:
  """Quantisation-aware training (or FP8, or neither) as `cfg.quant` says."""

  def metrics(old: types.Params, new: types.Params) -> Metrics:
    sums = qat.health(cfg.quant, old, new)
    return {name: metrics_lib.Metric(s, jnp.float32(n)) for name, (s, n) in sums.items()}

  dtype = types.dtype_of(cfg.dtype)
  return Weights(lambda params: qat.prepare(cfg.quant, params, dtype), metrics)


LossFn = Callable[[types.Params, Batch, LossContext], tuple[jax.Array, Metrics]]
TotalsFn = Callable[[Batch], dict[str, jax.Array]]


def whole_rows(
  ids_BA: Integer[types.AnyArray, "B A"], loss_mask_BT: Float[types.AnyArray, "B T"] | None = None
) -> Batch:
  """The batch of rows of T + 1 ids, one document each; without a mask every target counts."""
  tokens_BT = jnp.asarray(ids_BA[:, :-1], jnp.int32)
  return {
    "tokens": tokens_BT,
    "targets": jnp.asarray(ids_BA[:, 1:], jnp.int32),
    "positions": jnp.broadcast_to(jnp.arange(tokens_BT.shape[1])[None], tokens_BT.shape),
    "segment_ids": jnp.ones_like(tokens_BT),
    "loss_mask": jnp.ones(tokens_BT.shape) if loss_mask_BT is None else jnp.asarray(loss_mask_BT),
  }


# --- The pretraining objective -------------------------------------------------------------------


def _mtp_targets(batch: Batch) -> tuple[jax.Array, jax.Array]:
  return mtp.shift_targets(batch["targets"], batch["loss_mask"], batch["segment_ids"])


def make_totals_fn(model: transformer.Transformer) -> TotalsFn:
  def totals_fn(batch: Batch) -> dict[str, jax.Array]:
    totals = {"loss": jnp.sum(batch["loss_mask"])}
    if model.cfg.mtp is not None:
      totals["mtp_loss"] = jnp.sum(_mtp_targets(batch)[1])
    return {name: jnp.maximum(total, 1.0) for name, total in totals.items()}

  return totals_fn


def make_loss_fn(
  model: transformer.Transformer, *, z_loss: float = 0.0, sources: Sequence[str] = ()
) -> LossFn:
  """Token-weighted cross entropy (+ z-loss, MTP, MoE balance) of `model`.

  L = L_NTP + lambda L_MTP (MiniCPM4 section 2.3.2) + w_aux sum_layers L_balance, each term a mean
  over its own tokens; z_loss adds z_loss * mean(logsumexp(logits)^2) to L_NTP. `sources` (by their
  number in `batch["source_ids"]`) get a metric "source_loss/NAME" each: the mean L_NTP of their
  tokens.
  """
  cfg = model.cfg

  def loss_fn(params: types.Params, batch: Batch, ctx: LossContext) -> tuple[jax.Array, Metrics]:
    variables = {"params": params}
    inputs = (batch["tokens"], batch["positions"], batch["segment_ids"])
    out = model.apply(variables, *inputs, return_logits=False)
    mask_BT = batch["loss_mask"]
    targets_BT = batch["targets"]
    nll, z, correct, nll_T = _cross_entropy(cfg, params, out.hidden, targets_BT, mask_BT, z_loss)
    loss = nll / ctx.totals["loss"]
    tokens = jnp.sum(mask_BT)
    metrics = {
      "loss": metrics_lib.Metric(nll - z, tokens),
      "accuracy": metrics_lib.Metric(correct, tokens),
    }
    for number, name in enumerate(sources):
      weight_T = _flatten_tokens(mask_BT * (batch["source_ids"] == number))
      metric = metrics_lib.Metric(jnp.sum(nll_T * weight_T), jnp.sum(weight_T))
      metrics[f"source_loss/{name}"] = metric
    if z_loss:
      metrics["z_loss"] = metrics_lib.Metric(z, tokens)
    if cfg.mtp is not None:
      hidden_BTD = model.apply(variables, out.hidden, *inputs, method="mtp_hidden")
      targets_BT, mask_BT = _mtp_targets(batch)
      nll, *_ = _cross_entropy(cfg, params, hidden_BTD, targets_BT, mask_BT, 0.0)
      loss += cfg.mtp.loss_weight * nll / ctx.totals["mtp_loss"]
      metrics["mtp_loss"] = metrics_lib.Metric(nll, jnp.sum(mask_BT))
    if cfg.moe is not None:
      balance = out.aux["moe_balance_loss"]
      loss += cfg.moe.aux_loss_weight * balance * ctx.share
      metrics["moe_balance_loss"] = metrics_lib.Metric(balance, jnp.float32(1))
    return loss, metrics

  return loss_fn


def _cross_entropy(cfg, params, hidden_BTD, targets_BT, mask_BT, z_loss: float):
  weight_DV = transformer.head_weight(cfg, params).astype(hidden_BTD.dtype)
  return fused_ce.fused_cross_entropy(
    _flatten_tokens(hidden_BTD),
    weight_DV,
    _flatten_tokens(targets_BT),
    _flatten_tokens(mask_BT),
    divisor=cfg.logit_divisor,
    z_loss=z_loss,
    vocab_size=cfg.vocab_size,
    per_token=True,
  )


def _flatten_tokens(x_BT):
  """[B, T, ...] -> [B*T, ...] in an order that keeps a token axis sharded over cp in place."""
  parts = jax.sharding.get_abstract_mesh().shape.get("cp", 1)
  B, T, *rest = x_BT.shape
  if parts == 1 or T % parts:
    return x_BT.reshape(B * T, *rest)
  return jnp.moveaxis(x_BT.reshape(B, parts, T // parts, *rest), 1, 0).reshape(B * T, *rest)


# --- The step ------------------------------------------------------------------------------------

StepFn = Callable[
  [TrainState, Batch, schedules.ScheduleArrays],
  tuple[TrainState, Metrics, dict[str, jax.Array]],
]


def make_train_step(
  loss_fn: LossFn,
  totals_fn: TotalsFn,
  optimizer: optax.GradientTransformationExtraArgs,
  *,
  grad_accum: int = 1,
  weights: Weights | None = None,
) -> StepFn:
  """step(state, batch, schedule) -> (state, metrics, gradient norm of every leaf).

  Update number n = state.step + 1 uses learning_rate(n). The schedule is data: one compiled step
  serves every branch.
  """

  weights = weights or Weights()

  def gradients(params: types.Params, batch: Batch):
    totals = totals_fn(batch)
    ctx = LossContext(totals, 1.0 / grad_accum)
    attach = weights.prepare(params)

    def loss_of(params: types.Params, *args: Any):
      return loss_fn(attach(params), *args)

    value_and_grad = jax.value_and_grad(loss_of, has_aux=True)
    if grad_accum == 1:
      (loss, metrics), grads = value_and_grad(params, batch, ctx)
      return loss, metrics, grads

    def micro_step(carry, micro):
      (loss, metrics), grads = value_and_grad(params, micro, ctx)
      return jax.tree.map(jnp.add, carry, (loss, metrics, grads)), None

    micros = split_batch(batch, grad_accum)
    shapes = jax.eval_shape(value_and_grad, params, jax.tree.map(lambda x: x[0], micros), ctx)
    (loss, metrics), grads = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), shapes)
    carry, _ = jax.lax.scan(micro_step, (loss, metrics, grads), micros)
    return carry

  def train_step(state: TrainState, batch: Batch, schedule: schedules.ScheduleArrays):
    loss, metrics, grads = gradients(state.params, batch)
    leaf_norms = {path: _norm(leaf) for path, leaf in trees.flatten_paths(grads).items()}
    lr = schedules.learning_rate(state.step + 1, schedule)
    updates, opt_state = optimizer.update(grads, state.opt_state, state.params, lr=lr)
    params = optax.apply_updates(state.params, updates)
    metrics |= weights.metrics(state.params, params)
    for name, value in (
      ("total_loss", loss),
      ("grad_norm", jnp.sqrt(sum(jnp.square(n) for n in leaf_norms.values()))),
      ("learning_rate", lr),
      ("tokens", jnp.sum(batch["segment_ids"] != 0).astype(jnp.float32)),
    ):
      metrics[name] = metrics_lib.Metric(value, jnp.float32(1))
    return TrainState(state.step + 1, params, opt_state), metrics, leaf_norms

  return train_step


def _norm(x: jax.Array) -> jax.Array:
  return jnp.sqrt(jnp.sum(jnp.square(x.astype(jnp.float32))))


def split_batch(batch: Batch, parts: int) -> Batch:
  """[B, T] -> [parts, B/parts, T]; micro-batch i takes every parts-th row from i.

  Strided, so that rows sharded over devices stay where they are.
  """

  def split(x_BT: jax.Array) -> jax.Array:
    rows = x_BT.reshape(x_BT.shape[0] // parts, parts, *x_BT.shape[1:])
    return mesh_lib.constrain(jnp.swapaxes(rows, 0, 1), None, "act_batch", "act_seq")

  return jax.tree.map(split, batch)


def make_eval_step(model: transformer.Transformer) -> Callable[[types.Params, Batch], Metrics]:
  """eval(params, batch) -> sums of the next-token loss and accuracy, no auxiliary terms."""
  plain = model.clone(cfg=_without_mtp(model.cfg))
  loss_fn = make_loss_fn(plain)

  def eval_step(params: types.Params, batch: Batch) -> Metrics:
    _, metrics = loss_fn(params, batch, LossContext({"loss": jnp.float32(1)}))
    return {name: metrics[name] for name in ("loss", "accuracy")}

  return eval_step


def _without_mtp(cfg: config.ModelConfig) -> config.ModelConfig:
  return dataclasses.replace(cfg, mtp=None)


# --- Sharded state -------------------------------------------------------------------------------


def abstract_state(
  model: transformer.Transformer,
  optimizer: optax.GradientTransformation,
  mesh: jax.sharding.Mesh,
) -> TrainState:
  """Shapes, dtypes and shardings of the whole state: the target of init and of every restore."""
  shapes, specs = transformer.abstract_params(model)
  whole = mesh_lib.replicated(mesh)
  param_places = mesh_lib.tree_shardings(mesh, specs, shapes)
  opt_places = build.state_shardings(optimizer, shapes, param_places, whole)
  state = TrainState(
    jax.ShapeDtypeStruct((), jnp.int32), shapes, jax.eval_shape(optimizer.init, shapes)
  )
  places = TrainState(whole, param_places, opt_places)
  return jax.tree.map(
    lambda x, place: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=place), state, places
  )


def shardings_of(abstract: Any) -> Any:
  return jax.tree.map(lambda x: x.sharding, abstract)


def init_params(model: transformer.Transformer, abstract: TrainState, seed: int) -> types.Params:
  """Random parameters, each born on its devices."""
  init = jax.jit(
    lambda key: transformer.init_params(model, key), out_shardings=shardings_of(abstract.params)
  )
  return init(rng.key(seed, "init"))


def fresh_state(
  optimizer: optax.GradientTransformation, params: types.Params, abstract: TrainState
) -> TrainState:
  """Step 0 with zero moments around `params` (which already lie on the mesh)."""
  opt_state = jax.jit(optimizer.init, out_shardings=shardings_of(abstract.opt_state))(params)
  step = jax.device_put(jnp.int32(0), abstract.step.sharding)
  return TrainState(step, params, opt_state)


def jit_train_step(step_fn: StepFn, abstract: TrainState, mesh: jax.sharding.Mesh) -> StepFn:
  """Compiled with the state donated and every placement explicit."""
  places, whole = shardings_of(abstract), mesh_lib.replicated(mesh)
  return jax.jit(
    step_fn,
    donate_argnums=0,
    in_shardings=(places, mesh_lib.batch_sharding(mesh), whole),
    out_shardings=(places, whole, whole),
  )


def jit_eval_step(eval_fn: Any, abstract: TrainState, mesh: jax.sharding.Mesh) -> Any:
  places, whole = shardings_of(abstract.params), mesh_lib.replicated(mesh)
  return jax.jit(eval_fn, in_shardings=(places, mesh_lib.batch_sharding(mesh)), out_shardings=whole)
