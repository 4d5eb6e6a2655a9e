"""Two stages of training on `_recall` documents, measured: `experiments.short_to_long`."""

import dataclasses
import functools
import time

import jax
import jax.numpy as jnp
import numpy as np

from experiments import _recall as recall
from experiments import _selection_probe as selection
from minicpm_jax import config
from minicpm_jax.core import types
from minicpm_jax.models import transformer, zoo
from minicpm_jax.optim import build, schedules
from minicpm_jax.train import step as step_lib

SPARSE = config.SparseAttentionConfig(
  kernel_size=4, kernel_stride=2, block_size=8, window_size=16, topk=6, dense_len=-1
)
VISIBLE = SPARSE.topk * SPARSE.block_size + SPARSE.window_size  # tokens a query sees, at most
SHORT_NEAR = 0.6  # share of near questions in the short stage


@dataclasses.dataclass(frozen=True, kw_only=True)
class Plan:
  """Sizes of the experiment; the visible budget of sparse attention is a quarter of `long`."""

  short: int = 64  # tokens a row
  long: int = 256
  bins: int = 1  # lengths of the long stage, long * (1, ..., bins) / bins, equal shares of tokens
  tokens: int = 4096  # a step
  short_steps: int = 400
  long_steps: int = 1600
  peak_lr: float = 0.01
  short_rest: float = 0.3  # weight of targets that are no answers, in the short stage
  rest: float = 0.3  # in the long stage
  near: float = 0.4  # share of near questions, in the long stage and in the evaluation
  every: int = 400  # steps between evaluations
  eval_rows: int = 1024  # of the last evaluation; a quarter of it on the way

  def __post_init__(self):
    if not 1 <= self.bins <= 8:
      raise ValueError(f"bins: found {self.bins}, expected 1..8")
    for name, size in (("short", self.short), ("long / bins", self.long // self.bins)):
      if size % SPARSE.block_size or not 8 * recall.NEEDLES <= size <= self.tokens:
        raise ValueError(
          f"{name}: found {size}, expected a multiple of {SPARSE.block_size} tokens from "
          f"{8 * recall.NEEDLES} to {self.tokens}"
        )
    if self.long % self.bins or not 2 * VISIBLE <= self.long <= self.tokens:
      raise ValueError(
        f"long: found {self.long}, expected a multiple of {self.bins} from twice the {VISIBLE} "
        f"visible tokens to {self.tokens}"
      )
    for name in ("short_steps", "long_steps", "every", "eval_rows"):
      if getattr(self, name) < 1:
        raise ValueError(f"{name}: found {getattr(self, name)}, expected 1 or more")
    for name in ("near", "rest", "short_rest"):
      if not 0 <= getattr(self, name) <= 1:
        raise ValueError(f"{name}: found {getattr(self, name)}, expected 0..1")

  def long_lengths(self) -> list[int]:
    """Length of the rows of every step of the long stage: the bins in turn, the longest first."""
    size = self.long // self.bins
    return [size * (self.bins - i % self.bins) for i in range(self.long_steps)]


def model_config(plan: Plan, sparse: config.SparseAttentionConfig | None) -> config.ModelConfig:
  """0.17M parameters: 2 layers, 8 heads, 4 key heads, so that 8 selections are made.

  A block is chosen by the mean of four keys, after RoPE. The base is 1e6 and the heads have 32
  dimensions: at distance 256, 18 of them have turned by less than a radian. With base 1e4 and 16
  dimensions 6 had, and the one key of the four that is a record did not stand out of the mean.
  """
  return zoo.nano(
    name="short_to_long",
    vocab_size=recall.VOCAB,
    vocab_multiple=1,
    model_dim=64,
    mlp_dim=128,
    num_layers=2,
    num_heads=8,
    num_kv_heads=4,
    head_dim=32,
    max_position=plan.long,
    dim_model_base=64,
    scan_layers=False,
    rope=config.RopeConfig(theta=1e6),
    sparse=sparse,
  )


def batch(
  rng: np.random.Generator, tokens: int, length: int, near: float, rest: float
) -> step_lib.Batch:
  """Rows for the train step; answers weigh 1, everything else `rest`."""
  rows = tokens // length
  tokens, kinds = recall.documents(rng, rows, length, near=near)
  mask = np.where(kinds[:, 1:] == recall.EASY, 1.0, rest).astype(np.float32)
  return step_lib.whole_rows(tokens, mask)


def needle_documents(
  rng: np.random.Generator, plan: Plan, rows: int, length: int
) -> tuple[np.ndarray, np.ndarray]:
  """Documents with needles outside of what every query at the end sees at any rate."""
  size = SPARSE.block_size
  behind = SPARSE.window_size + 2 * size + 2 * recall.NEEDLES  # local blocks, the questions
  edges = (SPARSE.init_blocks * size, min(behind, length // 2))
  return recall.documents(rng, rows, length, near=plan.near, edges=edges)


# --- Training and measuring ----------------------------------------------------------------------


@functools.cache
def _compiled_step(cfg: config.ModelConfig, optim: config.OptimConfig):
  model = transformer.Transformer(cfg)
  tx = build.make_optimizer(optim, cfg, transformer.abstract_params(model)[0])
  loss_fn = step_lib.make_loss_fn(model)
  step = step_lib.make_train_step(loss_fn, step_lib.make_totals_fn(model), tx)
  return tx, jax.jit(step, donate_argnums=0)


def train(
  cfg: config.ModelConfig,
  params: types.Params,
  plan: Plan,
  lengths: list[int],
  seed: int,
  log,
  *,
  near: float,
  rest: float,
) -> tuple[types.Params, list[float]]:
  """(parameters, loss of every step); lengths: of the rows of each step.

  `log(step, params)` every `plan.every` steps and at the end. Equal seeds give equal batches. WSD
  with 30% of linear decay, a new optimiser state.
  """
  steps = len(lengths)
  warmup, decay = min(20, steps // 5), int(0.3 * steps)
  schedule = config.ScheduleConfig(
    warmup_steps=warmup,
    stable_steps=steps - warmup - decay,
    decay_steps=decay,
    decay_shape="linear_to",
  )
  tx, step = _compiled_step(cfg, config.OptimConfig(peak_lr=plan.peak_lr, schedule=schedule))
  rates = schedules.schedule_arrays(schedule, plan.peak_lr)
  params = jax.tree.map(jnp.copy, params)
  state = step_lib.TrainState(jnp.int32(0), params, tx.init(params))
  rng, losses = np.random.default_rng(seed), []
  for i, length in enumerate(lengths):
    if i % plan.every == 0:
      log(i, state.params)
    state, metrics, _ = step(state, batch(rng, plan.tokens, length, near, rest), rates)
    losses.append(round(float(metrics["loss"].mean), 5))
  log(steps, state.params)
  return state.params, losses


@functools.cache
def _compiled_eval(cfg: config.ModelConfig):
  model = transformer.Transformer(cfg)

  @jax.jit
  def run(params, tokens, targets):
    logits = model.apply({"params": params}, tokens).logits
    nll = (
      jax.nn.logsumexp(logits, axis=-1)
      - jnp.take_along_axis(logits, targets[..., None], -1)[..., 0]
    )
    return jnp.argmax(logits, axis=-1) == targets, nll

  return run


def measure(
  cfg: config.ModelConfig, params: types.Params, plan: Plan, length: int, rows: int
) -> dict[str, float]:
  """Needle accuracy, accuracy of the other answers, nats a token; always the same documents."""
  rng, parts = np.random.default_rng(10**6), []
  size = min(rows, max(1, 2 * plan.tokens // length))
  for _ in range(-(-rows // size)):
    tokens, kinds = needle_documents(rng, plan, size, length)
    is_right, nll = jax.device_get(_compiled_eval(cfg)(params, tokens[:, :-1], tokens[:, 1:]))
    kinds = kinds[:, 1:]
    parts.append([is_right[kinds == recall.NEEDLE], is_right[kinds == recall.EASY], nll])
  needle, easy, nll = (np.concatenate([np.ravel(p[i]) for p in parts]) for i in range(3))
  return {"needle": float(needle.mean()), "easy": float(easy.mean()), "nll": float(nll.mean())}


def run_seed(plan: Plan, seed: int, say=print) -> dict:
  """Dense pretraining at `short`, then the same steps at `long` with full and sparse attention.

  Keys: "curves" and "losses" of the three stages, "final" (`measure` of every model read with
  both forms of attention), "selection" (`selection.probe` of every model read sparsely).
  """
  began = time.process_time()
  full, sparse = model_config(plan, None), model_config(plan, SPARSE)
  few = max(1, plan.eval_rows // 4)

  def logger(name: str, curves: list, forms: dict[str, config.ModelConfig], length: int):
    def log(step: int, params: types.Params) -> None:
      row = {"step": step}
      for form, cfg in forms.items():
        row |= {f"{form}_{k}": v for k, v in measure(cfg, params, plan, length, few).items()}
      curves.append(row)
      shown = ", ".join(f"{k} {v:.3f}" for k, v in row.items() if k.endswith(("needle", "nll")))
      say(f"seed {seed}, {name}, step {step}, {time.process_time() - began:.0f} CPU s: {shown}")

    return log

  result: dict = {"seed": seed, "curves": {"short": [], "full": [], "sparse": []}, "losses": {}}
  params = transformer.init_params(transformer.Transformer(full), jax.random.key(seed))
  log = logger("short", result["curves"]["short"], {"full": full}, plan.short)
  short, result["losses"]["short"] = train(
    full,
    params,
    plan,
    [plan.short] * plan.short_steps,
    2 * seed,
    log,
    near=SHORT_NEAR,
    rest=plan.short_rest,
  )
  trained, forms = {"short": short}, {"full": full, "sparse": sparse}
  for name, cfg in forms.items():
    log = logger(name, result["curves"][name], forms, plan.long)
    trained[name], result["losses"][name] = train(
      cfg, short, plan, plan.long_lengths(), 2 * seed + 1, log, near=plan.near, rest=plan.rest
    )
  result["final"] = {
    f"{name}_trained_{form}_attention": measure(cfg, trained[name], plan, plan.long, plan.eval_rows)
    for name in trained
    for form, cfg in forms.items()
  }
  rows = max(1, plan.eval_rows // 4)
  tokens, kinds = needle_documents(np.random.default_rng(10**6), plan, rows, plan.long)
  result["selection"] = {
    name: selection.probe(sparse, params, SPARSE, tokens, kinds) for name, params in trained.items()
  }
  result["cpu_s"] = round(time.process_time() - began, 1)
  return result
