"""Distillation of a model from a larger one: the second stage of BitCPM-CANN 3.3 ("decoupled").

Quantisation-aware training to convergence first, then this loss with a full-precision teacher. The
report prints no loss; here it is forward KL on the next-token distributions plus cross entropy:

  L = (1 - alpha) CE(student, data) + alpha tau^2 KL(softmax(t / tau) || softmax(s / tau))

each a mean over the weighted tokens. It is an ordinary loss of `train.step`: `make_step` only hands
the teacher's parameters through the compiled call, as an argument that is neither differentiated
nor donated.
"""

import dataclasses
import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from minicpm_jax.config import validate
from minicpm_jax.core import metrics as metrics_lib
from minicpm_jax.core import types
from minicpm_jax.models import transformer
from minicpm_jax.train import step as step_lib

CHUNK = 512  # tokens whose logits of both models are held at once


@dataclasses.dataclass(frozen=True, kw_only=True)
class DistillLoss:
  """Weights of the loss; alpha 1 = the teacher only."""

  alpha: float = 0.5
  temperature: float = 1.0

  def __post_init__(self):
    validate.require_hints(self, "distill.")
    if not 0 <= self.alpha <= 1:
      raise ValueError(f"distill.alpha: found {self.alpha}, expected a share in [0, 1]")
    if not 0 < self.temperature < math.inf:
      raise ValueError(f"distill.temperature: found {self.temperature}, expected > 0")


def kl_and_ce(
  student_TV: Float[Array, "T V"],
  teacher_TV: Float[Array, "T V"],
  targets_T: Any,
  temperature: float = 1.0,
) -> tuple[Float[Array, " T"], Float[Array, " T"]]:
  """(tau^2 KL(teacher || student), cross entropy of the student) of every token, float32 logits."""
  soft_TV = jax.nn.log_softmax(student_TV / temperature)
  goal_TV = jax.nn.log_softmax(teacher_TV / temperature)
  kl_T = temperature**2 * jnp.sum(jnp.exp(goal_TV) * (goal_TV - soft_TV), axis=-1)
  hard_TV = jax.nn.log_softmax(student_TV)
  ce_T = -jnp.take_along_axis(hard_TV, targets_T[:, None], axis=-1)[:, 0]
  return kl_T, ce_T


def make_loss_fn(
  student: transformer.Transformer,
  teacher: transformer.Transformer,
  teacher_params: types.Params,
  loss: DistillLoss = DistillLoss(),
) -> step_lib.LossFn:
  """`loss_fn(params, batch, ctx)` for `train.step`; metrics "loss" (cross entropy), "kl"."""
  if student.cfg.vocab_size != teacher.cfg.vocab_size:
    raise ValueError(
      f"teacher: found a vocabulary of {teacher.cfg.vocab_size}, expected the student's "
      f"{student.cfg.vocab_size}"
    )

  def loss_fn(params: types.Params, batch: step_lib.Batch, ctx: step_lib.LossContext):
    inputs = (batch["tokens"], batch["positions"], batch["segment_ids"])
    hidden = student.apply({"params": params}, *inputs, return_logits=False).hidden
    goal = teacher.apply({"params": teacher_params}, *inputs, return_logits=False).hidden
    goal = jax.lax.stop_gradient(goal)

    @jax.checkpoint
    def chunk(args: Any) -> tuple[Array, Array]:
      hidden_1CD, goal_1CD, targets_C, mask_C = args
      logits = student.apply({"params": params}, hidden_1CD[None], method="unembed")[0]
      goals = teacher.apply({"params": teacher_params}, goal_1CD[None], method="unembed")[0]
      kl_C, ce_C = kl_and_ce(logits, jax.lax.stop_gradient(goals), targets_C, loss.temperature)
      return jnp.sum(kl_C * mask_C), jnp.sum(ce_C * mask_C)

    tokens = batch["targets"].size
    num = -(-tokens // CHUNK)

    def split(x: Array) -> Array:
      x = x.reshape(tokens, *x.shape[2:])
      x = jnp.pad(x, [(0, -tokens % num)] + [(0, 0)] * (x.ndim - 1))
      return x.reshape(num, -1, *x.shape[1:])

    parts = jax.tree.map(split, (hidden, goal, batch["targets"], batch["loss_mask"]))
    kl, ce = (jnp.sum(x) for x in jax.lax.map(chunk, parts))
    weight = jnp.sum(batch["loss_mask"])
    total = ((1 - loss.alpha) * ce + loss.alpha * kl) / ctx.totals["loss"]
    return total, {"loss": metrics_lib.Metric(ce, weight), "kl": metrics_lib.Metric(kl, weight)}

  return loss_fn


def make_step(
  student: transformer.Transformer,
  teacher: transformer.Transformer,
  optimizer: Any,
  loss: DistillLoss = DistillLoss(),
  *,
  grad_accum: int = 1,
) -> Callable[..., Any]:
  """step(state, batch, schedule, teacher_params) as `train.step.make_train_step` otherwise.

  The student's quantisation is that of its config.
  """

  def step(state: Any, batch: Any, schedule: Any, teacher_params: types.Params) -> Any:
    one = step_lib.make_train_step(
      make_loss_fn(student, teacher, teacher_params, loss),
      step_lib.make_totals_fn(student),
      optimizer,
      grad_accum=grad_accum,
      weights=step_lib.quantized_weights(student.cfg),
    )
    return one(state, batch, schedule)

  return step
