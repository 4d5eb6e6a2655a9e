"""Learning-rate schedules as data (training.md section 4).

`ScheduleArrays` is a pytree of scalars: the compiled train step takes it as an argument, so one
program serves every schedule kind, every branch point and every peak (also under `vmap`). The
printed formulas clash in two places; the readings followed here:
  WSD (MiniCPM 4.2, 6.2)   f(s) = 0.5^((s - decay_start)/h): the half-life is 5000 steps;
  cosine (MiniCPM B.1)     the usual half cosine from peak to the floor (10%), not the printed one,
                           which is negative after T/2.
"""

from typing import NamedTuple

import jax.numpy as jnp
import numpy as np
from jaxtyping import Float, Int

from minicpm_jax import config
from minicpm_jax.core import types

CONSTANT, EXP, LINEAR, ONE_MINUS_SQRT, COSINE, COSINE_LOOP = range(6)

Step = int | np.integer | Int[types.Array, ""] | Float[types.Array, ""]
Scalar = float | int | np.number | np.ndarray | types.Array


class ScheduleArrays(NamedTuple):
  """A schedule as float32 scalars (`shape` int32); steps count from 0.

  `decay` is the length of the decay (of one half period for cosine); `rate` is ln(f) per step for
  the exponential shapes; `floor` is the final lr / peak of the others.
  """

  peak: Scalar
  warmup: Scalar
  decay_start: Scalar
  decay: Scalar
  rate: Scalar
  floor: Scalar
  shape: Scalar


def schedule_arrays(cfg: config.ScheduleConfig, peak_lr: float) -> ScheduleArrays:
  """The schedule of `cfg` as data."""
  shape, rate, decay, start = CONSTANT, 0.0, cfg.decay_steps, cfg.decay_start
  if cfg.kind in ("cosine", "cosine_loop"):
    shape = COSINE if cfg.kind == "cosine" else COSINE_LOOP
    start, decay = cfg.warmup_steps, cfg.stable_steps + cfg.decay_steps
    if decay == 0:
      raise ValueError("schedule.decay_steps: found stable + decay = 0, expected > 0 for a cosine")
  elif cfg.kind == "wsd" and cfg.decay_steps == 0:
    shape = CONSTANT  # a stable stage that has not been branched yet
  elif cfg.kind == "wsd" and cfg.decay_shape == "exp_half_life":
    shape, rate = EXP, -np.log(2.0) / cfg.half_life_steps
  elif cfg.kind == "wsd" and cfg.decay_shape == "exp_to":
    shape, rate = EXP, np.log(cfg.min_ratio) / cfg.decay_steps
  elif cfg.kind == "wsd":
    shape = LINEAR if cfg.decay_shape == "linear_to" else ONE_MINUS_SQRT
  if not 0 <= peak_lr < np.inf:
    raise ValueError(f"peak_lr: found {peak_lr}, expected a number >= 0")
  return ScheduleArrays(
    peak=np.float32(peak_lr),
    warmup=np.float32(cfg.warmup_steps),
    decay_start=np.float32(start),
    decay=np.float32(max(decay, 1)),
    rate=np.float32(rate),
    floor=np.float32(cfg.min_ratio),
    shape=np.int32(shape),
  )


def learning_rate(step: Step, arrays: ScheduleArrays) -> Float[types.Array, ""]:
  """Learning rate at `step` (both may be traced); float32.

  peak * step/warmup below `warmup`, then peak * f(step - decay_start) with f = 1 before the decay.
  After the last step the final value holds (the loop's cosine goes on).
  """
  step = jnp.asarray(step, jnp.float32)
  a = arrays
  past = jnp.maximum(step - a.decay_start, 0.0)
  clipped = jnp.minimum(past, a.decay)
  fraction = clipped / a.decay
  factors = jnp.stack(
    [
      jnp.float32(1.0),
      jnp.exp(a.rate * clipped),
      1.0 - (1.0 - a.floor) * fraction,
      1.0 - (1.0 - a.floor) * jnp.sqrt(fraction),
      a.floor + (1.0 - a.floor) * 0.5 * (1.0 + jnp.cos(jnp.pi * fraction)),
      a.floor + (1.0 - a.floor) * 0.5 * (1.0 + jnp.cos(jnp.pi * past / a.decay)),
    ]
  )
  warm = jnp.where(step < a.warmup, step / jnp.maximum(a.warmup, 1.0), 1.0)
  return (a.peak * warm * factors[a.shape]).astype(jnp.float32)


def wsd(
  step: Step,
  *,
  peak_lr: float,
  warmup_steps: int,
  stable_steps: int,
  decay_steps: int,
  shape: str = "exp_to",
  min_ratio: float = 0.1,
  half_life_steps: int = 5000,
) -> Float[types.Array, ""]:
  """Warmup-Stable-Decay learning rate at `step` (MiniCPM section 4.2).

  `shape`: exp_half_life 0.5^(s/h), exp_to r^(s/D), linear_to 1 - (1-r) s/D,
  one_minus_sqrt 1 - (1-r) sqrt(s/D), with s steps into the decay of D steps.
  """
  cfg = config.ScheduleConfig(
    kind="wsd",
    warmup_steps=warmup_steps,
    stable_steps=stable_steps,
    decay_steps=decay_steps,
    decay_shape=shape,
    min_ratio=min_ratio,
    half_life_steps=half_life_steps,
  )
  return learning_rate(step, schedule_arrays(cfg, peak_lr))


def cosine(
  step: Step, *, peak_lr: float, warmup_steps: int, total_steps: int, min_ratio: float = 0.1
) -> Float[types.Array, ""]:
  """Cosine(T): warm-up, then half a cosine to `min_ratio * peak_lr` at `total_steps`, then flat."""
  return _cosine("cosine", step, peak_lr, warmup_steps, total_steps, min_ratio)


def cosine_loop(
  step: Step, *, peak_lr: float, warmup_steps: int, total_steps: int, min_ratio: float = 0.1
) -> Float[types.Array, ""]:
  """CosineLoop(T): `cosine` that climbs back to the peak and goes on, period 2 (T - warm-up)."""
  return _cosine("cosine_loop", step, peak_lr, warmup_steps, total_steps, min_ratio)


def _cosine(
  kind: str, step: Step, peak_lr: float, warmup_steps: int, total_steps: int, min_ratio: float
) -> Float[types.Array, ""]:
  cfg = config.ScheduleConfig(
    kind=kind,
    warmup_steps=warmup_steps,
    decay_steps=total_steps - warmup_steps,
    min_ratio=min_ratio,
  )
  return learning_rate(step, schedule_arrays(cfg, peak_lr))
