"""Metrics between two log lines, throughput, and the check that a step was finite."""

import math
import time
from collections.abc import Callable, Mapping

import numpy as np

from minicpm_jax import config
from minicpm_jax.core import metrics as metrics_lib

LAST_ONLY = ("learning_rate",)  # reported as it was at the last step, not as a mean


class NonFiniteError(ValueError):
  """A step gave a loss or a gradient that is not a number."""


class Window:
  """Sums of the metrics since the last log line. `exclude` takes time out of the throughput."""

  def __init__(self, cfg: config.TrainConfig, *, num_devices: int, device_kind: str):
    self._cfg, self._num_devices, self._device_kind = cfg, num_devices, device_kind
    self._sums: dict[str, metrics_lib.Metric] = {}
    self._last: Mapping[str, metrics_lib.Metric] = {}
    self.restart_clock()

  def restart_clock(self) -> None:
    """Drops tokens and time so far (the first step compiles)."""
    self._since, self._tokens = time.monotonic(), 0

  def exclude(self, seconds: float) -> None:
    self._since += seconds

  def add(self, metrics: Mapping[str, metrics_lib.Metric]) -> None:
    self._sums = metrics_lib.add(self._sums, metrics)
    self._last = metrics
    self._tokens += int(metrics["tokens"].sum)

  def flush(self) -> dict[str, float]:
    """Means since the last flush, plus tokens_per_second and mfu (where the peak is known).

    A source without a token in that time has no loss.
    """
    sums = {k: v for k, v in self._sums.items() if k != "tokens"}
    unseen = [k for k, v in sums.items() if k.startswith("source_loss/") and not v.weight]
    values = metrics_lib.means({k: v for k, v in sums.items() if k not in unseen})
    values |= metrics_lib.means({k: self._last[k] for k in LAST_ONLY})
    seconds = time.monotonic() - self._since
    if self._tokens and seconds > 0:
      values["tokens_per_second"] = rate = self._tokens / seconds
      mfu = metrics_lib.mfu(
        self._cfg.model,
        seq_len=self._cfg.data.seq_len,
        tokens_per_second=rate,
        device_kind=self._device_kind,
        num_devices=self._num_devices,
      )
      if mfu is not None:
        values["mfu"] = mfu
    self._sums = {}
    self.restart_clock()
    return values


def check_finite(
  step: int,
  metrics: Mapping[str, metrics_lib.Metric],
  leaf_norms: Mapping[str, np.ndarray | float],
  *,
  last_loss: float | None,
  last_good: Callable[[], str],
) -> None:
  """Raises NonFiniteError with what is known of the step (host values)."""
  loss, norm = (float(metrics[name].sum) for name in ("total_loss", "grad_norm"))
  if math.isfinite(loss) and math.isfinite(norm):
    return
  terms = {k: float(m.sum) for k, m in metrics.items() if k.endswith("loss")}
  bad = [path for path, value in leaf_norms.items() if not math.isfinite(float(value))]
  largest = sorted(
    ((float(v), path) for path, v in leaf_norms.items() if path not in bad), reverse=True
  )[:3]
  lines = [
    f"step {step}: found loss {loss}, gradient norm {norm}; expected finite numbers",
    f"  loss terms (sums): {terms}; learning rate {float(metrics['learning_rate'].sum):.3g}",
    f"  gradients not finite in {len(bad)} of {len(leaf_norms)} leaves: {', '.join(bad) or 'none'}",
    f"  largest finite gradient norms: {', '.join(f'{p} {v:.3g}' for v, p in largest) or 'none'}",
    f"  loss of the step before: {'unknown (first step)' if last_loss is None else last_loss}",
    f"  nothing of this step was saved; {last_good()}",
    "  all leaves at once: look at the batch or the loss; one leaf: at that layer; a loss that "
    "rose before: lower optim.peak_lr or optim.clip_norm",
  ]
  raise NonFiniteError("\n".join(lines))
