"""Suites of recipes: StepLaw beside muP, two-stage data with its controls, the large run."""

import dataclasses

import numpy as np

from experiments import _flags, _tunnel, _tunnel_law
from minicpm_jax import config
from minicpm_jax.ckpt import run_config
from minicpm_jax.tunnel import corpus as corpus_lib
from minicpm_jax.tunnel import fit, plan, records, report, steplaw

# --- StepLaw beside muP --------------------------------------------------------------------------


def step_law(ctx: _tunnel.Context) -> report.Section:
  """MiniCPM4 table 3 at toy size: vanilla with StepLaw's rate and batch against muP."""
  scale, section = ctx.scale, report.Section("StepLaw beside muP")
  runner = ctx.runner("steplaw")
  base, items = min(scale.table_widths), _tunnel_law.items_of(ctx, "continuation")
  lrs = plan.log_grid(0.016, 2.0, 5)
  search_steps = min(scale.table_lengths)

  def search(lr: float) -> plan.RunSpec:
    schedule = plan.schedule(search_steps, warmup_steps=min(20, search_steps // 4))
    return plan.RunSpec(
      name=f"search-{lr:.4g}",
      model=ctx.model(base, base_width=base),
      optim=_tunnel.adam(lr, schedule),
      num_steps=search_steps,
    )

  searched = runner.run(plan.grid(search, {"lr": lrs}))
  cost = sum(r.cpu_seconds for r in searched.values())
  best = min(lrs, key=lambda lr: searched[search(lr).name].loss())

  def spec(width: int, length: int, kind: str, seed: int) -> plan.RunSpec:
    model = ctx.model(width, "matrix" if kind == "muP" else "sp", base_width=base)
    tokens = length * _tunnel.ROWS * _tunnel.SEQ_LEN
    rows, lr = _tunnel.ROWS, best
    if kind != "muP":
      found = steplaw.predict(plan.num_params(model), tokens, seq_len=_tunnel.SEQ_LEN)
      rows, lr = found.batch_sequences, found.learning_rate
    steps = max(4, round(tokens / (rows * _tunnel.SEQ_LEN)))
    schedule = plan.schedule(steps, warmup_steps=min(20, steps // 4))
    return plan.RunSpec(
      name=f"{kind}-w{width}-{length}-s{seed}",
      model=model,
      optim=_tunnel.adam(lr, schedule, is_mup=kind == "muP"),
      num_steps=steps,
      batch_size=rows,
      seed=seed,
      data_seed=seed,
      save_steps=(steps,),
    )

  kinds = ("vanilla", "muP")
  axes = {"width": scale.table_widths, "length": scale.table_lengths, "kind": kinds}
  specs = plan.grid(spec, {**axes, "seed": range(scale.seeds)})
  results = runner.run(specs)
  lm, scored = {}, {}
  for s in specs:
    lm[s.name] = results[s.name].loss()
    nats = runner.score([s], items)[0].reshape(-1, _tunnel_law.CHOICES)
    scored[s.name] = float(nats[:, 0].mean() / _tunnel_law.ANSWER)
  columns = [(w, n) for w in scale.table_widths for n in scale.table_lengths]

  def row(kind: str, values: dict[str, float]) -> list[str]:
    cells = []
    for width, length in columns:
      found = [values[spec(width, length, kind, s).name] for s in range(scale.seeds)]
      mean, spread = _tunnel.mean_and_spread(found)
      cells.append(f"{mean:.4f} ({spread / 2:.4f})")
    return cells

  shown = {kind: (row(kind, lm), row(kind, scored)) for kind in kinds}
  predicted = [
    steplaw.predict(
      plan.num_params(ctx.model(w)), n * _tunnel.ROWS * _tunnel.SEQ_LEN, seq_len=_tunnel.SEQ_LEN
    )
    for w, n in columns
  ]
  section.text(
    "Vanilla: no muP, learning rate and batch by StepLaw's formula, the batch rounded to 16 rows.",
    f"muP: base lr {best:g}, the best of {len(lrs)} on width {base}, {search_steps} steps, batch",
    f"of {_tunnel.ROWS} rows. Means of {scale.seeds} seed(s), half the spread in brackets. StepLaw",
    "was fitted on 60M parameters and more: these models are far outside.",
  )
  sizes = [f"{plan.num_params(ctx.model(w)):,}" for w, _ in columns]
  tokens = [f"{n * _tunnel.ROWS * _tunnel.SEQ_LEN:,}" for _, n in columns]
  section.table(
    ("", *sizes),
    [
      ("training bytes", *tokens),
      ("StepLaw lr", *(f"{p.learning_rate:.3g}" for p in predicted)),
      ("StepLaw batch, rows", *(str(p.batch_sequences) for p in predicted)),
      ("LM loss vanilla", *shown["vanilla"][0]),
      ("LM loss muP", *shown["muP"][0]),
      ("ScalingBench loss vanilla", *shown["vanilla"][1]),
      ("ScalingBench loss muP", *shown["muP"][1]),
    ],
  )
  mups = [
    [lm[spec(w, n, "muP", s).name] < lm[spec(w, n, "vanilla", s).name] for s in range(scale.seeds)]
    for w, n in columns
  ]
  section.text(
    f"Search cost: muP {cost:.1f} CPU seconds here (MiniCPM4: 32 GPU hours), StepLaw none here",
    "(its own study: a million GPU hours). MiniCPM4 found no consistent winner; here muP has the",
    f"lower loss in {sum(map(all, mups))} of {len(columns)} columns for every seed.",
  )
  section.data |= {"lm": lm, "scalingbench": scored, "search_seconds": cost, "mup_lr": best}
  return section


# --- Two stages ----------------------------------------------------------------------------------

TASK_SHARE, TASK_FLOOR = 0.3, 0.1  # of the decay's rows; end of decay / peak


def task_rows(seed: int, count: int, *, is_shuffled: bool = False) -> np.ndarray:
  """Rows of 65 bytes: four "Q: abcd A: wxyz" with a fixed permutation of the alphabet, and a Q.

  Shuffled: the answers belong to other questions.
  """
  letters = np.frombuffer(b"abcdefghijklmnopqrstuvwxyz", np.uint8)
  permutation = np.random.default_rng(2024).permutation(letters)
  rng = np.random.default_rng(seed)
  words = rng.integers(0, 26, (count * 4, 4))
  answers = rng.permutation(words) if is_shuffled else words
  parts = [
    np.tile(np.frombuffer(text, np.uint8), (count * 4, 1)) if isinstance(text, bytes) else text
    for text in (b"Q: ", letters[words], b" A: ", permutation[answers], b"\n")
  ]
  items = np.concatenate(parts, axis=1).reshape(count, -1)
  return np.concatenate([items, np.full((count, 1), ord("Q"), np.uint8)], 1).astype(np.int32)


def _answer_mask(count: int) -> np.ndarray:
  """1 where the target byte is a letter of an answer."""
  mask = np.zeros((count, 4, 16), np.float32)
  mask[:, :, 10:14] = 1  # predictions of bytes 11..14 of an item
  return mask.reshape(count, 64)


def stages(ctx: _tunnel.Context) -> report.Section:
  """A task mixed into the decay, only in SFT, in twice the SFT; shuffled labels as control."""
  scale, section = ctx.scale, report.Section("Two-stage data: the task in the decay or after it")
  total = scale.stage_steps
  decay = max(4, total // 5)
  sft = max(2, round(TASK_SHARE * decay))
  text = ctx.corpus.with_source("task", task_rows(0, 4000).reshape(-1), stride=65)
  text = text.with_source("shuffled", task_rows(0, 4000, is_shuffled=True).reshape(-1), stride=65)
  rows = {
    "text": text.heldout_rows("text", num_rows=_tunnel.HELDOUT_ROWS, seq_len=_tunnel.SEQ_LEN),
    "task": corpus_lib.Rows(task_rows(1, 256), _answer_mask(256)),
  }
  runner = ctx.runner("stages", text, **rows)
  schedule = plan.schedule(
    total, decay_share=decay / total, warmup_steps=min(20, total // 4), min_ratio=TASK_FLOOR
  )
  start = schedule.decay_start

  def phases(decay_task: str | None, sft_task: str | None):
    made = [config.PhaseConfig(name="stable", weights=(("text", 1.0),))]
    weights = (("text", 1.0),)
    if decay_task:
      weights = (("text", 1 - TASK_SHARE), (decay_task, TASK_SHARE))
    made.append(config.PhaseConfig(name="decay", start_step=start, weights=weights))
    if sft_task:
      made.append(config.PhaseConfig(name="sft", start_step=total, weights=((sft_task, 1.0),)))
    return tuple(made)

  arms = {  # name: (source mixed into the decay, source of SFT, SFT steps)
    "plain decay, no SFT": (None, None, 0),
    "plain decay + SFT": (None, "task", sft),
    "plain decay + twice the SFT": (None, "task", 2 * sft),
    "mixed decay, no SFT": ("task", None, 0),
    "mixed decay + SFT": ("task", "task", sft),
    "shuffled labels mixed + SFT": ("shuffled", "task", sft),
    "shuffled labels in both": ("shuffled", "shuffled", sft),
  }

  def plan_of(seed: int) -> list[plan.RunSpec]:
    trunk = plan.RunSpec(
      name=f"s{seed}-trunk",
      model=ctx.model(scale.wsd_width),
      optim=_tunnel.adam(0.02, dataclasses.replace(schedule, decay_steps=0)),
      num_steps=start,
      seed=seed,
      data_seed=seed,
      phases=phases(None, None)[:1],
      save_steps=(start,),
    )
    specs = [trunk]
    for name, (decay_task, sft_task, steps) in arms.items():
      specs.append(
        dataclasses.replace(
          trunk,
          name=f"s{seed}-{name.replace(' ', '-').replace(',', '').replace('+', 'and')}",
          optim=_tunnel.adam(0.02, schedule),  # after the decay its last rate holds
          num_steps=total + steps,
          phases=phases(decay_task, sft_task),
          branch_from=(trunk.name, start),
          save_steps=(),
        )
      )
    return specs

  plans = {seed: plan_of(seed) for seed in range(scale.seeds)}
  results = runner.run([spec for specs in plans.values() for spec in specs])
  found: dict[str, list[tuple[float, float]]] = {name: [] for name in arms}
  for specs in plans.values():
    for name, spec in zip(arms, specs[1:], strict=True):
      result = results[spec.name]
      found[name].append((result.loss("task"), result.loss("text")))
  section.text(
    f"Width {scale.wsd_width}, {start} stable steps of source code, {decay} of decay to",
    f"{TASK_FLOOR:.0%} of the peak, with {TASK_SHARE:.0%} of the rows from the task or none, then",
    f"SFT on the task alone at the last rate for {sft} steps. Mixed + SFT and twice the SFT see",
    "equally many task rows. Task: translate four letters by a fixed permutation, new words in the",
    f"test; chance is ln 26 = {np.log(26):.3f} nats a letter. {scale.seeds} seed(s).",
  )
  section.table(
    ("arm", "task loss", "by seed", "text loss"),
    [
      (
        name,
        f"{np.mean([t for t, _ in values]):.4f}",
        ", ".join(f"{t:.4f}" for t, _ in values),
        f"{np.mean([x for _, x in values]):.4f}",
      )
      for name, values in found.items()
    ],
  )

  def gaps(a: str, b: str) -> list[float]:
    return [x[0] - y[0] for x, y in zip(found[a], found[b], strict=True)]

  mixed = "mixed decay + SFT"
  for other in ("plain decay + SFT", "plain decay + twice the SFT"):
    difference = gaps(other, mixed)
    section.claim(
      f"mixing the task into the decay beats '{other}'",
      all(g > 0 for g in difference),
      f"task loss of the other minus mixed: {_tunnel.signed(difference)}",
      "shuffled labels mixed, minus plain decay + SFT: "
      + _tunnel.signed(gaps("shuffled labels mixed + SFT", "plain decay + SFT")),
    )
  control = gaps("shuffled labels in both", "plain decay, no SFT")
  chance = [t - float(np.log(26)) for t, _ in found["shuffled labels in both"]]
  section.claim(
    "control: shuffled labels teach no more than that answers are letters",
    all(c > -0.02 for c in chance),
    f"task loss minus ln 26: {_tunnel.signed(chance)}; minus no task at all: "
    f"{_tunnel.signed(control)}",
  )
  section.data["losses"] = found
  return section


# --- The large run -------------------------------------------------------------------------------


def write_plan(ctx: _tunnel.Context) -> report.Section:
  """config.py of a 0.5B run from what the finished suites found."""
  section = report.Section("The large run")
  base = _flags.load("minicpm4_0p5b")
  mup_runs = sorted((ctx.workdir / "mup" / "runs").glob("w*-matrix-*.json"))
  lr, source = base.optim.peak_lr, "the recipe's (no finished suite mup in this workdir)"
  if mup_runs:
    by_lr: dict[float, list[float]] = {}
    width = max(int(p.name.split("-")[0][1:]) for p in mup_runs)
    for path in (p for p in mup_runs if p.name.startswith(f"w{width}-")):
      spec, result = records.read_result(path)
      by_lr.setdefault(spec["optim"]["peak_lr"], []).append(result.loss())
    means = {rate: float(np.mean(values)) for rate, values in by_lr.items()}
    lr = min(means, key=means.get)
    source = f"the best of the suite mup at width {width}"
  # The batch law is C4's; a user with losses of his own data fits another (fit.fit_batch_law).
  expected = 2.5
  tokens = fit.PUBLISHED_BATCH_LAW.batch(expected)
  cfg = plan.large_run(base, tokens=100e9, peak_lr=lr, batch_tokens=tokens)
  path = run_config.write(
    ctx.workdir / "large_run",
    cfg,
    header=f"100B tokens; base lr {lr:g}: {source}; batch {tokens:.3g} tokens: "
    f"1.21e9 / {expected}^6.24.",
  )
  section.text(
    f"`{path}`: {cfg.model.name}, {cfg.num_steps:,} steps of",
    f"{cfg.data.batch_size * cfg.data.seq_len:,} tokens, base lr {lr:g} ({source}), WSD with",
    f"{cfg.optim.schedule.decay_steps:,} steps of decay. A learning rate of byte models of this",
    "size is a demonstration: search on your own mixture with models of 10M and more.",
  )
  section.data |= {"peak_lr": lr, "num_steps": cfg.num_steps, "rows": cfg.data.batch_size}
  return section
