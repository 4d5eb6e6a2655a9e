"""The list of suites of `experiments.tunnel` and the report's first paragraph."""

import platform
from collections.abc import Callable, Sequence

import jax

from experiments import _tunnel, _tunnel_law, _tunnel_mup, _tunnel_stages, _tunnel_wsd
from minicpm_jax.tunnel import report

SUITES: dict[str, Callable[[_tunnel.Context], report.Section]] = {
  "mup": _tunnel_mup.mup,
  "coordinates": _tunnel_mup.coordinate_check,
  "wsd": _tunnel_wsd.wsd,
  "law": _tunnel_law.law,
  "bench": _tunnel_law.scaling_bench,
  "stages": _tunnel_stages.stages,
  "steplaw": _tunnel_stages.step_law,
  "diagnostics": _tunnel_wsd.diagnostics,
  "batch": _tunnel_law.batch,
  "constants": _tunnel_mup.constants,
  "plan": _tunnel_stages.write_plan,
}


def resolve(names: Sequence[str]) -> list[str]:
  """Names of suites; "paper" is all of them."""
  found = [n for name in names for n in (SUITES if name == "paper" else (name,))]
  unknown = [name for name in found if name not in SUITES]
  if unknown or not found:
    raise ValueError(f"--suite: found {unknown or names}, expected paper or {', '.join(SUITES)}")
  return list(dict.fromkeys(found))


def intro(ctx: _tunnel.Context, scale: str, names: Sequence[str]) -> str:
  """What was run, on what."""
  corpus = ctx.corpus
  sizes = ", ".join(f"{name} {high - low:,}" for name, (low, high) in corpus.spans.items())
  device = jax.devices()[0]
  return (
    f"Scale {scale}, suites {', '.join(names)}. Training bytes: {sizes}; vocabulary "
    f"{corpus.vocab_size}, rows of {_tunnel.SEQ_LEN} bytes. {device.platform} "
    f"{device.device_kind}, jax {jax.__version__}, Python {platform.python_version()}. Losses are "
    "compared within a seed. An effect counts as shown only if it holds for every seed that was "
    "run; CPU seconds are of the runs alone, without compilation."
  )
