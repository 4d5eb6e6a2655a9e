"""Suites of WSD: against cosine at several horizons from one trunk; diagnostics of the decay."""

import dataclasses

import numpy as np

from experiments import _tunnel
from minicpm_jax.core import pictures
from minicpm_jax.optim import probe
from minicpm_jax.tunnel import fit, knobs, plan, records, report

LR, FLOOR = 0.02, 0.03  # base rate; end of decay / peak
DECAYS = {
  "2.5%": (0.025, "exp_to", FLOOR),
  "5%": (0.05, "exp_to", FLOOR),
  "10%": (0.1, "exp_to", FLOOR),
  "20%": (0.2, "exp_to", FLOOR),
  "10% linear to 0": (0.1, "linear_to", 0.0),
  "10% 1-sqrt": (0.1, "one_minus_sqrt", 0.0),
}
MAX_BEHIND, MIN_SHORT, MIN_DROP = 0.002, 0.01, 0.03  # nats (training.md 13.2)


def _label(name: str) -> str:
  return name.replace("%", "pct").replace(" ", "-")


def _plan(ctx: _tunnel.Context, seed: int) -> list[plan.RunSpec]:
  """One trunk with all decays of all lengths, cosines, and decays put at the start."""
  lengths, warmup = ctx.scale.wsd_lengths, min(20, min(ctx.scale.wsd_lengths) // 4)
  longest = max(lengths)
  trunk = plan.RunSpec(
    name=f"s{seed}-trunk",
    model=ctx.model(ctx.scale.wsd_width),
    optim=_tunnel.adam(LR, plan.schedule(longest, decay_share=0, warmup_steps=warmup)),
    num_steps=longest,
    seed=seed,
    data_seed=seed,
    eval_steps=lengths,
  )
  branches = {
    f"{_label(name)}-{length}": plan.schedule(
      length, decay_share=share, warmup_steps=warmup, shape=shape, min_ratio=floor
    )
    for length in lengths
    for name, (share, shape, floor) in DECAYS.items()
  }
  specs = plan.trunk_and_branches(trunk, branches)
  for total in sorted({t for s in lengths for t in (s // 2, s, 2 * s)}):
    ends = [s for s in lengths if total in (s // 2, s, 2 * s)]
    specs.append(
      dataclasses.replace(
        trunk,
        name=f"s{seed}-cosine{total}",
        optim=_tunnel.adam(LR, _tunnel.cosine(total, warmup)),
        num_steps=max(ends),
        eval_steps=tuple(ends),
      )
    )
  for length in lengths:
    early = dataclasses.replace(
      plan.schedule(length, decay_share=0.1, warmup_steps=warmup, min_ratio=FLOOR), stable_steps=0
    )
    specs.append(
      dataclasses.replace(
        trunk,
        name=f"s{seed}-early{length}",
        optim=_tunnel.adam(LR, early),
        num_steps=length,
        eval_steps=(),
      )
    )
  for length in _fresh_lengths(ctx):
    branch = next(s for s in specs if s.name == f"s{seed}-trunk-{_label('10%')}-{length}")
    specs.append(dataclasses.replace(branch, name=f"s{seed}-fresh{length}", branch_from=None))
  return specs


def _fresh_lengths(ctx: _tunnel.Context) -> tuple[int, ...]:
  """Horizons whose branch is also run from step 0 (training.md 13.3: S, 2S, 4S)."""
  return ctx.scale.wsd_lengths[:-1] or ctx.scale.wsd_lengths


def wsd(ctx: _tunnel.Context) -> report.Section:
  """The table of training.md 13.2."""
  scale = ctx.scale
  lengths, seeds = scale.wsd_lengths, range(scale.wsd_seeds)
  runner = ctx.runner("wsd")
  specs = [spec for seed in seeds for spec in _plan(ctx, seed)]
  results = runner.run(specs)

  def losses(seed: int, length: int) -> dict[str, float]:
    row = {"constant": results[f"s{seed}-trunk"].loss(step=length)}
    row["decay at the start"] = results[f"s{seed}-early{length}"].loss()
    for name, total in (("S/2", length // 2), ("S", length), ("2S", 2 * length)):
      row[f"Cosine({name})"] = results[f"s{seed}-cosine{total}"].loss(step=length)
    return row | {
      f"WSD {name}": results[f"s{seed}-trunk-{_label(name)}-{length}"].loss() for name in DECAYS
    }

  found = {length: [losses(seed, length) for seed in seeds] for length in lengths}
  section = report.Section("WSD against cosine")
  section.text(
    f"Width {scale.wsd_width}, muP, base lr {LR}, {scale.wsd_seeds} seed(s), steps of 1024 bytes;",
    "every run of a seed reads the same batches, all WSD columns branch from one trunk. Held-out",
    f"nats per byte, mean over seeds; decays end at {FLOOR:.0%} of the peak unless named.",
    f"{_tunnel.total_cpu(results.values()):.0f} s CPU for {len(specs)} runs;",
    f"{sum(r.steps_run for r in results.values()):,} steps instead of",
    f"{sum(s.num_steps for s in specs):,} without branching.",
  )
  names = list(found[lengths[0]][0])
  section.table(
    ("steps S", *names, "spread"),
    [
      (
        length,
        *(f"{np.mean([row[name] for row in rows]):.4f}" for name in names),
        f"{max(np.ptp([row[name] for row in rows]) for name in names):.4f}",
      )
      for length, rows in found.items()
    ],
  )
  _claims(section, found)
  _branches_are_fresh_runs(ctx, section, results)
  _horizon_curve(section, found, lengths)
  section.data["losses"] = found
  return section


def _gaps(rows: list[dict[str, float]], a: str, b: str) -> list[float]:
  """a - b within every seed."""
  return [row[a] - row[b] for row in rows]


def _claims(section: report.Section, found: dict) -> None:
  judged = {s: rows for s, rows in found.items() if s >= 400} or found

  def over(a: str, b: str, which: dict) -> str:
    return "; ".join(f"S={s}: {_tunnel.signed(_gaps(r, a, b))}" for s, r in which.items())

  def every(a: str, b: str, which: dict, test) -> bool:
    return all(test(gap) for rows in which.values() for gap in _gaps(rows, a, b))

  section.claim(
    "WSD with 10% decay ends at or below Cosine(S)",
    every("WSD 10%", "Cosine(S)", judged, lambda g: g <= MAX_BEHIND),
    over("WSD 10%", "Cosine(S)", judged),
    "constant - Cosine(S): " + over("constant", "Cosine(S)", judged),
  )
  section.claim(
    "a decay of 2.5% is not enough",
    every("WSD 2.5%", "WSD 10%", judged, lambda g: g > MIN_SHORT),
    "2.5% - 10%: " + over("WSD 2.5%", "WSD 10%", judged),
    "20% - 10%: " + over("WSD 20%", "WSD 10%", judged),
  )
  section.claim(
    "the loss falls in the decay, by more than the constant rate reaches in the same steps",
    every("constant", "WSD 10%", judged, lambda g: g > MIN_DROP),
    "constant - 10%: " + over("constant", "WSD 10%", judged),
    "decay at the start - Cosine(S): " + over("decay at the start", "Cosine(S)", judged),
  )
  last = {max(found): found[max(found)]}
  section.claim(
    "at the longest length Cosine(T) is best at T = S",
    every("Cosine(S/2)", "Cosine(S)", last, lambda g: g > 0)
    and every("Cosine(2S)", "Cosine(S)", last, lambda g: g > 0),
    f"S/2 - S: {over('Cosine(S/2)', 'Cosine(S)', last)}; "
    f"2S - S: {over('Cosine(2S)', 'Cosine(S)', last)}",
    "2S - S at the shortest: " + over("Cosine(2S)", "Cosine(S)", {min(found): found[min(found)]}),
  )
  section.claim(
    "continued training: one stable run, annealed at every length, keeps up with cosines made for "
    "each length",
    every("WSD 10%", "Cosine(S)", found, lambda g: g <= MAX_BEHIND),
    over("WSD 10%", "Cosine(S)", found),
    "Cosine(S/2) carried on to S, minus Cosine(S): " + over("Cosine(S/2)", "Cosine(S)", found),
  )


def _branches_are_fresh_runs(
  ctx: _tunnel.Context, section: report.Section, results: dict[str, records.Result]
) -> None:
  pairs = []
  for length in _fresh_lengths(ctx):
    for seed in range(ctx.scale.wsd_seeds):
      branch = results[f"s{seed}-trunk-{_label('10%')}-{length}"]
      pairs.append((length, branch, results[f"s{seed}-fresh{length}"]))
  section.claim(
    "a branch of the stable run ends with the very loss of a fresh run of its schedule",
    all(branch.loss() == fresh.loss() for _, branch, fresh in pairs),
    "branch - fresh: " + ", ".join(f"S={n}: {b.loss() - f.loss():g}" for n, b, f in pairs),
    "steps of branch and fresh run: "
    + ", ".join(f"{b.steps_run}/{f.steps_run}" for _, b, f in pairs),
  )


def _horizon_curve(section: report.Section, found: dict, lengths: tuple[int, ...]) -> None:
  figure, axes = pictures.figure(2)
  for name in ("constant", "Cosine(S)", "WSD 2.5%", "WSD 10%"):
    axes[0].plot(lengths, [np.mean([r[name] for r in found[s]]) for s in lengths], "o-", label=name)
  axes[0].set(xscale="log", xlabel="steps S", ylabel="held-out nats per byte")
  axes[0].legend()
  shares = [100 * DECAYS[name][0] for name in ("2.5%", "5%", "10%", "20%")]
  for length in lengths:
    rows = found[length]
    values = [np.mean(_gaps(rows, f"WSD {share:g}%", "Cosine(S)")) for share in shares]
    axes[1].plot(shares, values, "o-", label=f"S = {length}")
  axes[1].axhline(0, color="k", linewidth=0.8)
  axes[1].set(xscale="log", xlabel="decay, % of S", ylabel="WSD - Cosine(S)")
  axes[1].legend()
  section.picture("wsd_cosine", figure, "Loss over the horizon; what a decay share buys")
  if len(lengths) < 4:
    return
  means = [np.mean([r["WSD 10%"] for r in found[s]]) for s in lengths]
  power, exponential = (fit.fit_curve(lengths, means, kind) for kind in ("power", "exponential"))
  section.claim(
    "losses of WSD(0.9 S, 0.1 S) over S follow a power law better than an exponential",
    power.rmse < exponential.rmse,
    f"rmse {power.rmse:.4f} (exponent {power.rate:.3f}, floor {power.floor:.3f})",
    f"exponential: rmse {exponential.rmse:.4f}; {len(lengths)} points, 3 constants",
  )


# --- Diagnostics ---------------------------------------------------------------------------------

PROBES = 6


def diagnostics(ctx: _tunnel.Context) -> report.Section:
  """Gradient norm, cosine of consecutive gradients, slope and curvature around the decay."""
  scale, section = ctx.scale, report.Section("The decay stage, step by step")
  length = sorted(scale.wsd_lengths)[len(scale.wsd_lengths) // 2]
  warmup = min(20, length // 4)
  runner = ctx.runner("diagnostics")
  schedule = plan.schedule(length, decay_share=0.1, warmup_steps=warmup, min_ratio=FLOOR)
  start = schedule.decay_start
  gap = max(1, schedule.decay_steps // 10)  # steps between the two gradients of a probe
  stable = np.linspace(start - schedule.decay_steps, start - gap, PROBES).astype(int)
  decay = np.unique(np.linspace(start, length - gap, PROBES).astype(int))

  def spec(seed: int, is_constant: bool) -> plan.RunSpec:
    flat = plan.schedule(length, decay_share=0, warmup_steps=warmup)
    steps = {int(s) + i for s in (*stable, *decay) for i in (0, gap)}
    return plan.RunSpec(
      name=f"{'constant' if is_constant else 'wsd'}-s{seed}",
      model=ctx.model(scale.wsd_width),
      optim=_tunnel.adam(LR, flat if is_constant else schedule),
      num_steps=length,
      seed=seed,
      data_seed=seed,
      save_steps=tuple(sorted(steps)),
    )

  specs = plan.grid(spec, {"seed": range(scale.wsd_seeds), "is_constant": (False, True)})
  runner.run(specs)
  rows = ctx.corpus.heldout_rows("text", num_rows=128, seq_len=_tunnel.SEQ_LEN)

  def at(run: plan.RunSpec, step: int) -> dict[str, float]:
    gradient, pair = runner.program(run).gradient, []
    for s in (step, step + gap):
      params = runner.load_state(run, run.name, s).params
      pair.append((params, gradient(params, knobs.knobs_of(run.model, run.optim), rows.ids)))
    (old, old_grads), (new, new_grads) = pair
    values = probe.diagnostics(new, new_grads, old, old_grads)
    return {name: abs(float(v)) if name == "slope" else float(v) for name, v in values.items()}

  names = ("grad_norm", "grad_cosine", "slope", "curvature", "max_step")
  found = {}
  for run in specs:
    traces = {int(s): at(run, int(s)) for s in (*stable, *decay)}
    found[run.name] = traces
  half = len(decay) // 2
  stages = {"stable": stable, "decay, second half": decay[half:]}
  table, means = [], {}
  for run in specs:
    for stage, steps in stages.items():
      mean = {n: float(np.mean([found[run.name][int(s)][n] for s in steps])) for n in names}
      means[run.name, stage] = mean
      table.append((run.name, stage, *(f"{mean[n]:.4g}" for n in names)))
  section.text(
    f"Width {scale.wsd_width}, {length} steps, decay from step {start}; gradients of 128 fixed",
    f"held-out rows, {gap} step(s) apart (training.md 4.4). |slope| is |D1|. The constant rate at",
    "the same steps is the control. A first run one step apart, at toy scale, showed neither the",
    "slope (1.1, 2.1 times that of the stable stage) nor the curvature (1.2 times): one update is",
    "mostly the noise of its batch. The gap of a tenth of the decay was chosen after that.",
  )
  section.table(("run", "stage", *names), table)

  def ratio(kind: str, name: str) -> list[float]:
    return [
      means[f"{kind}-s{s}", "decay, second half"][name] / means[f"{kind}-s{s}", "stable"][name]
      for s in range(scale.wsd_seeds)
    ]

  for name, text, test in (
    ("grad_norm", "the gradient norm falls in the decay", lambda r: r < 1),
    ("slope", "the slope D1 shrinks with the learning rate", lambda r: r < 1),
    ("curvature", "the curvature rises by about an order of magnitude", lambda r: r > 5),
    ("max_step", "the largest change of a matrix entry follows the learning rate", lambda r: r < 1),
  ):
    wsd_ratio, control = ratio("wsd", name), ratio("constant", name)
    section.claim(
      text,
      all(map(test, wsd_ratio)),
      "decay / stable: " + ", ".join(f"{r:.3g}" for r in wsd_ratio),
      "constant rate: " + ", ".join(f"{r:.3g}" for r in control),
    )
  cosines = {
    kind: [
      means[f"{kind}-s{s}", "decay, second half"]["grad_cosine"] for s in range(scale.wsd_seeds)
    ]
    for kind in ("wsd", "constant")
  }
  section.claim(
    "consecutive gradients point the same way in the decay",
    all(c > 0 and c > d for c, d in zip(cosines["wsd"], cosines["constant"], strict=True)),
    f"cosine {_tunnel.signed(cosines['wsd'])}",
    f"constant rate: {_tunnel.signed(cosines['constant'])}",
  )
  figure, axes = pictures.figure(len(names), height=3.0)
  for axis, name in zip(axes, names, strict=True):
    for run in specs:
      trace = found[run.name]
      style = "-" if run.name.startswith("wsd") else "--"
      axis.plot(sorted(trace), [trace[s][name] for s in sorted(trace)], style, label=run.name)
    axis.axvline(start, color="k", linewidth=0.8)
    axis.set(title=name, xlabel="step")
  axes[0].legend(fontsize=7)
  section.picture("decay_stage", figure, "Diagnostics around the start of the decay (black line)")
  section.data["traces"] = found
  return section
