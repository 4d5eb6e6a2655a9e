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
# # Which blocks does a query read?
#
# InfLLM v2, the sparse attention of MiniCPM4 (arXiv 2506.07900 section 2.1, arXiv 2509.24663): keys
# are averaged over short windows, every group of query heads ranks blocks of keys by these means,
# and attends to the first block, the last few and the best of the rest. No parameter is added, so
# any trained model can be looked at this way. Here: a real text through a real model.
# On Colab, clone the repository and install it first: `%pip install -e '.[quickstart]'`.

# %%
import dataclasses
import json
import os
import pathlib
import sys
import time

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
from minicpm_jax import config
from minicpm_jax.core import fetch
from minicpm_jax.data import python_corpus
from minicpm_jax.infer import generate
from minicpm_jax.models import joined, transformer, zoo
from minicpm_jax.nn import rope, sparse_attention
from minicpm_jax.text import tokenizer
from pallas_kernels.flash import api as flash

tiny = os.environ.get("MINICPM_JAX_NOTEBOOK") == "tiny"  # how the test suite runs this notebook
length, layer = (256, 1) if tiny else (2048, 12)

# %% [markdown]
# ## A text and a model
# The text is a chapter of the Python language reference. The model is SmolLM2-135M (a Llama with 9
# query heads and 3 key heads, trained with full attention) where `python -m
# experiments.fetch_model` has put it; otherwise random weights, whose choices mean nothing.

# %%
text = max((d.text for d in python_corpus.documents_of("reference", "all")), key=len)
path = None if tiny else fetch.cached()
if path is not None:
  model, params, tok = mc.ckpt.load_gguf(path)
else:
  tok = tokenizer.train_bpe([text], vocab_size=512)
  model = transformer.Transformer(zoo.nano(vocab_size=512, num_layers=2, max_position=length))
  params = transformer.init_params(model, jax.random.key(0))
model, params = generate.for_decoding(model, params)  # one subtree a layer
params = joined.split_projections(model.cfg, params)  # queries and keys by name
tokens_BT = jnp.asarray(tok.encode(text)[:length])[None]
print(model.cfg.name, tokens_BT.shape, repr(tok.decode(tokens_BT[0, :40].tolist())))

# %% [markdown]
# Queries and keys of one layer, caught on their way and rotated as the layer does it.

# %%
_, caught = jax.jit(
  lambda p, t: model.apply(
    {"params": p},
    t,
    return_logits=False,
    capture_intermediates=lambda module, _: module.name in ("q", "k"),
    mutable=["intermediates"],
  )
)(params, tokens_BT)
attn = caught["intermediates"][f"layers_{layer}"]["attn"]
positions_BT = jnp.arange(tokens_BT.shape[1])[None]
cfg = model.cfg
tables = rope.tables(cfg.rope, cfg.rotary_dim, cfg.max_position, positions_BT)
q, k = (rope.apply_rope(attn[name]["__call__"][0], tables) for name in ("q", "k"))
print("queries", q.shape, "keys", k.shape)

# %% [markdown]
# ## The selected blocks
# A budget of a quarter of the text. Dark: what every query reads anyway (the first block and the
# local window); colour: what the scores chose. Each key head has its own choice.

# %%
blocks = length // 16
sparse = config.SparseAttentionConfig(
  kernel_size=8,
  kernel_stride=4,
  block_size=16,
  window_size=16 * (blocks // 16),
  topk=blocks // 4 - blocks // 16,
  dense_len=-1,
)
ids, counts = sparse_attention.select_blocks(q, k, sparse)
ids = np.asarray(ids[0])  # [key heads, queries, slots], -1 = none
heads, queries, _ = ids.shape
local = sparse.window_size // sparse.block_size
picture = np.zeros((heads, queries, blocks))
for h, t in np.ndindex(heads, queries):
  current = t // sparse.block_size
  for block in ids[h, t][ids[h, t] >= 0]:
    picture[h, t, block] = 1 if block == 0 or block >= current - local else 2
figure, axes = plt.subplots(1, heads, figsize=(3.2 * heads, 3.2), sharey=True, squeeze=False)
for h, axis in enumerate(axes[0]):
  axis.imshow(picture[h], aspect="auto", cmap="magma_r", interpolation="nearest")
  axis.set(xlabel="block of 16 tokens", title=f"key head {h}")
axes[0, 0].set_ylabel("query")
figure.tight_layout()

# %% [markdown]
# What one query reads: the last token of the text, and the start of the blocks that its first key
# head picked by score.

# %%
print("query:", repr(tok.decode(tokens_BT[0, -12:].tolist())))
chosen = [int(b) for b in np.flatnonzero(picture[0, -1] == 2)]
for block in chosen[:8]:
  piece = tokens_BT[0, 16 * block : 16 * block + 16].tolist()
  print(f"block {block:>4}: {tok.decode(piece)!r}")

# %% [markdown]
# ## Does the choice catch the attention?
# Share of the softmax mass of full attention that lies in the chosen blocks, against blocks drawn
# at random beside the same first and local ones, for several budgets.

# %%
rng = np.random.default_rng(0)
rows = np.arange(queries // 2, queries, 16)  # late queries, which leave something out
group = q.shape[2] // heads
q_rows = np.asarray(q[0])[rows].reshape(len(rows), heads, group, -1)
scores = np.einsum("thgd,shd->thgs", q_rows, np.asarray(k[0])) / np.sqrt(q.shape[-1])
scores = np.where(np.arange(queries) <= rows[:, None, None, None], scores, -np.inf)
mass = np.asarray(jax.nn.softmax(jnp.asarray(scores), axis=-1)).mean(axis=2)
mass = mass.reshape(len(rows), heads, blocks, 16).sum(axis=-1)  # [rows, key heads, blocks]
budgets, by_score, by_chance = [], [], []
for topk in sorted({2 + blocks // 32, blocks // 8, blocks // 4, blocks // 2}):
  lists, _ = sparse_attention.select_blocks(q, k, dataclasses.replace(sparse, topk=topk))
  lists = np.asarray(lists[0])
  found, random = [], []
  for i, t in enumerate(rows):
    current = t // 16
    forced = {0, *range(max(0, current - local), current + 1)}
    rest = [b for b in range(current + 1) if b not in forced]
    for h in range(heads):
      picks = set(lists[h, t].tolist()) - {-1}
      found.append(mass[i, h, sorted(picks)].sum())
      drawn = rng.choice(rest, len(picks) - len(forced), replace=False).astype(int).tolist()
      random.append(mass[i, h, sorted(forced | set(drawn))].sum())
  budgets.append((topk + local) * 16)
  by_score.append(np.mean(found))
  by_chance.append(np.mean(random))
plt.figure(figsize=(4.5, 3))
plt.plot(budgets, by_score, "o-", label="chosen by score")
plt.plot(budgets, by_chance, "s--", label="drawn at random")
plt.xlabel("visible tokens")
plt.ylabel("attention mass inside")
plt.ylim(0, 1.02)
plt.legend()
print([f"{n}: {a:.2f} / {b:.2f}" for n, a, b in zip(budgets, by_score, by_chance, strict=True)])

# %% [markdown]
# ## Time
# One forward of one layer on this machine, sparse against our dense attention. The work of full
# attention grows with the square of the length, that of stage 2 with the length, and stage 1 has a
# small square left. `benchmarks/results/sparse_cpu.json` holds longer rows, if it was recorded.

# %%
lengths = (256,) if tiny else (1024, 2048, 4096, 8192)
small = config.SparseAttentionConfig(
  window_size=512 if not tiny else 64, topk=16 if not tiny else 2, dense_len=-1, lse="coarse"
)
forms = {
  "dense": lambda q, k, v: flash.flash_attention(q, k, v),
  "sparse, 1536 visible tokens": lambda q, k, v: sparse_attention.infllm_attention(q, k, v, small),
}
plt.figure(figsize=(4.5, 3))
for name, form in forms.items():
  seconds = []
  for n in lengths:
    args = [jax.random.normal(jax.random.key(i), (1, n, c, 64)) for i, c in enumerate((16, 1, 1))]
    ready = jax.jit(form).lower(*args).compile()
    jax.block_until_ready(ready(*args))
    began = time.perf_counter()
    jax.block_until_ready(ready(*args))
    seconds.append(time.perf_counter() - began)
  plt.loglog(lengths, seconds, "o-", label=name)
recorded = root / "benchmarks" / "results" / "sparse_cpu.json"
if recorded.is_file():
  for row in json.loads(recorded.read_text())["rows"]:
    print(f"{row['length']:>6} tokens: dense / sparse CPU time {row['speedup_cpu']:.2f}")
plt.xlabel("tokens")
plt.ylabel("seconds")
plt.legend()
