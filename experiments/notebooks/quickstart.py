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
# # minicpm_jax in ten minutes
#
# From text to a trained, exported, talking MiniCPM, on a CPU. Nothing is downloaded: the text is
# the language reference that every Python carries. On Colab, clone the repository and install it
# first: `%pip install -e '.[quickstart]'`, then restart the kernel in its folder.

# %%
import dataclasses
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

import minicpm_jax as mc
from configs import nano
from minicpm_jax import config
from minicpm_jax.core import logging
from minicpm_jax.data import python_corpus, shards
from minicpm_jax.infer import generate
from minicpm_jax.models import zoo
from minicpm_jax.optim import schedules
from minicpm_jax.text import tokenizer
from minicpm_jax.train import loop

logging.quiet_libraries()
tiny = os.environ.get("MINICPM_JAX_NOTEBOOK") == "tiny"  # how the test suite runs this notebook
num_steps = 20 if tiny else 300
workdir = pathlib.Path(tempfile.mkdtemp(prefix="minicpm_quickstart_"))

# %% [markdown]
# ## The family
# Every released member is a `ModelConfig`; parameter counts come from shapes alone.

# %%
for name in ("minicpm_2b", "minicpm_moe_8x2b", "minicpm4_0p5b", "minicpm4_8b", "minicpm3_4b"):
  print(f"{name:<18}{zoo.param_counts(zoo.ZOO[name]()).total:>16,} parameters")

# %% [markdown]
# ## Text to tokens
# A byte-level BPE tokenizer, then tokenised shards with an index.

# %%
docs = list(python_corpus.documents_of("reference", "train"))
heldout = list(python_corpus.documents_of("reference", "heldout"))
tok = tokenizer.train_bpe((d.text for d in docs), vocab_size=1024)
tok.save(workdir / "run" / "tokenizer")
for name, part in (("text", docs), ("heldout", heldout)):
  index = shards.prepare(part, workdir / name, name=name, tokenizer=tok)
  print(f"{name}: {index.num_documents} documents, {index.num_tokens:,} tokens")
print(tok.encode("The with statement"), repr(tok.decode(tok.encode("The with statement"))))

# %% [markdown]
# ## WSD: one trunk, decay when you like
# Warm-up, stable, decay (MiniCPM §4.2). The boundaries are data of the compiled step, so another
# branch compiles nothing new.

# %%
base = nano.get_config(f"steps={num_steps}")
for share in (0.1, 0.2, 0.4):
  decay = int(share * num_steps)
  stable = num_steps - decay - base.optim.schedule.warmup_steps
  wsd = dataclasses.replace(base.optim.schedule, stable_steps=stable, decay_steps=decay)
  arrays = schedules.schedule_arrays(wsd, base.optim.peak_lr)
  rates = jax.vmap(schedules.learning_rate, (0, None))(jnp.arange(num_steps), arrays)
  plt.plot(rates, label=f"decay {share:.0%}")
plt.xlabel("step"), plt.ylabel("learning rate"), plt.legend(), plt.show()

# %% [markdown]
# ## Train
# A nano MiniCPM4 with the multi-token-prediction head. Starting the cell again resumes the run.

# %%
cfg = dataclasses.replace(
  base,
  name="notebook",
  model=dataclasses.replace(
    base.model, vocab_size=tok.vocab_size, bos_id=tok.bos_id, stop_ids=tuple(tok.stop_ids)
  ),
  data=dataclasses.replace(
    base.data,
    sources=tuple(config.SourceConfig(name=n, path=str(workdir / n)) for n in ("text", "heldout")),
    phases=(config.PhaseConfig(weights=(("text", 1.0),)),),
    seq_len=64 if tiny else 256,
  ),
  eval_sources=("heldout",),
  eval_batches=2 if tiny else 0,
  log_every=max(num_steps // 10, 1),
)
result = loop.train(cfg, workdir / "run")
print({k: round(v, 3) for k, v in result.values.items() if "bits_per_byte" in k})

# %%
rows = [r for r in logging.read_metrics(workdir / "run") if "loss" in r]
plt.plot([r["step"] for r in rows], [r["loss"] for r in rows])
plt.axvline(cfg.optim.schedule.decay_start, ls="--", color="grey")
plt.xlabel("step"), plt.ylabel("nats per token"), plt.title("decay starts at the dashed line")
plt.show()

# %% [markdown]
# ## Export, reload, compare
# A Hugging Face folder: safetensors, config.json, tokenizer files.

# %%
model, params, tok = mc.ckpt.load_run(workdir / "run")
mc.ckpt.save_hf(workdir / "hf", model, params, tok)
again, params_again, tok = mc.ckpt.load_hf(workdir / "hf")
tokens_BT = jnp.asarray([tok.encode("The try statement specifies")])
logits = model.apply({"params": params}, tokens_BT).logits
logits_again = again.apply({"params": params_again}, tokens_BT).logits
difference = float(jnp.max(jnp.abs(logits - logits_again)))
print(sorted(p.name for p in (workdir / "hf").iterdir()), "largest difference:", difference)
assert difference <= 1e-4

# %% [markdown]
# ## Generate
# The low level stays open (`model.apply`); `generate` is the jitted decode loop on top of it.

# %%
decoder = generate.for_decoding(again, params_again)
prompts = ["The ", "A class ", "If the "]
for sampling in (
  config.SamplingConfig(max_new_tokens=24),
  config.SamplingConfig(max_new_tokens=24, temperature=0.8, top_p=0.95),
):
  out = generate.generate(
    *decoder, [tok.encode(p, add_bos=True) for p in prompts], sampling, stop_ids=tok.stop_ids
  )
  for prompt, ids in zip(prompts, out.tokens, strict=True):
    print(repr(prompt + tok.decode(ids)))

# %% [markdown]
# ## A real model
# `python -m experiments.fetch_model` puts SmolLM2-135M-Instruct (Llama family) into your cache
# folder; then:
#
# ```python
# from minicpm_jax.core import fetch
# model, params, tok = mc.ckpt.load_gguf(fetch.cached())
# print(mc.infer.Chat(model, params, tok).say("What is the capital of France?"))
# ```
