"""Training objectives of drafts: EAGLE-1/2 and EAGLE-3 (inference.md section 17).

The frozen target runs inside the step, or did before (`align.draft_features`). Parameters are
{"draft": ..., "target": ...}; only the first is trained (`make_optimizer`). A row t of the draft
sees feature t and token t + 1 and is measured against the target's distribution after token t + 1:

  eagle, minicpm   w_f SmoothL1(g_t, f_{t+1}) + w_ce CE(p_{t+1}, q(g_t)), features with noise
  eagle3           sum_i decay^i CE(p_{t+1+i} on the draft's vocabulary, q_i); step i reads its
                   own output of step i - 1 and tokens shifted by one more (training-time test)

Both sides of a CE are divided by `loss_temperature` (1: as published).

A row whose tokens would cross the end of its document does not count. Rows of EAGLE-3 whose
target's best token is outside the draft's vocabulary give nothing either.
"""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jaxtyping import Array, Float, Int

from minicpm_jax import config
from minicpm_jax.align import draft_steps
from minicpm_jax.core import metrics as metrics_lib
from minicpm_jax.core import rng, trees, types
from minicpm_jax.models import draft as draft_lib
from minicpm_jax.models import transformer
from minicpm_jax.optim import build
from minicpm_jax.train import step as step_lib

Batch = dict[str, Any]  # of [B, T] arrays, as data.iterator makes them
FakeQuant = Callable[[types.Params], types.Params]
Ids = Int[np.ndarray, "R"] | None
NOISE_LENGTH = 512  # the noise is noise * NOISE_LENGTH / T wide (EAGLE's data loader)


# --- What the target gives -----------------------------------------------------------------------


@dataclasses.dataclass
class Observed:
  """The target's side of a batch, nothing of it differentiable."""

  features_BTF: Any  # what the draft reads
  hidden_BTD: Any  # output of the final norm: the target's distribution is its head on this
  best_BT: Any  # the target's own choice, full token id


def observe(
  target: transformer.Transformer,
  params: types.Params,
  batch: Batch,
  cfg: config.DraftConfig,
  chunk: int = 0,
) -> Observed:
  """One forward of the target over packed rows; or what the batch holds of an earlier one."""
  if "hidden" in batch:
    dtype = types.dtype_of(cfg.layer.dtype)
    hidden_BTD = batch["hidden"].astype(dtype)
    features_BTF = batch["features"].astype(dtype) if cfg.feature_layers else hidden_BTD
    return Observed(features_BTF, hidden_BTD, batch["best"])
  inputs = (batch["tokens"], batch["positions"], batch["segment_ids"])
  params = jax.lax.stop_gradient(params)
  variables = {"params": params}
  out = target.apply(variables, *inputs, tap_layers=cfg.feature_layers, return_logits=False)

  def choice(hidden_BCD):
    logits_BCV = target.apply(variables, hidden_BCD, method="unembed")
    return jnp.argmax(logits_BCV, axis=-1).astype(jnp.int32)

  best_BT = by_columns(choice, chunk, out.hidden)
  features_BTF = out.taps if cfg.feature_layers else out.hidden
  return Observed(*jax.lax.stop_gradient((features_BTF, out.hidden, best_BT)))


def by_columns(fn: Callable[..., Any], chunk: int, *arrays: Any) -> Any:
  """fn(*arrays) of [B, T, ...], `chunk` columns at a time (0: all), recomputed in the backward.

  So the logits of a large vocabulary exist for `chunk` columns only.
  """
  B, T = arrays[0].shape[:2]
  if not chunk or chunk >= T:
    return fn(*arrays)
  if T % chunk:
    raise ValueError(f"loss_chunk: found {chunk}, expected a divisor of {T} tokens a row")
  cut = [jnp.moveaxis(x.reshape(B, T // chunk, chunk, *x.shape[2:]), 1, 0) for x in arrays]
  out = jax.lax.map(jax.checkpoint(lambda parts: fn(*parts)), tuple(cut))
  return jax.tree.map(lambda x: jnp.moveaxis(x, 0, 1).reshape(B, T, *x.shape[3:]), out)


def target_logp(
  cfg: config.ModelConfig,
  params: types.Params,
  hidden_BTD: Any,
  ids_R: Ids,
  temperature: float = 1.0,
) -> Float[Array, "B T R"]:
  """The target's log-probabilities, renormalised over `ids_R` (None: the whole vocabulary)."""
  head_DR = target_head(cfg, params, ids_R)
  equation = "BTD,DR->BTR"
  x_BTR = jnp.einsum(equation, hidden_BTD, head_DR, preferred_element_type=jnp.float32)
  divisor = cfg.logit_divisor * temperature
  return jax.lax.stop_gradient(jax.nn.log_softmax(x_BTR / divisor, axis=-1))


def target_head(cfg: config.ModelConfig, params: types.Params, ids_R: Ids) -> Float[Array, "D R"]:
  """Columns `ids_R` of the target's head, not differentiable."""
  if transformer.low_bit_head(cfg, params) is not None:
    head_DV = transformer.head_weight(cfg, params)[:, : cfg.vocab_size]
    head_DR = head_DV if ids_R is None else head_DV[:, ids_R]
  elif cfg.tie_embeddings:
    table_VD = params["embed"]["embedding"]
    head_DR = (table_VD[: cfg.vocab_size] if ids_R is None else table_VD[ids_R]).T
  else:
    head_DV = params["lm_head"]["kernel"]
    head_DR = head_DV[:, : cfg.vocab_size] if ids_R is None else head_DV[:, ids_R]
  return jax.lax.stop_gradient(head_DR).astype(types.dtype_of(cfg.dtype))


def embed(target: transformer.Transformer, params: types.Params, tokens_BT: Array) -> Array:
  """The target's embeddings, scaled as in its forward."""
  variables = {"params": jax.lax.stop_gradient(params)}
  return target.apply(variables, tokens_BT, method="embed")


# --- Losses --------------------------------------------------------------------------------------


def smooth_l1(x: Array, y: Array) -> Array:
  """0.5 d^2 for |d| < 1, |d| - 0.5 beyond; elementwise."""
  d = jnp.abs(x - y)
  return jnp.where(d < 1, 0.5 * d * d, d - 0.5)


def feature_noise(row_seed_BT: Any, shape: tuple[int, ...], width: float, seed: int) -> Array:
  """(U(0, 1) - 0.5) * width * 512 / T, drawn from (seed, row_seed): the same after a resume."""

  def one(row_seed):
    return jax.random.uniform(rng.key(seed, "draft_noise", row_seed), shape[1:]) - 0.5

  return jax.vmap(one)(row_seed_BT[:, 0]) * (width * NOISE_LENGTH / shape[1])


def with_row_seeds(batch: dict[str, np.ndarray], step: int) -> dict[str, np.ndarray]:
  """The batch with what `feature_noise` draws from: a number of its own for each row."""
  B, T = batch["tokens"].shape
  seeds_B1 = (step * B + np.arange(B, dtype=np.int64))[:, None] % (2**31 - 1)
  return batch | {"row_seed": np.broadcast_to(seeds_B1, (B, T)).astype(np.int32)}


def make_totals_fn(cfg: config.DistillConfig) -> step_lib.TotalsFn:
  """Weights of the whole batch: one number, or one a step for eagle3."""
  num_steps = cfg.ttt_steps if cfg.draft.kind == "eagle3" else 1

  def totals_fn(batch: Batch) -> dict[str, jax.Array]:
    steps = [jnp.sum(draft_steps.step_weights(batch, i, num_steps)) for i in range(num_steps)]
    return {"loss": jnp.maximum(jnp.stack(steps), 1.0)}

  return totals_fn


def make_loss_fn(
  cfg: config.DistillConfig,
  target: transformer.Transformer,
  ids_R: Ids = None,
  fake_quant: FakeQuant | None = None,
) -> step_lib.LossFn:
  """`loss_fn(params, batch, ctx)` of the draft's kind, params = {"draft": ..., "target": ...}.

  The batch is that of pretraining, and with noise has `row_seed` (`with_row_seeds`). ids_R: token
  ids of the rows of an EAGLE-3 head, or that the cross entropy of the others is restricted to.
  Quantisation-aware training: `cfg.draft.layer.quant` (`models.draft.quantized`), or any
  `fake_quant` of the draft's parameters.
  """
  draft_lib.check_fits(cfg.draft, target.cfg)
  one = _eagle3_loss if cfg.draft.kind == "eagle3" else _eagle_loss

  def loss_fn(params: types.Params, batch: Batch, ctx: step_lib.LossContext):
    if fake_quant is not None:
      params = params | {"draft": fake_quant(params["draft"])}
    seen = observe(target, params["target"], batch, cfg.draft, cfg.loss_chunk)

    def embed_shifted(by: Any) -> Array:
      tokens_BT = draft_steps.shifted(batch["tokens"], by, cfg.ttt_steps + 1)
      return embed(target, params["target"], tokens_BT)

    return one(cfg, target, params, batch, ctx, seen, embed_shifted, ids_R)

  return loss_fn


def _draft_logits(
  cfg: config.DraftConfig, target: Any, params: Any, hidden_BTD: Any, ids_R: Ids = None
) -> Any:
  """Of EAGLE-3's own head; of the others with the target's, rows `ids_R` of it."""
  head_DR = None
  if cfg.kind != "eagle3":
    head_DR = target_head(target.cfg, params["target"], ids_R)
  variables = {"params": params["draft"]}
  return draft_lib.DraftModel(cfg).apply(variables, hidden_BTD, head_DR, method="logits")


def _full_ids(rows_BT: Any, ids_R: Ids) -> Any:
  return rows_BT if ids_R is None else jnp.asarray(ids_R, jnp.int32)[rows_BT]


def _divergence(cfg, target, params, ids_R, teacher_BTX, hidden_BTD):
  """(soft cross entropy, the draft's choice as full token id), both [B, T].

  teacher_BTX: the target's log-probabilities over ids_R, or with chunks its hidden states.
  """

  def one(teacher_BCX, hidden_BCD):
    logp_BCR = teacher_BCX
    if cfg.loss_chunk:
      logp_BCR = _target_logp(cfg, target, params, teacher_BCX, ids_R)
    logits_BCR = _draft_logits(cfg.draft, target, params, hidden_BCD, ids_R)
    logq_BCR = jax.nn.log_softmax(logits_BCR / cfg.loss_temperature, axis=-1)
    ce_BC = -jnp.sum(jnp.exp(logp_BCR) * logq_BCR, axis=-1)
    return ce_BC, _full_ids(jnp.argmax(logits_BCR, axis=-1).astype(jnp.int32), ids_R)

  return by_columns(one, cfg.loss_chunk, teacher_BTX, hidden_BTD)


def _teacher(cfg, target, params, seen, ids_R):
  if cfg.loss_chunk:
    return seen.hidden_BTD
  return _target_logp(cfg, target, params, seen.hidden_BTD, ids_R)


def _target_logp(cfg, target, params, hidden_BTD, ids_R):
  return target_logp(target.cfg, params["target"], hidden_BTD, ids_R, cfg.loss_temperature)


def _eagle_loss(cfg, target, params, batch, ctx, seen, embed_shifted, ids_R):
  f_BTD = seen.features_BTF
  noisy_BTD = f_BTD
  if cfg.noise:
    if "row_seed" not in batch:
      raise ValueError("batch: found no row_seed, expected one with noise > 0 (with_row_seeds)")
    noisy_BTD += feature_noise(batch["row_seed"], f_BTD.shape, cfg.noise, cfg.seed)
  weights_BT = draft_steps.step_weights(batch, 0, 1)
  _, hidden_1BTD = draft_steps.run_steps(
    cfg.draft, params["draft"], embed_shifted, noisy_BTD, batch, 1, lambda i, x, carry: (carry, x)
  )
  error_BT = jnp.mean(smooth_l1(hidden_1BTD[0], draft_steps.shifted(f_BTD, 1, 1)), axis=-1)
  teacher = draft_steps.shifted(_teacher(cfg, target, params, seen, ids_R), 1, 1)
  ce_BT, tokens_BT = _divergence(cfg, target, params, ids_R, teacher, hidden_1BTD[0])
  hit_BT = tokens_BT == draft_steps.shifted(seen.best_BT, 1, 1)
  error, ce, hits = (jnp.sum(weights_BT * x) for x in (error_BT, ce_BT, hit_BT))
  total, weight = cfg.feature_loss_weight * error + cfg.ce_weight * ce, jnp.sum(weights_BT)
  sums = {"loss": total, "feature_loss": error, "ce": ce, "acc_1": hits}
  metrics = {name: metrics_lib.Metric(x, weight) for name, x in sums.items()}
  return total / ctx.totals["loss"][0], metrics


def _eagle3_loss(cfg, target, params, batch, ctx, seen, embed_shifted, ids_R):
  num_steps = cfg.ttt_steps
  teacher_BTX = _teacher(cfg, target, params, seen, ids_R)
  is_known_BT = jnp.ones(seen.best_BT.shape, jnp.float32)
  if ids_R is not None:
    is_in_V = np.zeros(cfg.draft.layer.vocab_size, np.float32)
    is_in_V[ids_R] = 1
    is_known_BT = jnp.asarray(is_in_V)[seen.best_BT]

  def use(i, hidden_BTD, carry):
    teacher = draft_steps.shifted(teacher_BTX, i + 1, num_steps)
    ce_BT, tokens_BT = _divergence(cfg, target, params, ids_R, teacher, hidden_BTD)
    is_hit_BT = tokens_BT == draft_steps.shifted(seen.best_BT, i + 1, num_steps)
    weights_BT = draft_steps.step_weights(batch, i, num_steps)
    known_BT = weights_BT * draft_steps.shifted(is_known_BT, i + 1, num_steps)
    sums = (jnp.sum(known_BT * ce_BT), jnp.sum(weights_BT * is_hit_BT), jnp.sum(weights_BT))
    return carry, sums

  _, (ce_I, hits_I, weight_I) = draft_steps.run_steps(
    cfg.draft, params["draft"], embed_shifted, seen.features_BTF, batch, num_steps, use
  )
  decay_I = jnp.asarray(cfg.ttt_decay ** np.arange(num_steps), jnp.float32)
  metrics = {
    "loss": metrics_lib.Metric(jnp.sum(decay_I * ce_I), weight_I[0]),
    "ce": metrics_lib.Metric(ce_I[0], weight_I[0]),
  }
  for i in range(num_steps):
    metrics[f"acc_{i + 1}"] = metrics_lib.Metric(hits_I[i], weight_I[i])
  return jnp.sum(decay_I * ce_I / ctx.totals["loss"]), metrics


# --- Acceptance and optimiser --------------------------------------------------------------------


def make_acceptance_fn(
  cfg: config.DistillConfig,
  target: transformer.Transformer,
  ids_R: Ids = None,
) -> Callable[[types.Params, Batch], step_lib.Metrics]:
  """(params, batch) -> acc_1 .. acc_depth of the draft running free on held-out text.

  acc_k: of the rows whose first k - 1 drafts were the target's choices (and the text's tokens, so
  that the text goes on as drafted), the share whose k-th draft is the target's choice too.
  ids_R: of the rows of an EAGLE-3 head; the others choose from the whole vocabulary.
  """
  depth = cfg.eval_depth
  ids_R = ids_R if cfg.draft.kind == "eagle3" else None

  def acceptance(params: types.Params, batch: Batch) -> step_lib.Metrics:
    seen = observe(target, params["target"], batch, cfg.draft, cfg.loss_chunk)

    def choice(hidden_BCD):
      logits_BCR = _draft_logits(cfg.draft, target, params, hidden_BCD)
      return _full_ids(jnp.argmax(logits_BCR, axis=-1).astype(jnp.int32), ids_R)

    def embed_shifted(by: Any) -> Array:
      return embed(target, params["target"], draft_steps.shifted(batch["tokens"], by, depth + 1))

    def use(i, hidden_BTD, alive_BT):
      tokens_BT = by_columns(choice, cfg.loss_chunk, hidden_BTD)
      weights_BT = alive_BT * draft_steps.step_weights(batch, i, depth)
      is_hit_BT = tokens_BT == draft_steps.shifted(seen.best_BT, i + 1, depth)
      is_text_BT = tokens_BT == draft_steps.shifted(batch["tokens"], i + 2, depth + 1)
      sums = (jnp.sum(weights_BT * is_hit_BT), jnp.sum(weights_BT))
      return weights_BT * is_hit_BT * is_text_BT, sums

    ones_BT = jnp.ones(batch["tokens"].shape, jnp.float32)
    _, (hits_I, weight_I) = draft_steps.run_steps(
      cfg.draft, params["draft"], embed_shifted, seen.features_BTF, batch, depth, use, ones_BT
    )
    return {f"acc_{i + 1}": metrics_lib.Metric(hits_I[i], weight_I[i]) for i in range(depth)}

  return acceptance


def make_optimizer(
  cfg: config.DistillConfig, params: types.Params
) -> optax.GradientTransformationExtraArgs:
  """AdamW of `cfg.optim` on params["draft"], behind the elementwise clip; the target is frozen."""
  tx = build.make_optimizer(cfg.optim, cfg.draft.layer, params["draft"])
  if cfg.grad_clip_value:
    tx = optax.chain(optax.clip(cfg.grad_clip_value), tx)
  labels = trees.map_with_path(
    lambda path, _: "draft" if path.startswith("draft/") else "frozen", params
  )
  return optax.partition({"draft": tx, "frozen": optax.set_to_zero()}, labels)
