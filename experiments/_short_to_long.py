"""The toy of `experiments.short_to_long`: a recall task, two stages of training, measurements.

A document is made of pairs of tokens: a record (one token that stands for a key and its value,
beside a filler), a question (a key, whose value in this document is the answer), or fillers, which
follow a chain. Every document has its own values. Most questions ask for one of the last records,
as most of a text depends on what is near; the rest ask for any. Needles are records whose keys are
asked for once, by the last tokens of the document.
"""

import dataclasses
import functools
import pathlib
import time

import jax
import jax.numpy as jnp
import numpy as np

from minicpm_jax import config
from minicpm_jax.core import extras, types
from minicpm_jax.models import transformer, zoo
from minicpm_jax.optim import build, schedules
from minicpm_jax.train import step as step_lib

KEYS, VALUES, FILLERS = 32, 8, 32
RECORD, ASK = 0, KEYS * VALUES  # first ids of records, keys, values, fillers
ANSWER, FILLER = ASK + KEYS, ASK + KEYS + VALUES
VOCAB = FILLER + FILLERS
NEEDLES = 4  # a document of the evaluation
RECORDS, QUESTIONS = 0.16, 0.24  # shares of the pairs
NEAR = 5  # last records that a near question asks for
PLAIN, EASY, NEEDLE = 0, 1, 2  # kinds of targets

SPARSE = config.SparseAttentionConfig(
  kernel_size=4, kernel_stride=2, block_size=8, window_size=16, topk=6, dense_len=-1
)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Plan:
  """Sizes of the experiment; the visible budget of sparse attention is a quarter of `long`."""

  short: int = 64  # tokens a row
  long: int = 256
  tokens: int = 4096  # a step
  short_steps: int = 400
  long_steps: int = 300
  peak_lr: float = 0.01
  rest: float = 0.3  # weight of targets that are no answers
  every: int = 50  # steps between evaluations
  eval_rows: int = 256  # of the last evaluation; a quarter of it on the way

  def __post_init__(self):
    visible = (SPARSE.topk + SPARSE.window_size // SPARSE.block_size) * SPARSE.block_size
    for name in ("short", "long"):
      size = getattr(self, name)
      if size % 2 or not 8 * NEEDLES <= size <= self.tokens:
        raise ValueError(f"{name}: found {size}, expected an even length up to {self.tokens}")
    if self.long < 2 * visible:
      raise ValueError(f"long: found {self.long}, expected twice {visible} visible tokens or more")
    for name in ("short_steps", "long_steps", "every", "eval_rows"):
      if getattr(self, name) < 1:
        raise ValueError(f"{name}: found {getattr(self, name)}, expected 1 or more")


def model_config(plan: Plan, sparse: config.SparseAttentionConfig | None) -> config.ModelConfig:
  """0.10M parameters: 2 layers, 4 heads, 2 key heads."""
  return zoo.nano(
    name="short_to_long",
    vocab_size=VOCAB,
    vocab_multiple=1,
    model_dim=64,
    mlp_dim=128,
    num_layers=2,
    num_heads=4,
    num_kv_heads=2,
    head_dim=16,
    max_position=plan.long,
    dim_model_base=64,
    sparse=sparse,
  )


# --- Documents -----------------------------------------------------------------------------------


def documents(
  rng: np.random.Generator, rows: int, length: int, with_needles: bool = False
) -> tuple[np.ndarray, np.ndarray]:
  """(tokens [rows, length + 1], kind of every token); the last token is only a target."""
  pairs = length // 2 + 1
  kind = rng.random((rows, pairs))
  keys = rng.permuted(np.tile(np.arange(KEYS), (rows, 1)), axis=1)
  values = rng.integers(VALUES, size=(rows, KEYS))
  is_record, is_question = kind < RECORDS, (kind >= RECORDS) & (kind < RECORDS + QUESTIONS)
  if with_needles:  # not in the first block and not among the last 64 tokens, each in its own place
    size = SPARSE.block_size
    places = np.arange(size // 2, pairs - max(2 * NEEDLES, min(32, pairs // 4)))
    needles = np.stack([rng.choice(places, NEEDLES, replace=False) for _ in range(rows)])
    is_record[np.arange(rows)[:, None], needles] = False
    is_question[np.arange(rows)[:, None], needles] = False
    is_record[:, -NEEDLES:] = is_question[:, -NEEDLES:] = False
  is_record[:, 0] = False  # its first token is cut off below
  rank = np.cumsum(is_record, axis=1)  # records so far, this one included
  is_record &= rank <= KEYS - NEEDLES
  count = np.cumsum(is_record, axis=1)
  near = rng.random((rows, pairs)) < 0.6
  reach = np.where(near, np.minimum(count, NEAR), count)
  asked = count - 1 - (rng.random((rows, pairs)) * reach).astype(int)
  is_question &= count > 0
  number = np.where(is_record, rank - 1, np.maximum(asked, 0))
  key = np.take_along_axis(keys, np.minimum(number, KEYS - 1), axis=1)
  tokens = FILLER + _chain(rng, rows, 2 * pairs)
  kinds = np.full(tokens.shape, PLAIN)
  pair = tokens.reshape(rows, pairs, 2)
  value = np.take_along_axis(values, key, axis=1)
  side = rng.integers(2, size=(rows, pairs, 1)) == np.arange(2)
  pair[:] = np.where(is_record[..., None] & side, (RECORD + key * VALUES + value)[..., None], pair)
  asking = np.stack((ASK + key, ANSWER + value), axis=-1)
  pair[:] = np.where(is_question[..., None], asking, pair)
  kinds.reshape(rows, pairs, 2)[..., 1][is_question] = EASY
  if with_needles:
    row = np.arange(rows)[:, None]
    last = keys[:, -NEEDLES:]
    value = np.take_along_axis(values, last, axis=1)
    pair[row, needles, 0] = RECORD + last * VALUES + value
    order = rng.permuted(np.tile(np.arange(NEEDLES), (rows, 1)), axis=1)
    end = pairs - NEEDLES + np.arange(NEEDLES)[None]
    pair[row, end, 0] = ASK + np.take_along_axis(last, order, axis=1)
    pair[row, end, 1] = ANSWER + np.take_along_axis(value, order, axis=1)
    kinds.reshape(rows, pairs, 2)[row, end, 1] = NEEDLE
  return tokens[:, -length - 1 :].astype(np.int32), kinds[:, -length - 1 :]


def _chain(rng: np.random.Generator, rows: int, length: int) -> np.ndarray:
  """Fillers: each has four successors."""
  successors = np.random.default_rng(7).integers(FILLERS, size=(FILLERS, 4))
  choices = rng.integers(4, size=(length, rows))
  chain = np.empty((length, rows), int)
  chain[0] = rng.integers(FILLERS, size=rows)
  for t in range(1, length):
    chain[t] = successors[chain[t - 1], choices[t]]
  return chain.T


def batch(rng: np.random.Generator, plan: Plan, length: int) -> dict[str, np.ndarray]:
  """Rows for the train step; answers weigh 1, everything else `plan.rest`."""
  rows = plan.tokens // length
  tokens, kinds = documents(rng, rows, length)
  return {
    "tokens": tokens[:, :-1],
    "targets": tokens[:, 1:],
    "loss_mask": np.where(kinds[:, 1:] == EASY, 1.0, plan.rest).astype(np.float32),
    "segment_ids": np.ones((rows, length), np.int32),
    "positions": np.tile(np.arange(length, dtype=np.int32), (rows, 1)),
  }


# --- Training and measuring ----------------------------------------------------------------------


@functools.cache
def _compiled_step(cfg: config.ModelConfig, optim: config.OptimConfig):
  model = transformer.Transformer(cfg)
  tx = build.make_optimizer(optim, cfg, transformer.abstract_params(model)[0])
  loss_fn = step_lib.make_loss_fn(model)
  step = step_lib.make_train_step(loss_fn, step_lib.make_totals_fn(model), tx)
  return tx, jax.jit(step, donate_argnums=0)


def train(
  cfg: config.ModelConfig, params: types.Params, plan: Plan, length: int, steps: int, seed: int, log
) -> tuple[types.Params, list[float]]:
  """(parameters, loss of every step); `log(step, params)` every `plan.every` steps and at the end.

  Equal seeds give equal batches. WSD with 30% of linear decay, a new optimiser state.
  """
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
  for i in range(steps):
    if i % plan.every == 0:
      log(i, state.params)
    state, metrics, _ = step(state, batch(rng, plan, length), rates)
    losses.append(float(metrics["loss"].mean))
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
    tokens, kinds = documents(rng, size, length, with_needles=True)
    is_right, nll = jax.device_get(_compiled_eval(cfg)(params, tokens[:, :-1], tokens[:, 1:]))
    kinds = kinds[:, 1:]
    parts.append([is_right[kinds == NEEDLE], is_right[kinds == EASY], nll])
  needle, easy, nll = (np.concatenate([np.ravel(p[i]) for p in parts]) for i in range(3))
  return {"needle": float(needle.mean()), "easy": float(easy.mean()), "nll": float(nll.mean())}


def run_seed(plan: Plan, seed: int, say=print) -> dict:
  """Dense pretraining at `short`, then the same steps at `long` with full and sparse attention."""
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
  short, losses = train(full, params, plan, plan.short, plan.short_steps, 2 * seed, log)
  result["losses"]["short"] = losses
  trained, forms = {"short": short}, {"full": full, "sparse": sparse}
  for name, cfg in forms.items():
    log = logger(name, result["curves"][name], forms, plan.long)
    trained[name], result["losses"][name] = train(
      cfg, short, plan, plan.long, plan.long_steps, 2 * seed + 1, log
    )
  result["final"] = {
    f"{name}_trained_{form}_attention": measure(cfg, trained[name], plan, plan.long, plan.eval_rows)
    for name in trained
    for form, cfg in forms.items()
  }
  result["cpu_s"] = round(time.process_time() - began, 1)
  return result


# --- Report --------------------------------------------------------------------------------------

ARMS = {  # name in the picture -> key of `final`
  "full attention": "full_trained_full_attention",
  "training-free selection": "full_trained_sparse_attention",
  "sparse, trained": "sparse_trained_sparse_attention",
  "sparse, read with full attention": "sparse_trained_full_attention",
}
FIRST = 10  # steps that count as the switch


def summary(seeds: list[dict]) -> dict:
  """Means over seeds of the needle accuracy of every arm, and the largest jump of the loss."""
  found: dict = {"num_seeds": len(seeds)}
  for name, key in ARMS.items():
    found[name] = round(float(np.mean([s["final"][key]["needle"] for s in seeds])), 4)
  ratios = [
    [b / a - 1 for a, b in zip(s["losses"]["full"], s["losses"]["sparse"], strict=True)]
    for s in seeds
  ]
  found["largest_loss_jump_at_the_switch"] = round(max(max(r[:FIRST]) for r in ratios), 4)
  found["mean_loss_jump_at_the_switch"] = round(float(np.mean([r[:FIRST] for r in ratios])), 4)
  return found


def draw(seeds: list[dict], path: pathlib.Path) -> None:
  pyplot = extras.require_extra("matplotlib.pyplot", extra="plot")
  figure, (left, right) = pyplot.subplots(1, 2, figsize=(10, 3.8))
  colors = {"full": "C0", "sparse": "C1"}
  for i, run in enumerate(seeds):
    losses = run["losses"]
    short = len(losses["short"])
    left.plot(_smooth(losses["short"]), color="gray", lw=0.8, label=None if i else "short, full")
    for name, color in colors.items():
      steps = short + np.arange(len(losses[name]))
      label = None if i else f"long, {name}"
      left.plot(steps, _smooth(losses[name]), color=color, lw=0.8, label=label)
    for (name, key), style in zip(
      (("full", "full"), ("full", "sparse"), ("sparse", "sparse")), ("-", "--", "-"), strict=True
    ):
      rows = run["curves"][name]
      label = {
        "fullfull": "full",
        "fullsparse": "full, selection at test",
        "sparsesparse": "sparse",
      }
      right.plot(
        [r["step"] for r in rows],
        [r[f"{key}_needle"] for r in rows],
        style,
        color=colors[name],
        label=None if i else label[name + key],
      )
  left.set(xlabel="step (4096 tokens)", ylabel="training loss (answers weigh more)")
  right.set(xlabel="steps at long length", ylabel="needle accuracy", ylim=(0, 1.02))
  for axis in (left, right):
    axis.legend(fontsize=8)
  figure.tight_layout()
  figure.savefig(path, dpi=120)


def _smooth(values: list[float], size: int = 10) -> np.ndarray:
  padded = np.concatenate((np.full(size - 1, values[0]), values))
  return np.convolve(padded, np.full(size, 1 / size), "valid")
