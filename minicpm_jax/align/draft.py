"""Training objectives of drafts: EAGLE-1/2 and EAGLE-3 (inference.md section 17).

The frozen target runs inside the step. Parameters are {"draft": ..., "target": ...}; only the first
is trained (`make_optimizer`). A row t of the draft sees feature t and token t + 1 and is measured
against the target's distribution after token t + 1:

  eagle, minicpm   w_f SmoothL1(g_t, f_{t+1}) + w_ce CE(p_{t+1}, q(g_t)), features with noise
  eagle3           sum_i decay^i CE(p_{t+1+i} on the draft's vocabulary, q_i); step i reads its
                   own output of step i - 1 and tokens shifted by one more (training-time test)

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
from jaxtyping import Array, Bool, Float, Int

from minicpm_jax import config
from minicpm_jax.core import metrics as metrics_lib
from minicpm_jax.core import rng, trees, types
from minicpm_jax.models import draft as draft_lib
from minicpm_jax.models import transformer
from minicpm_jax.optim import build
from minicpm_jax.train import step as step_lib

Batch = dict[str, Any]  # of [B, T] arrays, as data.iterator makes them
FakeQuant = Callable[[types.Params], types.Params]
NOISE_LENGTH = 512  # the noise is noise * NOISE_LENGTH / T wide (EAGLE's data loader)


# --- What the target gives -----------------------------------------------------------------------


@dataclasses.dataclass
class Observed:
  """The target's side of a batch; `logp_BTR` is normalised over the draft's vocabulary."""

  features_BTF: Any  # what the draft reads
  logp_BTR: Any  # float32
  best_BT: Any  # the target's own choice, full token id
  is_known_BT: Any  # bool: that choice is in the draft's vocabulary


def observe(
  target: transformer.Transformer,
  params: types.Params,
  batch: Batch,
  cfg: config.DraftConfig,
  ids_R: Int[np.ndarray, "R"] | None,
) -> Observed:
  """One forward of the target over packed rows, nothing of it differentiable."""
  inputs = (batch["tokens"], batch["positions"], batch["segment_ids"])
  params = jax.lax.stop_gradient(params)
  out = target.apply({"params": params}, *inputs, tap_layers=cfg.feature_layers)
  logits_BTV = out.logits
  best_BT = jnp.argmax(logits_BTV, axis=-1).astype(jnp.int32)
  is_known_BT = jnp.ones(best_BT.shape, bool)
  if ids_R is not None:
    is_in_V = np.zeros(cfg.layer.vocab_size, bool)
    is_in_V[ids_R] = True
    is_known_BT = jnp.asarray(is_in_V)[best_BT]
    logits_BTV = logits_BTV[..., ids_R]
  features = out.taps if cfg.feature_layers else out.hidden
  logp_BTR = jax.nn.log_softmax(logits_BTV, axis=-1)
  return Observed(*jax.lax.stop_gradient((features, logp_BTR, best_BT, is_known_BT)))


def embed(target: transformer.Transformer, params: types.Params, tokens_BT: Array) -> Array:
  """The target's embeddings, scaled as in its forward."""
  variables = {"params": jax.lax.stop_gradient(params)}
  return target.apply(variables, tokens_BT, method="embed")


# --- Rows and steps ------------------------------------------------------------------------------


def shifted(x_BT: Any, by: Any, num_extra: int) -> Array:
  """Column t becomes column t + by; `by` may be traced, at most num_extra; zeros come in."""
  T = x_BT.shape[1]
  padded = jnp.pad(jnp.asarray(x_BT), [(0, 0), (0, num_extra)] + [(0, 0)] * (x_BT.ndim - 2))
  return jax.lax.dynamic_slice_in_dim(padded, by, T, axis=1)


def step_weights(batch: Batch, step: Any, num_steps: int) -> Float[Array, "B T"]:
  """Weight of row t at step i: the loss mask of position t + 1 + i, inside t's document."""
  by = step + 1
  weights_BT = shifted(batch["loss_mask"], by, num_steps)
  is_same_BT = shifted(batch["segment_ids"], by, num_steps) == batch["segment_ids"]
  return weights_BT * is_same_BT.astype(weights_BT.dtype)


def own_mask(batch: Batch, cfg: config.DraftConfig) -> Bool[Array, "B T T"]:
  """Rows of one document, causal, inside the window."""
  segments_BT, positions_BT = jnp.asarray(batch["segment_ids"]), jnp.asarray(batch["positions"])
  is_same_BTT = segments_BT[:, :, None] == segments_BT[:, None, :]
  mask_BTT = draft_lib.seen(positions_BT, positions_BT, cfg.window_size)
  return mask_BTT & is_same_BTT & (segments_BT != 0)[:, :, None]


def run_steps(
  cfg: config.DraftConfig,
  draft_params: types.Params,
  embed_shifted: Callable[[Any], Array],
  feature_BTF: Float[Array, "B T F"],
  batch: Batch,
  num_steps: int,
  use: Callable[[Any, Array, Any], Any],
  carry: Any = None,
) -> tuple[Any, Any]:
  """Training-time test: `num_steps` steps on the draft's own outputs as a scan.

  Step 0 is the plain causal pass. At step i row t reads the embedding of token t + 1 + i and its
  output of step i - 1, at rotary position t + i; it attends to the keys of step 0 up to row t and
  to its own row's keys of steps 1..i, which is what it sees when it drafts after row t.

  embed_shifted(by): embeddings of the tokens `by` columns ahead. use(i, hidden_BTD, carry) ->
  (carry, outputs); returns the last carry and the outputs stacked by step.
  """
  model, variables = draft_lib.DraftModel(cfg), {"params": draft_params}
  positions_BT, causal_BTT = jnp.asarray(batch["positions"]), own_mask(batch, cfg)
  hidden_BTD = model.apply(variables, feature_BTF, method="fuse")
  tables = draft_lib.position_tables(cfg, positions_BT)
  hidden_BTD, first = model.apply(variables, embed_shifted(1), hidden_BTD, tables, (), causal_BTT)
  carry, out = use(0, hidden_BTD, carry)
  if num_steps == 1:
    return carry, jax.tree.map(lambda x: x[None], out)
  J = num_steps - 1
  buffers = jax.tree.map(lambda x: jnp.zeros((J, *x.shape), x.dtype), first)
  before_BTT = own_mask(batch, dataclasses.replace(cfg, window_size=0))

  @jax.checkpoint
  def one(scanned, i):
    hidden_BTD, buffers, carry = scanned
    mask_BTT = before_BTT
    if cfg.window_size:
      mask_BTT &= draft_lib.seen(positions_BT + i, positions_BT, cfg.window_size)
    hidden_BTD, new = model.apply(
      variables,
      embed_shifted(i + 1),
      hidden_BTD,
      draft_lib.position_tables(cfg, positions_BT + i),
      ((first, mask_BTT),),
      None,
      draft_lib.Diagonals(buffers, jnp.arange(J) < i - 1),
    )
    buffers = jax.tree.map(
      lambda b, x: jax.lax.dynamic_update_index_in_dim(b, x, i - 1, 0), buffers, new
    )
    carry, out = use(i, hidden_BTD, carry)
    return (hidden_BTD, buffers, carry), out

  (_, _, carry), later = jax.lax.scan(one, (hidden_BTD, buffers, carry), jnp.arange(1, num_steps))
  joined = jax.tree.map(lambda x, y: jnp.concatenate((x[None], y)), out, later)
  return carry, joined


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
    steps = [jnp.sum(step_weights(batch, i, num_steps)) for i in range(num_steps)]
    return {"loss": jnp.maximum(jnp.stack(steps), 1.0)}

  return totals_fn


def make_loss_fn(
  cfg: config.DistillConfig,
  target: transformer.Transformer,
  ids_R: Int[np.ndarray, "R"] | None = None,
  fake_quant: FakeQuant | None = None,
) -> step_lib.LossFn:
  """`loss_fn(params, batch, ctx)` of the draft's kind, params = {"draft": ..., "target": ...}.

  The batch is that of pretraining, and with noise has `row_seed` (`with_row_seeds`). ids_R: token
  ids of the rows of an EAGLE-3 head. Quantisation-aware training: `cfg.draft.layer.quant`
  (`models.draft.quantized`), or any `fake_quant` of the draft's parameters.
  """
  draft_lib.check_fits(cfg.draft, target.cfg)
  one = _eagle3_loss if cfg.draft.kind == "eagle3" else _eagle_loss

  def loss_fn(params: types.Params, batch: Batch, ctx: step_lib.LossContext):
    if fake_quant is not None:
      params = params | {"draft": fake_quant(params["draft"])}
    seen = observe(target, params["target"], batch, cfg.draft, ids_R)

    def embed_shifted(by: Any) -> Array:
      tokens_BT = shifted(batch["tokens"], by, cfg.ttt_steps + 1)
      return embed(target, params["target"], tokens_BT)

    return one(cfg, target, params, batch, ctx, seen, embed_shifted, ids_R)

  return loss_fn


def _draft_logits(cfg: config.DraftConfig, target: Any, params: Any, hidden_BTD: Any) -> Any:
  head_DV = None
  if cfg.kind != "eagle3":
    head_DV = transformer.head_weight(target.cfg, jax.lax.stop_gradient(params["target"]))
    head_DV = head_DV[:, : target.cfg.vocab_size]
  variables = {"params": params["draft"]}
  return draft_lib.DraftModel(cfg).apply(variables, hidden_BTD, head_DV, method="logits")


def _eagle_loss(cfg, target, params, batch, ctx, seen, embed_shifted, ids_R):
  del ids_R  # the head is the target's
  f_BTD = seen.features_BTF
  noisy_BTD = f_BTD
  if cfg.noise:
    if "row_seed" not in batch:
      raise ValueError("batch: found no row_seed, expected one with noise > 0 (with_row_seeds)")
    noisy_BTD += feature_noise(batch["row_seed"], f_BTD.shape, cfg.noise, cfg.seed)
  weights_BT = step_weights(batch, 0, 1)

  def use(i, hidden_BTD, carry):
    return carry, (hidden_BTD, _draft_logits(cfg.draft, target, params, hidden_BTD))

  _, (hidden_1BTD, logits_1BTV) = run_steps(
    cfg.draft, params["draft"], embed_shifted, noisy_BTD, batch, 1, use
  )
  error_BT = jnp.mean(smooth_l1(hidden_1BTD[0], shifted(f_BTD, 1, 1)), axis=-1)
  logp_BTV = shifted(seen.logp_BTR, 1, 1)
  logq_BTV = jax.nn.log_softmax(logits_1BTV[0], axis=-1)
  ce_BT = -jnp.sum(jnp.exp(logp_BTV) * logq_BTV, axis=-1)
  hit_BT = jnp.argmax(logq_BTV, axis=-1) == shifted(seen.best_BT, 1, 1)
  error, ce, hits = (jnp.sum(weights_BT * x) for x in (error_BT, ce_BT, hit_BT))
  total, weight = cfg.feature_loss_weight * error + cfg.ce_weight * ce, jnp.sum(weights_BT)
  sums = {"loss": total, "feature_loss": error, "ce": ce, "acc_1": hits}
  metrics = {name: metrics_lib.Metric(x, weight) for name, x in sums.items()}
  return total / ctx.totals["loss"][0], metrics


def _eagle3_loss(cfg, target, params, batch, ctx, seen, embed_shifted, ids_R):
  num_steps = cfg.ttt_steps

  def use(i, hidden_BTD, carry):
    logits_BTR = _draft_logits(cfg.draft, target, params, hidden_BTD)
    logq_BTR = jax.nn.log_softmax(logits_BTR, axis=-1)
    logp_BTR = shifted(seen.logp_BTR, i + 1, num_steps)
    ce_BT = -jnp.sum(jnp.exp(logp_BTR) * logq_BTR, axis=-1)
    rows_BT = jnp.argmax(logits_BTR, axis=-1)
    tokens_BT = rows_BT if ids_R is None else jnp.asarray(ids_R)[rows_BT]
    is_hit_BT = tokens_BT == shifted(seen.best_BT, i + 1, num_steps)
    weights_BT = step_weights(batch, i, num_steps)
    known_BT = weights_BT * shifted(seen.is_known_BT.astype(jnp.float32), i + 1, num_steps)
    sums = (jnp.sum(known_BT * ce_BT), jnp.sum(weights_BT * is_hit_BT), jnp.sum(weights_BT))
    return carry, sums

  _, (ce_I, hits_I, weight_I) = run_steps(
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
  ids_R: Int[np.ndarray, "R"] | None = None,
) -> Callable[[types.Params, Batch], step_lib.Metrics]:
  """(params, batch) -> acc_1 .. acc_depth of the draft running free on held-out text.

  acc_k: of the rows whose first k - 1 drafts were the target's choices (and the text's tokens, so
  that the text goes on as drafted), the share whose k-th draft is the target's choice too.
  """
  depth = cfg.eval_depth

  def acceptance(params: types.Params, batch: Batch) -> step_lib.Metrics:
    seen = observe(target, params["target"], batch, cfg.draft, ids_R)

    def embed_shifted(by: Any) -> Array:
      return embed(target, params["target"], shifted(batch["tokens"], by, depth + 1))

    def use(i, hidden_BTD, alive_BT):
      logits_BTR = _draft_logits(cfg.draft, target, params, hidden_BTD)
      rows_BT = jnp.argmax(logits_BTR, axis=-1)
      tokens_BT = rows_BT if ids_R is None else jnp.asarray(ids_R)[rows_BT]
      weights_BT = alive_BT * step_weights(batch, i, depth)
      is_hit_BT = tokens_BT == shifted(seen.best_BT, i + 1, depth)
      is_text_BT = tokens_BT == shifted(batch["tokens"], i + 2, depth + 1)
      sums = (jnp.sum(weights_BT * is_hit_BT), jnp.sum(weights_BT))
      return weights_BT * is_hit_BT * is_text_BT, sums

    ones_BT = jnp.ones(batch["tokens"].shape, jnp.float32)
    _, (hits_I, weight_I) = run_steps(
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
