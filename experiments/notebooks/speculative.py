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
# # Speculative decoding
# A cheap draft proposes a tree of tokens, one forward of the target checks all of them, and the
# output is what plain decoding would have written, token for token (MiniCPM4 §4.1). Here the draft
# is the multi-token-prediction module of pretraining: it drafts without any training of its own.
# On Colab, clone the repository and install it first: `%pip install -e '.[quickstart]'`.

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
import numpy as np

from configs import nano
from minicpm_jax import ckpt, config
from minicpm_jax.data import python_corpus, shards
from minicpm_jax.infer import engine, frspec, generate
from minicpm_jax.infer.drafters import base, mtp, ngram
from minicpm_jax.models import transformer
from minicpm_jax.text import tokenizer
from minicpm_jax.train import loop

tiny = os.environ.get("MINICPM_JAX_NOTEBOOK") == "tiny"  # how the test suite runs this notebook
num_steps = 20 if tiny else 600
workdir = pathlib.Path(tempfile.mkdtemp(prefix="minicpm_speculative_"))
if tiny:
  jax.config.update("jax_optimization_level", "O0")  # compiling is most of its time

# %% [markdown]
# ## A target with an MTP module
# A nano MiniCPM4 on Python's language reference; the last documents are held out.

# %%
docs = list(python_corpus.documents_of("reference", "train"))
heldout = [d.text for d in python_corpus.documents_of("reference", "heldout")]
tok = tokenizer.train_bpe(
  (d.text for d in docs[: 5 if tiny else None]), vocab_size=512 if tiny else 1024
)
tok.save(workdir / "run" / "tokenizer")
if not tiny:
  shards.prepare(docs, workdir / "text", name="text", tokenizer=tok)
base_cfg = nano.get_config(f"steps={num_steps}")
small = dict(num_layers=1, model_dim=32, mlp_dim=64, num_heads=2) if tiny else {}
cfg = dataclasses.replace(
  base_cfg,
  model=dataclasses.replace(
    base_cfg.model,
    vocab_size=tok.vocab_size,
    bos_id=tok.bos_id,
    stop_ids=tuple(tok.stop_ids),
    **small,
  ),
  data=dataclasses.replace(
    base_cfg.data,
    sources=(config.SourceConfig(name="text", path=str(workdir / "text")),),
    phases=(config.PhaseConfig(weights=(("text", 1.0),)),),
    seq_len=64 if tiny else 256,
  ),
  eval_sources=(),
  log_every=max(num_steps // 5, 1),
)
if tiny:  # random weights: nothing is accepted for long, and nothing else changes
  model = transformer.Transformer(cfg.model)
  params = transformer.init_params(model, jax.random.key(0))
else:
  loop.train(cfg, workdir / "run")
  model, params, tok = ckpt.load_run(workdir / "run")
model, params = generate.for_decoding(model, params)

# %% [markdown]
# ## One tree
# The draft grows `num_levels` levels from the `top_k` best nodes of the level before; of all
# candidates the best `num_nodes - 1` by cumulative log-probability form the tree (EAGLE-2). A node
# is accepted if it is what the target says after its parent, and its parent was accepted.

# %%
sizes = dict(num_levels=2 if tiny else 3, top_k=4, num_nodes=12)
drafter, draft_params = mtp.make(model, params, **sizes)
both = base.Params(params, draft_params)
prompt = tok.encode(heldout[0])[:33]
forward = jax.jit(lambda p, tokens_BT: model.apply({"params": p}, tokens_BT))


def tree_after(ids):
  """The draft's tree behind ids[:-1], with ids[-1] as its root."""
  T = len(ids) - 1
  new = base.Committed(
    tokens_BT=jnp.asarray([ids[:-1]]),
    next_BT=jnp.asarray([ids[1:]]),
    features_BTD=forward(params, jnp.asarray([ids[:-1]])).hidden,
    start_B=jnp.zeros(1, jnp.int32),
    num_B=jnp.full(1, T, jnp.int32),
  )
  state = jax.jit(drafter.commit)(both, drafter.init_state(model, both, 1, 64), new)
  root, length = jnp.asarray(ids[-1:], jnp.int32), jnp.full(1, T, jnp.int32)
  return jax.tree.map(
    lambda x: np.asarray(x[0]), jax.jit(drafter.draft)(both, state, root, length)[0]
  )


tree = tree_after(prompt)
paths = []
for node in range(sizes["num_nodes"]):
  on_path = [int(j) for j in np.flatnonzero(tree.anc_BPP[node])]
  paths.append(sorted(on_path, key=lambda j: tree.depth_BP[j]))
rows = np.zeros((len(paths), len(prompt) + sizes["num_levels"]), np.int32)
for row, path in zip(rows, paths, strict=True):
  ids = prompt[:-1] + [int(tree.tok_BP[j]) for j in path]
  row[: len(ids)] = ids
choice = np.asarray(jnp.argmax(forward(params, jnp.asarray(rows)).logits, -1))
says = [int(choice[n, len(prompt) + tree.depth_BP[n] - 1]) for n in range(len(paths))]
accepted = [True] + [False] * (len(paths) - 1)
for node in range(1, len(paths)):
  parent = tree.parent_BP[node]
  accepted[node] = accepted[parent] and int(tree.tok_BP[node]) == says[parent]

# %%
height = {}
for depth in range(sizes["num_levels"] + 1):
  level = [n for n in range(len(paths)) if tree.depth_BP[n] == depth]
  for i, node in enumerate(level):
    height[node] = (len(level) - 1) / 2 - i
fig, ax = plt.subplots(figsize=(9, 4))
for node in range(len(paths)):
  x, y = tree.depth_BP[node], height[node]
  if node:
    parent = tree.parent_BP[node]
    ax.plot([tree.depth_BP[parent], x], [height[parent], y], color="lightgrey", zorder=0)
  face = "palegreen" if accepted[node] else "white"
  ax.text(
    x, y, repr(tok.decode([int(tree.tok_BP[node])])), ha="center", va="center",
    bbox=dict(boxstyle="round", facecolor=face),
  )  # fmt: skip
ax.set(
  xlim=(-0.4, sizes["num_levels"] + 0.4), ylim=(min(height.values()) - 1, max(height.values()) + 1)
)
ax.set_title(f"green: accepted. {tok.decode(prompt[-8:])!r} -> {tok.decode([says[0]])!r} ...")
ax.axis("off")
plt.show()

# %% [markdown]
# ## Accept length and speed on held-out text
# Greedy and at temperature 0.8; the tokens are compared with plain decoding's. FR-Spec lets the
# draft score only the 25% most frequent tokens of the training text.

# %%
counts = frspec.count_tokens((tok.encode(d.text) for d in docs[:40]), tok.vocab_size)
fr_ids = frspec.build_index(counts, tok.vocab_size // 4, frspec.forced_ids(tok))
print(f"a quarter of the vocabulary covers {frspec.coverage(counts, fr_ids):.1%} of the text")
named = {"plain": (None, ()), "MTP": (drafter, draft_params)}
if not tiny:
  named["MTP, FR"] = mtp.make(model, params, fr_ids=fr_ids, **sizes)
  named["n-gram"] = (ngram.NGramDrafter(num_levels=3), ())
prompts = [tok.encode(text)[:32] for text in heldout[:2] if len(text) > 200]
samplings = [config.SamplingConfig(max_new_tokens=12 if tiny else 96)]
samplings.append(dataclasses.replace(samplings[0], temperature=0.8, seed=1))
lengths, speeds, plain = {}, {}, {}
for name, (one, weights) in named.items():
  runner = engine.Engine(
    model, params, config.EngineConfig(capacity=160), drafter=one, draft_params=weights
  )
  for sampling in samplings:
    out = runner.generate(prompts, sampling)
    key = (name, sampling.temperature)
    lengths[key] = np.mean([n for stats in out.stats for n in stats.accepted])
    seconds = sum(stats.decode_seconds for stats in out.stats)
    speeds[key] = sum(len(tokens) - 1 for tokens in out.tokens) / seconds
    if name == "plain":
      plain[sampling.temperature] = out.tokens
    assert out.tokens == plain[sampling.temperature]
    print(f"{name:<8} T={sampling.temperature}: {lengths[key]:.2f} tokens a round")

# %%
fig, axes = plt.subplots(1, 2, figsize=(9, 3), sharey=True)
labels = [f"{name}, T={temperature}" for name, temperature in lengths]
axes[0].barh(labels, list(lengths.values()))
axes[0].set(xlabel="mean accept length")
axes[1].barh(labels, list(speeds.values()), color="tab:orange")
axes[1].set(xlabel="tokens a second (small models gain little: a round is not memory bound)")
axes[0].invert_yaxis()
fig.tight_layout()
plt.show()

# %% [markdown]
# ## A trained draft
# ```
# python -m experiments.distill_draft --target=RUN --kind=eagle3 --draft_vocab=25% \
#   --data=text:DATA --workdir=runs/eagle3 --regenerate=1000 --set optim.peak_lr=2e-3
# python -m experiments.bench_drafts --target=RUN --prompts=HELD --draft=eagle3:runs/eagle3/draft
# ```
