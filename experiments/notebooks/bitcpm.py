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
# # BitCPM4: train ternary weights, ship them in three forms
#
# MiniCPM4 (section 3.3) trains in full precision first and then lets every forward pass see ternary
# weights: of each output channel's weights, `s = mean|W|` and `q = round(W/s)` clipped to -1, 0, 1.
# The gradient goes straight through to the floats behind ("latent" weights). A small model on the
# bytes of Python's own documentation goes through both stages here and is then packed.
# On Colab, clone the repository and install it first: `%pip install -e '.[quickstart,gguf]'`.

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

import jax
import jax.numpy as jnp
import matplotlib.pyplot as plt
import numpy as np

import minicpm_jax as mc
from experiments import _qat_study as study_lib
from minicpm_jax import config
from minicpm_jax.core import trees
from minicpm_jax.models import convert, transformer
from minicpm_jax.optim import schedules
from minicpm_jax.quant import qtensor, ternary

IS_TINY = os.environ.get("MINICPM_JAX_NOTEBOOK") == "tiny"
work = pathlib.Path(tempfile.mkdtemp(prefix="bitcpm-"))

# %% [markdown]
# ## Train: 60% in full precision, 40% ternary
# At the switch the learning rate warms up again, and Adam starts from zero.

# %%
# Widths are multiples of 256, the block of the ternary GGUF types.
size = study_lib.Size(
  steps=20 if IS_TINY else 300,
  rows=4 if IS_TINY else 16,
  eval_windows=32 if IS_TINY else 512,
  dim=256,
  layers=2,
)
study = study_lib.Study(size)
arm = study_lib.Arm("ternary", 0.4, config.QuantConfig(scheme="ternary", scale_dtype="f16"))
whole = schedules.schedule_arrays(study.cfg.optim.schedule, study.cfg.optim.peak_lr)
start = study.start_of(arm)
dense, log = study.train(study.initial(0), None, whole, seed=0, first=0, steps=start)
state, result, curves = study.switch(arm, dense, start, seed=0)
print(f"held out, nats a byte: {result['loss_at_switch']:.3f} when rounded without training, ")
print(f"  {result['heldout']:.3f} after ternary training")

# %%
figure, axes = plt.subplots(1, 3, figsize=(12, 3))
axes[0].plot(log["loss"], label="full precision")
axes[0].plot(np.arange(start, size.steps), curves["loss"], label="ternary")
axes[0].set(title="training loss", xlabel="step", ylabel="nats a byte")
axes[0].legend()
axes[1].plot(np.arange(start, size.steps), curves["zero_share"])
axes[1].axhline(0.31, linestyle="--", color="gray")  # a Gaussian: P(|x| < E|x| / 2)
axes[1].set(title="share of zeros", xlabel="step")
axes[2].plot(np.arange(start, size.steps), curves["flip_rate"])
axes[2].set(title="codes changed by one update", xlabel="step")
plt.show()

# %% [markdown]
# ## Three forms of one function
# *latent*: the floats behind, for more training (`qat` in config.json). *fused*: the ternary values
# as floats, which any runtime takes for an ordinary model. *packed*: four codes a byte.

# %%
cfg = size.model(arm.quant)
forms = {"latent": (cfg, state.params)}
forms["fused"] = convert.fuse(cfg, state.params)
forms["packed"] = convert.to_codes(cfg, state.params, "packed")
tokens = jnp.asarray(study.heldout[:4, :-1].astype(np.int32))
logits, nbytes = {}, {}
for name, (form, params) in forms.items():
  model = transformer.Transformer(form)
  logits[name] = jax.jit(model.apply)({"params": params}, tokens).logits
  kernels = {p: x for p, x in trees.flatten_paths(params, qtensor.is_qtensor).items()}
  nbytes[name] = sum(x.nbytes for p, x in kernels.items() if config.QuantConfig().selects(p))
for name in forms:
  off = float(jnp.max(jnp.abs(logits[name] - logits["latent"])))
  print(f"{name:7} {nbytes[name] / 1e3:9.1f} kB of projections, logits differ by {off:.1e}")
assert all(np.allclose(x, logits["latent"], atol=1e-4) for x in logits.values())

# %% [markdown]
# Quantising twice would shrink the scales by the share of zeros, so a fused checkpoint is refused
# where latent weights are expected; its codes can be recovered.

# %%
try:
  ternary.check_latent(arm.quant, forms["fused"][1])
except ternary.FusedWeightsError as error:
  print(str(error)[:120], "...")
gate = forms["fused"][1]["layers"]["mlp"]["gate"]["kernel"]
back = ternary.recover(gate, num_lead=1)
stored = qtensor.unpack(forms["packed"][1]["layers"]["mlp"]["gate"]["kernel"])
assert np.array_equal(back.codes, stored.codes)

# %% [markdown]
# ## Files
# A folder that transformers loads, and GGUF files for llama.cpp: F16, and TQ2_0 with 2.06 bits a
# weight (exact for one scale a channel).

# %%
fused_model = transformer.Transformer(forms["fused"][0])
mc.ckpt.save_hf(work / "fused", fused_model, forms["fused"][1])
mc.ckpt.save_hf(work / "latent", transformer.Transformer(cfg), state.params)
for kind in ("f16", "tq2_0"):
  mc.ckpt.save_gguf(work / f"{kind}.gguf", fused_model, forms["fused"][1], kind=kind)
files = {p.name: p for p in (*work.glob("*/model.safetensors"), *work.glob("*.gguf"))}
sizes = {
  "float32 (HF)": (work / "fused" / "model.safetensors").stat().st_size,
  "F16 GGUF": (work / "f16.gguf").stat().st_size,
  "TQ2_0 GGUF": (work / "tq2_0.gguf").stat().st_size,
}
for name, count in sizes.items():
  print(f"{name:14} {count / 1e3:9.1f} kB")

# %%
loaded, params, _ = mc.ckpt.load_gguf(work / "tq2_0.gguf")
found = jax.jit(loaded.apply)({"params": params}, tokens).logits
off = float(jnp.max(jnp.abs(found.astype(jnp.float32) - logits["fused"])))
print(f"TQ2_0 read back: logits differ by {off:.1e}")
figure, axis = plt.subplots(figsize=(5, 2))
axis.barh(list(sizes), [x / 1e3 for x in sizes.values()])
axis.set(xlabel="kB on disk")
plt.show()
