"""The list of suites of `experiments.tunnel` and the report's first paragraph."""

import json
import platform
from collections.abc import Callable, Sequence

import jax

from experiments import _tunnel, _tunnel_law, _tunnel_mup, _tunnel_stages, _tunnel_wsd
from minicpm_jax.core import files
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
    "compared within a seed, and an effect counts as shown only if it holds for every seed that "
    "was run (except in the suite mup, which says why). CPU seconds in a suite's text are of its "
    "runs alone, without compilation; the last table counts everything."
  )


# --- Cost ----------------------------------------------------------------------------------------


def note_cost(ctx: _tunnel.Context, suite: str, wall: float, cpu: float) -> dict[str, float]:
  """Adds the seconds of one start of a suite to WORKDIR/SCALE/seconds.json; its sums so far."""
  path = ctx.workdir / "seconds.json"
  known = json.loads(path.read_text()) if path.exists() else {}
  sums = known.setdefault(suite, {"cpu": 0.0, "wall": 0.0, "starts": 0})
  for name, value in (("cpu", cpu), ("wall", wall), ("starts", 1)):
    sums[name] += value
  files.write_json(path, known)
  return sums


def cost(ctx: _tunnel.Context) -> report.Section:
  """Seconds of every suite that was finished in this workdir, all starts together."""
  known = json.loads((ctx.workdir / "seconds.json").read_text())
  section = report.Section("What it cost")
  section.text(
    "Seconds of one process, compilation, scoring and plots included, summed over all starts of a",
    "suite in this workdir (a start that was cut off is not counted). Wall time is that of a",
    "machine which may have been shared.",
  )
  rows = [(name, f"{x['cpu']:.0f}", f"{x['wall']:.0f}", x["starts"]) for name, x in known.items()]
  total = [f"{sum(x[kind] for x in known.values()):.0f}" for kind in ("cpu", "wall")]
  section.table(("suite", "CPU s", "wall s", "starts"), [*rows, ("all", *total, "")])
  return section
