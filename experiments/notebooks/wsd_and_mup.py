# ---
# jupyter:
#   jupytext:
#     formats: ipynb,py:percent
#     text_representation:
#       extension: .py
#       format_name: percent
#       format_version: '1.3'
#       jupytext_version: 1.19.6
#   kernelspec:
#     display_name: Python 3
#     language: python
#     name: python3
# ---

# %% [markdown]
# # WSD and muP: small runs that decide about large ones
#
# MiniCPM (arXiv 2404.06395) finds its learning rate on small models, because under muP the best one
# stays put when the width grows, and trains on a schedule without a horizon (warm-up, stable,
# decay), because a stable run can be annealed at any length. Both are measured here, on the source
# of Python's own library.
# On Colab, clone the repository and install it first: `%pip install -e '.[quickstart]'`.

# %%
import os
import pathlib
import sys
import tempfile

folders = [pathlib.Path.cwd(), *pathlib.Path.cwd().parents]
root = next((p for p in folders if (p / "configs" / "nano.py").is_file()), None)
if root is None:
  raise FileNotFoundError(f"{folders[0]}: found no minicpm_jax around it, %cd into a clone first")
sys.path.insert(0, str(root))

import matplotlib.pyplot as plt
import numpy as np

from minicpm_jax import config
from minicpm_jax.optim import schedules
from minicpm_jax.tunnel import corpus, fit, plan, run, steplaw

TINY = os.environ.get("MINICPM_JAX_NOTEBOOK") == "tiny"
STEPS, WIDTHS, LAYERS = (12, (16, 32), 1) if TINY else (300, (32, 64, 128), 2)
folder = pathlib.Path(tempfile.mkdtemp())

# %% [markdown]
# ## Data and a runner
# A small run reads windows of 64 bytes; which ones depends on (seed, step) only, so every run of a
# sweep sees the same text, and a branch sees what a fresh run would.

# %%
text = corpus.python_source(max_bytes=200_000 if TINY else 4_000_000)
held_out = text.heldout_rows("text", num_rows=32 if TINY else 512, seq_len=64)
runner = run.Runner(text, folder, {"text": held_out})


def small(width, mode):
  more = dict(vocab_size=text.vocab_size, base_width=min(WIDTHS), num_layers=LAYERS)
  return plan.small_model(width, mode, **more)


def spec(name, model, lr, schedule, is_mup=True, **more):
  optim = config.OptimConfig(peak_lr=lr, schedule=schedule, weight_decay=0.0, mup=is_mup)
  steps = schedule.total_steps
  return plan.RunSpec(name=name, model=model, optim=optim, num_steps=steps, **more)


# %% [markdown]
# ## muP: one learning rate for all widths
# muP in both readings of the embedding and the standard parameterisation of a width are one
# compiled program: the constants, the learning rate and the schedule are arguments of it.

# %%
lrs = (0.004, 0.016, 0.064) if TINY else (0.002, 0.004, 0.008, 0.016, 0.032, 0.064)
schedule = plan.schedule(STEPS, warmup_steps=min(20, STEPS // 4))


def sweep_spec(mode, width, lr):
  return spec(f"{mode}-{width}-{lr}", small(width, mode), lr, schedule, is_mup=mode != "sp")


points = plan.grid(sweep_spec, {"mode": ("matrix", "sp"), "width": WIDTHS, "lr": lrs})
found = runner.run(points)

fig, axes = plt.subplots(1, 2, figsize=(9, 3), sharey=True, layout="constrained")
for axis, mode in zip(axes, ("matrix", "sp"), strict=True):
  for width in WIDTHS:
    axis.plot(lrs, [found[f"{mode}-{width}-{lr}"].loss() for lr in lrs], "o-", label=width)
  axis.set(xscale="log", title={"matrix": "muP", "sp": "standard"}[mode], xlabel="learning rate")
axes[0].set_ylabel("nats per byte, held out")
axes[1].legend(title="width")
plt.show()

# %% [markdown]
# ## WSD: one stable run, annealed at every length
# The trunk is trained once; a branch starts from its checkpoint at the start of the decay.

# %%
lengths = (8, 12) if TINY else (100, 200, 400)
base = small(WIDTHS[0], "matrix")
warm = min(20, min(lengths) // 4)
flat = plan.schedule(max(lengths), decay_share=0, warmup_steps=warm)
trunk = spec("trunk", base, 0.02, flat, eval_steps=lengths)
decays = {str(n): plan.schedule(n, warmup_steps=warm) for n in lengths}
cosines = [
  spec(
    f"cosine-{n}",
    base,
    0.02,
    config.ScheduleConfig(kind="cosine", warmup_steps=warm, decay_steps=n - warm, min_ratio=0.1),
  )
  for n in lengths
]
found = runner.run([*plan.trunk_and_branches(trunk, decays), *cosines])
print("steps  constant  cosine(S)  WSD 10%")
for n in lengths:
  row = (found["trunk"].loss(step=n), found[f"cosine-{n}"].loss(), found[f"trunk-{n}"].loss())
  print(n, *(f"{x:.4f}" for x in row))
print("steps run:", sum(found[name].steps_run for name in found if name.startswith("trunk")))

# %%
steps = np.arange(max(lengths))
for n, decay in decays.items():
  arrays = schedules.schedule_arrays(decay, 0.02)
  plt.plot(steps[: int(n)], [schedules.learning_rate(s, arrays) for s in steps[: int(n)]], label=n)
plt.legend(title="horizon")
plt.xlabel("step")
plt.ylabel("learning rate")
plt.show()

# %% [markdown]
# ## Laws
# L(N, D) from such branches, with planted constants; the optimal ratio needs its compute.

# %%
law = fit.ScalingLaw(alpha=0.29, beta=0.23, c_n=0.1, c_d=0.45, floor=0.3)  # N, D in billions
n = np.repeat([0.04, 0.1, 0.3, 0.5, 1.0, 2.0], 6)
d = n * np.tile(np.arange(10, 70, 10), 6)
noise = np.random.default_rng(0).normal(0, 1e-3, len(n))
again = fit.fit_scaling_law(n, d, law.loss(n, d) + noise)
print(f"alpha {again.alpha:.3f}, beta {again.beta:.3f}, R^2 {again.r_squared:.5f}")
for compute in (6 * 0.5 * 20, 6 * 2.0 * 120):
  n_best, d_best = again.optimum(compute)
  print(f"C = {compute:.0f}e18: N {n_best:.2f}B, D {d_best:.0f}B, D/N {d_best / n_best:.0f}")
print("batch for a loss of 2.5:", f"{fit.PUBLISHED_BATCH_LAW.batch(2.5):.3g} tokens")
print("StepLaw, 0.5B on 100B:", steplaw.predict(0.5e9, 100e9, seq_len=4096))
