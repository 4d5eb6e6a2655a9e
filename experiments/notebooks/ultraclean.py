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
# # UltraClean: find good text, and prove that it is good
#
# MiniCPM4 (section 2.2.1) picks pretraining text with a fastText classifier and checks the choice
# by a short anneal of a nearly trained model. Both run here, on text that every Python carries: the
# language reference is the good text, and the crawl hides it among docstrings and advertising.
# On Colab, clone the repository and install it first: `%pip install -e '.[quickstart,data]'`.

# %%
import collections
import json
import os
import pathlib
import random
import sys
import tempfile

folders = [pathlib.Path.cwd(), *pathlib.Path.cwd().parents]
root = next((p for p in folders if (p / "configs" / "nano.py").is_file()), None)
if root is None:
  raise FileNotFoundError(f"{folders[0]}: found no minicpm_jax around it, %cd into a clone first")
sys.path.insert(0, str(root))

import matplotlib.pyplot as plt

from minicpm_jax import config
from minicpm_jax.core import logging
from minicpm_jax.data import (
  classifier,
  dedup,
  documents,
  executor,
  pii,
  python_corpus,
  rounds,
  scoring,
  seeds,
  shards,
  stats,
  ultraclean,
)
from minicpm_jax.models import zoo
from minicpm_jax.text import tokenizer
from minicpm_jax.train import loop
from minicpm_jax.tunnel import likelihood, verification

logging.quiet_libraries()
tiny = os.environ.get("MINICPM_JAX_NOTEBOOK") == "tiny"  # how the test suite runs this notebook
workdir = pathlib.Path(tempfile.mkdtemp(prefix="minicpm_ultraclean_"))

# %% [markdown]
# ## A crawl
# Paragraphs of the reference (half of them: the others are seeds), of docstrings, and pages that
# sell things. Some pages come twice, some carry a mail address.

# %%
rng = random.Random(0)
LIMIT = 60_000 if tiny else 400_000


def paragraphs(source, size=600):
  docs = python_corpus.documents_of(source, "all", max_bytes=LIMIT)
  return [d for d in seeds.pieces(docs, size) if len(d.text) > size // 2]


def advertisement(i):
  things = "watches phones shoes tickets insurance casino software pills".split()
  words = "best cheap free now limited offer click here save shipping order today win".split()
  text = " ".join(rng.choice([*words, rng.choice(things)]) for _ in range(90)).capitalize()
  return documents.Doc(id=f"shop/{i}", text=text + ". Write to sales@shop.io.", source="shop")


reference = paragraphs("reference")
good_seeds = [d for d in reference if documents.is_heldout(d.id, 400)]
hidden = [d for d in reference if not documents.is_heldout(d.id, 400)]
crawl = [*hidden, *paragraphs("docstrings"), *(advertisement(i) for i in range(len(hidden)))]
crawl += rng.sample(crawl, len(crawl) // 20)  # pages that come twice
crawl = [documents.Doc(id=f"{i}|{d.id}", text=d.text, source=d.source) for i, d in enumerate(crawl)]
rng.shuffle(crawl)
print({k: v for k, v in stats.collect(crawl).as_dict().items() if k in ("documents", "by_source")})

# %% [markdown]
# ## What the classifier reads
# One line per document: lower case, NFKD without combining marks, the pieces of a tokenizer apart,
# line feeds spelled out. The released models decode each piece on its own ("decode"), which makes
# one word of all rare characters; "bytes" keeps them apart.

# %%
tok = tokenizer.train_bpe((d.text for d in crawl), 1000)
text = "Naïve  CAFÉ\n\n\n\n文字"
for mode in ("decode", "bytes"):
  print(f"{mode:<8}{ultraclean.normalise(text, ultraclean.TokenizerSegmenter(tok, mode))}")
segmenter = ultraclean.TokenizerSegmenter(tok, "bytes")

# %% [markdown]
# ## Classifier and rounds
# Positives are the seeds, negatives a sample of the crawl itself (so some good pages are among
# them, as in practice). Each round trains, scores fresh text, and adds what it is sure of; it stops
# when verification gains less than `eps`. Here a round is verified by the share of its best
# decisions that are right, which we can know because the crawl is planted.

# %%
is_seed = {d.id for d in crawl if documents.is_heldout("negative" + d.id, 250)}
negatives = seeds.hash_order(d for d in crawl if d.id in is_seed)[: len(good_seeds)]
negatives, near = seeds.without_near(negatives, good_seeds)
rest = [d for d in crawl if d.id not in is_seed]
cfg = classifier.ClassifierConfig(dim=32, bucket=20_000, lr=1.0, epochs=5, min_count=2)


def train(positives, negatives):
  rows = [*classifier.rows(positives, True, segmenter)]
  rows += classifier.rows(negatives, False, segmenter)
  rng.shuffle(rows)
  return classifier.train(rows, cfg, segmenter)


def right_decisions(model, number):
  right = [
    (model.score(d.text) >= 0.5) == (d.source == "reference") for d in crawl[:: 1 + 4 * tiny]
  ]
  return 100 * sum(right) / len(right)


dev = [*classifier.rows(good_seeds[::5], True, segmenter)]
dev += classifier.rows((advertisement(-i) for i in range(1, 40)), False, segmenter)
result = rounds.run(
  [d for i, d in enumerate(good_seeds) if i % 5],
  negatives,
  fresh=lambda r: rest[r::4],
  train=train,
  dev_rows=dev,
  verify=right_decisions,
  cfg=rounds.RoundsConfig(max_rounds=2 if tiny else 3),
)
for r in result.rounds:
  print(
    f"round {r.number}: {r.value:.1f} % right, keeps {r.keep_rate:.2f}, dev {r.dev.accuracy:.3f}"
  )
print("stopped by", result.stopped, "- round", result.best, "stands")
model_path = workdir / classifier.file_name("en", "ultraclean")
result.classifier.save(model_path)

# %% [markdown]
# A model lies beside a sidecar that says how it must be read. Another piece mode is refused:

# %%
try:
  classifier.load(model_path, ultraclean.TokenizerSegmenter(tok, "decode"))
except classifier.ClassifierError as error:
  print(error)

# %% [markdown]
# ## The pipeline
# Stages run file by file; each shard is written whole or not at all, and a second run makes only
# what is missing. `experiments/ultraclean.py` is this pipeline with all filters, from the shell.

# %%
raw_file = workdir / "crawl.jsonl"
raw_file.write_text("".join(json.dumps({"id": d.id, "text": d.text}) + "\n" for d in rest))
quality = scoring.score_stage({"": model_path}, {"": segmenter})
scored = executor.run([raw_file], [pii.MaskPII(), quality], workdir / "scored", num_workers=0)
kept = list(executor.read_kept(scored.folder))
copies = dedup.write_removals(workdir / "duplicates.jsonl", dedup.exact(kept))
clean = executor.run(scored.parquet, [copies], workdir / "clean", num_workers=0)
print(scored.counts["dropped"], clean.counts["dropped"])
source_of = {d.id: d.source for d in crawl}
print("kept", collections.Counter(source_of[d.id] for d in executor.read_kept(clean.folder)))
print("crawl", collections.Counter(d.source for d in rest))

# %%
scores = collections.defaultdict(list)
for doc in kept:
  scores[source_of[doc.id]].append(doc.score)
for row in executor.read_drops(scored.folder):
  scores[source_of[row["id"]]].append(float(row["detail"]))
names = sorted(scores)
plt.figure(figsize=(6, 3))
plt.hist([scores[n] for n in names], bins=20, range=(0, 1), stacked=True, label=names)
plt.axvline(0.5, color="k", linestyle="--")
plt.xlabel("classifier score"), plt.ylabel("documents"), plt.legend()
plt.show()

# %% [markdown]
# ## Does it help? Efficient verification
# One stable run on the raw crawl. From its checkpoint two anneals of equal length: on the crawl,
# and with half of the rows replaced, at fixed places, by filtered text. All else is equal, so the
# difference in bits per byte of held-out good text is the data's; a paired bootstrap over documents
# decides. (A real run is 10B tokens on a 1B model, and decides by benchmarks.)

# %%
sources = {}
for name, docs in (("crawl", rest), ("filtered", executor.read_kept(clean.folder))):
  shards.prepare(docs, workdir / name, name=name, tokenizer=tok)
  sources[name] = config.SourceConfig(name=name, path=str(workdir / name))
stable, anneal = (8, 6) if tiny else (150, 60)
base = config.TrainConfig(
  name="base",
  model=zoo.nano(vocab_size=tok.vocab_size, mtp=None),
  optim=config.OptimConfig(
    peak_lr=0.02, schedule=config.ScheduleConfig(warmup_steps=5, stable_steps=stable)
  ),
  data=config.DataConfig(
    sources=(sources["crawl"],),
    phases=(config.PhaseConfig(weights=(("crawl", 1.0),)),),
    seq_len=128,
    batch_size=8,
  ),
  checkpoint=config.CheckpointConfig(every_steps=0),
  num_steps=stable,
)
loop.train(base, workdir / "base", tok=tok)

# %%
heldout = likelihood.text_set("reference", good_seeds[: 10 if tiny else 100])
report = verification.verify(
  verification.VerificationConfig(
    checkpoints=(f"{workdir / 'base'}@{stable}",),
    candidate=sources["filtered"],
    share=0.5,
    stage2_steps=anneal,
    max_epochs=50 if tiny else 4,
  ),
  workdir / "verification",
  tok,
  [heldout],
)
low, high = report["interval"]
print(
  f"{report['decision']}: {report['delta']:+.4f} bits per byte, 95 % in [{low:.4f}, {high:.4f}]"
)
