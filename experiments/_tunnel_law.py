"""Suites of scale: L(N, D) from WSD branches, loss to accuracy, batch law."""

import dataclasses
import itertools
import math

import numpy as np

from experiments import _tunnel
from minicpm_jax.core import pictures
from minicpm_jax.tunnel import bench, corpus, fit, plan, report

LR = 0.016  # muP, best at every width of the suite "mup"
CONTEXT, ANSWER, CHOICES, ITEMS = 48, 16, 4, 512  # bytes, bytes, options, items


def law_plan(ctx: _tunnel.Context, width: int, seed: int) -> list[plan.RunSpec]:
  """One trunk a model, decayed at every budget: O(m) trunks for m x n points (MiniCPM 4.5)."""
  lengths = ctx.scale.law_lengths
  warmup = min(20, min(lengths) // 4)
  trunk = plan.RunSpec(
    name=f"w{width}-s{seed}",
    model=ctx.model(width, base_width=min(ctx.scale.law_widths)),
    optim=_tunnel.adam(LR, plan.schedule(max(lengths), decay_share=0, warmup_steps=warmup)),
    num_steps=min(lengths),
    seed=seed,
    data_seed=seed,
  )
  decays = {str(s): plan.schedule(s, warmup_steps=warmup) for s in lengths}
  trunk, *branches = plan.trunk_and_branches(trunk, decays)
  return [trunk, *(_with_end(branch) for branch in branches)]


def _with_end(spec: plan.RunSpec) -> plan.RunSpec:
  """The last state is kept: the suite "bench" scores it."""
  return dataclasses.replace(spec, save_steps=(spec.num_steps,))


def law(ctx: _tunnel.Context) -> report.Section:
  """L(N, D), the held-out corner, the optimal ratio with its compute."""
  scale, section = ctx.scale, report.Section("Scaling law from WSD branches")
  runner = ctx.runner("law")
  specs = [
    s for seed in range(scale.law_seeds) for w in scale.law_widths for s in law_plan(ctx, w, seed)
  ]
  results = runner.run(specs)
  ends = [spec for spec in specs if spec.branch_from is not None]

  def points(seed: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    mine = [spec for spec in ends if spec.seed == seed]
    rows = [(plan.num_params(s.model), s.tokens, results[s.name].loss()) for s in mine]
    return tuple(np.array(column, np.float64) for column in zip(*rows, strict=True))

  corner = max(scale.law_widths), max(scale.law_lengths)
  fits, errors, table = [], [], []
  for seed in range(scale.law_seeds):
    n, d, losses = points(seed)
    is_corner = (n == n.max()) & (d == d.max())
    partial = fit.fit_scaling_law(n[~is_corner], d[~is_corner], losses[~is_corner])
    predicted = float(partial.loss(n[is_corner], d[is_corner])[0])
    errors.append(predicted / float(losses[is_corner][0]) - 1)
    whole = fit.fit_scaling_law(n, d, losses)
    fits.append(whole)
    table.append(
      (
        seed,
        *(f"{x:.3f}" for x in (whole.alpha, whole.beta, whole.floor)),
        f"{whole.rmse:.4f}",
        f"{whole.r_squared:.4f}",
        f"{predicted:.4f}",
        f"{float(losses[is_corner][0]):.4f}",
      )
    )
  section.text(
    f"Widths {scale.law_widths}, {len(scale.law_lengths)} budgets of {scale.law_lengths} steps of",
    f"1024 bytes, decays of 10% from one trunk a model, base lr {LR}, {scale.law_seeds} seed(s);",
    f"N counts non-embedding parameters, D bytes. Held-out corner: width {corner[0]},",
    f"{corner[1]} steps, left out of the fit that predicts it.",
    f"{_tunnel.total_cpu(results.values()):.0f} s CPU.",
  )
  header = ("seed", "alpha", "beta", "floor", "rmse", "R^2", "corner predicted", "corner measured")
  section.table(header, table)
  section.claim(
    "the law fits (R^2 > 0.95)",
    all(f.r_squared > 0.95 for f in fits),
    "R^2 " + ", ".join(f"{f.r_squared:.4f}" for f in fits),
  )
  far = [_corner_from_smaller(*points(seed)) for seed in range(scale.law_seeds)]
  section.claim(
    "the held-out corner is predicted within 2%",
    all(abs(e) < 0.02 for e in errors),
    "error " + ", ".join(f"{100 * e:+.2f}%" for e in errors),
    "guess without a law (the nearest measured point): "
    + ", ".join(f"{100 * e:+.2f}%" for e in far),
  )
  _ratio(section, fits, points)
  _trained_longer(section, fits, scale)
  _draw(section, fits[0], points(0))
  section.data |= {
    "fits": [dataclasses.asdict(f) for f in fits],
    "corner_errors": errors,
    "points": [np.stack(points(s), 1).tolist() for s in range(scale.law_seeds)],
  }
  return section


def _corner_from_smaller(n: np.ndarray, d: np.ndarray, losses: np.ndarray) -> float:
  """Relative error of taking the loss of the best point that is not the corner."""
  is_corner = (n == n.max()) & (d == d.max())
  return float(losses[~is_corner].min() / losses[is_corner][0] - 1)


def _ratio(section: report.Section, fits: list[fit.ScalingLaw], points) -> None:
  rows = []
  for seed, found in enumerate(fits):
    n, d, _ = points(seed)
    for compute in (6 * np.median(n) * np.median(d), 6 * n.max() * d.max()):
      try:
        n_best, d_best = found.optimum(float(compute))
      except fit.FitError:  # the fit sees no gain from size, or none from data
        rows.append((seed, f"{compute:.3g}", "none", "none", "none"))
        continue
      rows.append(
        (seed, f"{compute:.3g}", f"{n_best:.3g}", f"{d_best:.3g}", f"{d_best / n_best:.3g}")
      )
  section.text(
    "Optimal ratio of data to parameters, always with its compute C = 6 N D (bytes of source code",
    "and models of ten thousand parameters: not comparable with the paper's 192).",
  )
  section.table(("seed", "C", "N_opt", "D_opt", "D/N"), rows)


def _trained_longer(
  section: report.Section, fits: list[fit.ScalingLaw], scale: _tunnel.Scale
) -> None:
  """A small model trained longer reaches a larger one's loss (MiniCPM 4.3)."""
  small, large = scale.law_widths[-2], scale.law_widths[-1]
  n_small, n_large = (plan.num_params(plan.small_model(w)) for w in (small, large))
  tokens = scale.law_lengths[1] * _tunnel.ROWS * _tunnel.SEQ_LEN
  rows = []
  for seed, found in enumerate(fits):
    target = float(found.loss(n_large, tokens))
    needed = found.tokens_to_match(n_small, target)
    cost = needed * n_small / (tokens * n_large)
    text = f"{cost:.2f}" if math.isfinite(cost) else "never"
    rows.append((seed, f"{target:.4f}", f"{needed / tokens:.2f}", text))
  section.text(
    f"What width {small} costs to reach width {large} at {scale.law_lengths[1]} steps, by the law:"
  )
  section.table(("seed", "loss", "times the data", "times the training compute"), rows)


def _draw(section: report.Section, law_fit: fit.ScalingLaw, points) -> None:
  n, d, losses = points
  figure, axes = pictures.figure(2)
  for size in np.unique(n):
    mine = n == size
    line = axes[0].plot(d[mine], losses[mine], "o", label=f"N = {size:,.0f}")[0]
    axes[0].plot(d[mine], law_fit.loss(size, d[mine]), "-", color=line.get_color())
  axes[0].set(xscale="log", xlabel="bytes D", ylabel="held-out nats per byte")
  axes[0].legend(fontsize=7)
  compute = np.geomspace((6 * n * d).min(), (6 * n * d).max(), 40)
  if law_fit.c_n > 0 and law_fit.c_d > 0:
    best = [law_fit.optimum(float(c)) for c in compute]
    axes[1].plot(compute, [b / a for a, b in best])
  axes[1].set(xscale="log", yscale="log", xlabel="compute 6 N D", ylabel="optimal D / N")
  section.picture("scaling_law", figure, "Measured points and the fitted law; the optimal ratio")


# --- Loss to accuracy ----------------------------------------------------------------------------

TASKS = {
  "order": "the others have two neighbouring bytes of it exchanged at one place",
  "continuation": "the others are from elsewhere in the text",
}


def items_of(ctx: _tunnel.Context, task: str) -> corpus.Rows:
  """Which of four answers is the real one? Rows of every option, the real one first."""
  tokens = ctx.corpus.heldout["text"]
  rng = np.random.default_rng(0)
  length = CONTEXT + ANSWER
  slots = np.arange(0, len(tokens) - length, length)
  ids = tokens[slots[:, None] + np.arange(length + 1)].astype(np.int32)
  changes = ids[:, -ANSWER + 1 :] != ids[:, -ANSWER:-1]  # where an exchange changes something
  usable = np.nonzero(changes.sum(1) >= CHOICES)[0]  # no answer of blanks
  chosen = rng.choice(usable, ITEMS, replace=False)
  ids = np.repeat(ids[chosen][:, None], CHOICES, axis=1)
  if task == "continuation":
    others = rng.integers(0, len(tokens) - ANSWER, (ITEMS, CHOICES - 1))
    ids[:, 1:, -ANSWER:] = tokens[others[..., None] + np.arange(ANSWER)]
  else:
    for options, change in zip(ids, changes[chosen], strict=True):
      places = rng.choice(np.nonzero(change)[0], CHOICES - 1, replace=False)
      for option, place in zip(options[1:, -ANSWER:], places, strict=True):
        option[[place, place + 1]] = option[[place + 1, place]]
  mask = np.zeros((ITEMS * CHOICES, length), np.float32)
  mask[:, -ANSWER:] = 1
  return corpus.Rows(ids.reshape(-1, length + 1), mask)


def _short_runs(ctx: _tunnel.Context, width: int, seed: int) -> list[plan.RunSpec]:
  """Runs below the law's budgets, so that the accuracies begin at chance."""

  def spec(steps: int) -> plan.RunSpec:
    schedule = plan.schedule(steps, warmup_steps=min(20, steps // 4))
    return plan.RunSpec(
      name=f"w{width}-s{seed}-short{steps}",
      model=ctx.model(width, base_width=min(ctx.scale.law_widths)),
      optim=_tunnel.adam(LR, schedule),
      num_steps=steps,
      seed=seed,
      data_seed=seed,
      save_steps=(steps,),
    )

  return plan.grid(spec, {"steps": ctx.scale.bench_lengths})


def scaling_bench(ctx: _tunnel.Context) -> report.Section:
  """Accuracy as a sigmoid of the conditional loss over the models of the suite "law"."""
  scale, section = ctx.scale, report.Section("ScalingBench: from loss to accuracy")
  runner, largest = ctx.runner("law"), max(scale.law_widths)
  models: list[plan.RunSpec] = []
  for seed in range(scale.law_seeds):
    for width in scale.law_widths:
      specs = [*law_plan(ctx, width, seed), *(_short_runs(ctx, width, seed))]
      runner.run(specs)
      # The largest model is predicted at the law's budgets; its short runs say nothing new.
      models += [s for s in specs[1:] if s.branch_from or width != largest]
  is_held = np.array([s.model.model_dim == largest for s in models])
  section.text(
    f"{ITEMS} items a task: {CONTEXT} bytes of held-out text, four answers of {ANSWER} bytes, one",
    "real; loss of the real one given the context, accuracy by likelihood, chance 25%. Fitted on",
    f"all models but those of width {largest}, which are predicted: by the sigmoid with its floor",
    f"at chance, and by a line. {len(models)} models, the shortest trained for",
    f"{min(s.num_steps for s in models)} steps. The standard error of an accuracy is",
    f"{math.sqrt(0.25 / ITEMS):.3f} at most. A first form of this suite (continuation alone, the",
    "law's models alone, 256 items) did not tell sigmoid (0.019) and line (0.019) apart; the order",
    "task and the short runs were added for a range from chance to near the ceiling, by accuracies",
    "of widths other than the held-out one.",
  )
  figure, axes = pictures.figure(len(TASKS))
  for axis, (task, about) in zip(axes, TASKS.items(), strict=True):
    rows = items_of(ctx, task)
    nats = [runner.score([spec], rows)[0].reshape(ITEMS, CHOICES) for spec in models]
    losses = np.array([n[:, 0].mean() / ANSWER for n in nats], np.float64)
    accuracies = np.array([np.mean(np.argmin(n, axis=1) == 0) for n in nats])
    found = bench.extrapolate(losses, accuracies, is_held, chance=1 / CHOICES, num_items=ITEMS)
    rank = float(np.corrcoef(losses.argsort().argsort(), accuracies.argsort().argsort())[0, 1])
    section.text(f"Task {task}: {about}.")
    section.table(
      ("seed", "width", "steps", "loss", "accuracy", "sigmoid", "held out"),
      [
        (
          *(s.seed, s.model.model_dim, s.num_steps),
          *(f"{x:.4f}", f"{y:.3f}", f"{float(found.fitted(x)):.3f}", "yes" if h else ""),
        )
        for s, x, y, h in zip(models, losses, accuracies, is_held, strict=True)
      ],
    )
    section.claim(
      f"{task}: the sigmoid predicts the held-out largest models better than a line",
      found.sigmoid_error < found.line_error,
      f"mean error {found.sigmoid_error:.4f}",
      f"line: {found.line_error:.4f}",
    )
    section.claim(
      f"{task}: lower conditional loss goes with higher accuracy",
      rank < -0.8,
      f"rank correlation {rank:.3f} over {len(models)} models",
    )
    for held, name in ((False, "fitted"), (True, "held out")):
      axis.plot(losses[is_held == held], accuracies[is_held == held], "o", label=name)
    line = np.linspace(losses.min() - 0.1, losses.max() + 0.1, 80)
    axis.plot(line, found.fitted(line), "k-", linewidth=0.8, label="sigmoid")
    axis.plot(line, np.polyval(found.line_coefficients, line), "k:", linewidth=0.8, label="line")
    axis.set(xlabel="conditional loss, nats per byte", ylabel="accuracy", title=task)
    axis.legend()
    section.data[task] = {
      "losses": losses.tolist(),
      "accuracies": accuracies.tolist(),
      "sigmoid": dataclasses.asdict(found.fitted),
    }
  section.picture("scalingbench", figure, "Accuracy against conditional loss")
  section.data["models"] = [(s.seed, s.model.model_dim, s.num_steps) for s in models]
  return section


# --- Batch size ----------------------------------------------------------------------------------


def batch(ctx: _tunnel.Context) -> report.Section:
  """Tokens to a loss over the batch size, its minimum by loss level (MiniCPM 3.2)."""
  scale, section = ctx.scale, report.Section("Optimal batch size")
  runner = ctx.runner("batch")

  def spec(width: int, rows: int, seed: int) -> plan.RunSpec:
    steps = scale.batch_tokens // (rows * _tunnel.SEQ_LEN)
    # The warm-up sees equally many tokens at every batch size; no loss inside it is read.
    warmup = max(1, min(20 * _tunnel.ROWS // rows, steps // 4))
    evals = np.unique(np.geomspace(max(steps // 40, 1.25 * warmup), steps, 14).astype(int))
    return plan.RunSpec(
      name=f"w{width}-b{rows}-s{seed}",
      model=ctx.model(width, base_width=min(scale.batch_widths)),
      optim=_tunnel.adam(0.01, plan.schedule(steps, decay_share=0, warmup_steps=warmup)),
      num_steps=steps,
      batch_size=rows,
      seed=seed,
      data_seed=seed,
      eval_steps=tuple(int(s) for s in evals),
    )

  axes = {"width": scale.batch_widths, "rows": scale.batch_rows, "seed": range(scale.seeds)}
  specs = plan.grid(spec, axes)
  results = runner.run(specs)
  section.text(
    f"Batches of {scale.batch_rows} rows of 64 bytes, base lr 0.01, constant after the warm-up,",
    f"{scale.batch_tokens:,} bytes each, {scale.seeds} seed(s). For every loss level a parabola in",
    "ln(batch) through ln(bytes needed).",
  )
  optima, rows, needs = [], [], {}
  for width in scale.batch_widths:
    for seed in range(scale.seeds):
      curves = {}
      for b in scale.batch_rows:
        run = spec(width, b, seed)
        found = results[run.name].losses["text"]
        steps = sorted(found)
        curves[b] = ([s * b * _tunnel.SEQ_LEN for s in steps], [found[s] for s in steps])
      low = max(min(losses) for _, losses in curves.values())
      high = min(losses[0] for _, losses in curves.values())
      for level in np.linspace(high - 0.1 * (high - low), low, 8):
        needed = {b: fit.tokens_to_loss(*curve, float(level)) for b, curve in curves.items()}
        usable = {b: t for b, t in needed.items() if t is not None}
        batches = [b * _tunnel.SEQ_LEN for b in usable]
        if (width, seed) == (scale.batch_widths[0], 0):
          needs[float(level)] = (batches, list(usable.values()))
        try:
          best = fit.optimal_batch(batches, list(usable.values()))
        except fit.FitError:
          continue
        optima.append((width, seed, float(level), best.x, best.is_inside))
        place = "" if best.is_inside else " (outside the batches run)"
        rows.append((width, seed, f"{level:.3f}", f"{best.x:,.0f}{place}", f"{best.y:,.0f}"))
  section.table(("width", "seed", "loss", "optimal batch, bytes", "bytes needed"), rows)
  inside = [(level, x) for _, _, level, x, is_inside in optima if is_inside]
  models = list(itertools.product(scale.batch_widths, range(scale.seeds)))
  slopes = []  # of the models with three minima inside the batches run
  for model in models:
    mine = [(lv, math.log(x)) for w, s, lv, x, is_inside in optima if (w, s) == model and is_inside]
    if len(mine) >= 3:
      slopes.append(float(np.polyfit(*zip(*mine, strict=True), 1)[0]))
  section.claim(
    "the optimal batch grows as the loss falls (sign only)",
    2 * len(slopes) >= len(models) and all(slope < 0 for slope in slopes),
    "d ln(batch) / d loss: " + ", ".join(f"{s:+.2f}" for s in slopes),
    f"{len(inside)} of {len(optima)} minima lie inside the batches run; the others are not used, "
    f"{len(models) - len(slopes)} of {len(models)} models have fewer than three and no slope",
  )
  if len(inside) >= 3:
    found = fit.fit_batch_law(*zip(*inside, strict=True))
    section.text(
      f"Line through all minima inside the range: bs = {found.coefficient:.3g} / L^"
      f"{found.exponent:.2f} (MiniCPM: 1.21e9 / L^6.24 on C4 and its tokens)."
    )
    section.data["law"] = dataclasses.asdict(found)
  _draw_batch(section, optima, needs)
  section.data["optima"] = optima
  return section


def _draw_batch(section: report.Section, optima: list[tuple], needs: dict) -> None:
  """Bytes needed against the batch for one model, and all minima against the loss."""
  figure, axes = pictures.figure(2)
  for level, (batches, needed) in needs.items():
    axes[0].plot(batches, needed, "o-", label=f"loss {level:.2f}")
  axes[0].set(xscale="log", yscale="log", xlabel="batch, bytes", ylabel="bytes needed")
  axes[0].legend(fontsize=7)
  for width in sorted({width for width, *_ in optima}):
    mine = [(level, x) for w, _, level, x, is_inside in optima if w == width and is_inside]
    if mine:
      axes[1].plot(*zip(*mine, strict=True), "o", label=f"width {width}")
  axes[1].set(xscale="log", yscale="log", xlabel="loss", ylabel="optimal batch, bytes")
  axes[1].legend()
  section.picture("batch", figure, "Bytes to a loss for the first model; minima inside the batches")
