"""The steps of `experiments.quickstart`, each one call into the library."""

import dataclasses
import hashlib
import pathlib
import sys
from collections.abc import Iterable

import jax
import jax.numpy as jnp
import numpy as np

import minicpm_jax as mc
from configs import nano
from experiments import _baselines
from minicpm_jax import config
from minicpm_jax.core import files, pictures
from minicpm_jax.core import logging as logging_lib
from minicpm_jax.data import documents, python_corpus, shards
from minicpm_jax.infer import generate
from minicpm_jax.text import tokenizer
from minicpm_jax.train import loop

DEFAULT_STEPS = 900
DECAY_SHARE = 0.2  # of all steps; 10% suffices for long runs (MiniCPM section 4.3)
TOKENIZER_BYTES = 4 << 20  # the tokenizer is trained on this much text
BASELINE_BYTES = 96 << 20  # and the n-gram model on at most this much
HELDOUT_BYTES = 160_000  # evaluated text of every source, about
MIN_BYTES = 10_000  # a corpus smaller than this is refused
# No spaces at the end: they belong to the next word's token.
PYTHON_PROMPTS = ("The", "Return the", "def", "import", "This function", "class")


class Run:
  """Where things go, and a list of what was written for the closing lines."""

  def __init__(self, workdir: str):
    self.workdir = pathlib.Path(workdir).absolute()
    self.report: dict[str, object] = {}

  def say(self, text: str) -> None:
    print(f"\n== {text}", flush=True)

  def tell(self, text: str) -> None:
    print(f"   {text}", flush=True)

  def finish(self, seconds: float) -> None:
    path = self.workdir / "report.json"
    self.report["seconds"] = round(seconds, 1)
    files.write_json(path, self.report)
    self.say(f"done in {seconds / 60:.1f} minutes")
    for what, name in (
      ("numbers", "report.json"),
      ("loss curve", "loss.png"),
      ("checkpoints and metrics", "train"),
      ("Hugging Face folder", "hf"),
      ("tokenizer", "train/tokenizer"),
      ("tokenised shards", "shards"),
    ):
      self.tell(f"{what:<24}{self.workdir / name}")
    self.tell("more text:")
    self.tell(
      f"  {sys.executable} -m experiments.generate --raw --model={self.workdir / 'hf'} "
      "--prompt=def --temperature=0.8"
    )


@dataclasses.dataclass(frozen=True)
class Corpus:
  """Documents by source; every source has a held-out part that is never trained on."""

  train: dict[str, list[documents.Doc]]
  heldout: dict[str, list[documents.Doc]]
  stable: tuple[tuple[str, float], ...]  # share of rows of every source
  decay: tuple[tuple[str, float], ...]
  prompts: tuple[str, ...]

  def text(self, parts: Iterable[list[documents.Doc]], limit: int) -> bytes:
    """The documents' bytes, taken in turns from every source, about `limit` of them."""
    parts = [list(p) for p in parts]
    share = limit // max(len(parts), 1)
    out = []
    for part in parts:
      size = 0
      for doc in part:
        out.append(doc.text.encode())
        size += len(out[-1])
        if size >= share:
          break
    return b"\n".join(out)


def read_corpus(run: Run, data: str | None, decay_data: str | None) -> Corpus:
  """Python's own text, or the user's."""
  if data is None:
    if decay_data is not None:
      raise ValueError("--decay_data: given without --data")
    sources = {n: list(python_corpus.documents_of(n, "all")) for n in python_corpus.SOURCES}
    # Mostly code first; the decay stage turns to the reference and the docstrings.
    stable = (("source", 0.7), ("docstrings", 0.2), ("reference", 0.1))
    decay = (("source", 0.3), ("docstrings", 0.4), ("reference", 0.3))
    prompts = PYTHON_PROMPTS
  else:
    sources = {"text": list(documents.deduplicate(documents.read([data])))}
    stable = decay = (("text", 1.0),)
    if decay_data is not None:
      sources["better"] = list(documents.deduplicate(documents.read([decay_data])))
      decay = (("text", 0.5), ("better", 0.5))
    prompts = ()
  train, heldout = {}, {}
  for name, docs in sources.items():
    train[name], heldout[name] = _split(name, docs)
    size = sum(len(d.text.encode()) for d in docs)
    run.tell(
      f"{name:<12}{size / 2**20:7.2f} MiB in {len(docs):,} documents, "
      f"{len(heldout[name]):,} held out"
    )
  if not prompts:
    first = next(iter(heldout.values()))
    prompts = tuple(" ".join(d.text.split()[:4]) for d in first[:4])
  return Corpus(train=train, heldout=heldout, stable=stable, decay=decay, prompts=prompts)


def _split(name: str, docs: list[documents.Doc]) -> tuple[list[documents.Doc], list[documents.Doc]]:
  """(train, held out), by hash. Python's modules fall on one side with docstrings and source; of a
  user's documents the first 2% of the bytes in hash order are held out, of a single one the end.
  """
  size = sum(len(d.text.encode()) for d in docs)
  if size < MIN_BYTES:
    raise documents.CorpusError(f"corpus {name}: found {size} bytes of text, expected {MIN_BYTES}")
  if "key" in docs[0].meta:
    permille = python_corpus.HELDOUT_PERMILLE
    heldout = [d for d in docs if documents.is_heldout(d.meta["key"], permille)]
    heldout = _first_bytes(heldout, HELDOUT_BYTES)
  elif len(docs) == 1:
    text, cut = docs[0].text, len(docs[0].text) * 49 // 50
    heldout = [dataclasses.replace(docs[0], id=docs[0].id + "/end", text=text[cut:])]
    docs = [dataclasses.replace(docs[0], id=docs[0].id + "/start", text=text[:cut])]
  else:
    shuffled = sorted(docs, key=lambda d: hashlib.sha1(d.id.encode()).digest())
    heldout = _first_bytes(shuffled[:-1], min(size // 50, HELDOUT_BYTES))
  ids = {d.id for d in heldout}
  return [d for d in docs if d.id not in ids], heldout


def _first_bytes(docs: list[documents.Doc], limit: int) -> list[documents.Doc]:
  """Documents from the start until `limit` bytes are reached; one of a quarter or more is passed
  over, so that several are there, unless there is no other.
  """
  sizes = {d.id: len(d.text.encode()) for d in docs}
  size, kept = 0, []
  for doc in [d for d in docs if sizes[d.id] <= limit // 4] or docs[:1]:
    kept.append(doc)
    size += sizes[doc.id]
    if size >= limit:
      break
  return kept


def make_tokenizer(run: Run, corpus: Corpus, vocab_size: int) -> tokenizer.Tokenizer:
  """Byte-level BPE on a sample of the training text, kept in `train/tokenizer`."""
  folder = run.workdir / "train" / "tokenizer"
  tok = tokenizer.load_tokenizer(folder) if folder.is_dir() else None
  if tok is None:
    text = corpus.text(corpus.train.values(), TOKENIZER_BYTES).decode()
    tok = tokenizer.train_bpe(text.splitlines(keepends=True), vocab_size)
    folder.mkdir(parents=True, exist_ok=True)
    tok.save(folder)
  sample = corpus.text(corpus.heldout.values(), 1 << 18).decode()
  run.tell(
    f"{tok.vocab_size} ids, {len(sample.encode()) / len(tok.encode(sample)):.2f} bytes a token"
  )
  return tok


def write_shards(run: Run, corpus: Corpus, tok: tokenizer.Tokenizer) -> dict[str, shards.Index]:
  """One shard folder per source and per held-out part."""
  indices = {}
  for suffix, parts in (("", corpus.train), ("_heldout", corpus.heldout)):
    for i, (name, docs) in enumerate(parts.items()):
      name = name + suffix
      folder = run.workdir / "shards" / name
      indices[name] = shards.prepare(docs, folder, name=name, tokenizer=tok, source_id=i)
      run.tell(f"{name:<20}{indices[name].num_tokens:>10,} tokens")
  return indices


def make_config(
  run: Run,
  corpus: Corpus,
  tok: tokenizer.Tokenizer,
  num_steps: int,
  assignments: list[str],
) -> config.TrainConfig:
  """configs/nano.py with this corpus, this tokenizer and `num_steps`; then the --set overrides.

  All held-out text is evaluated, at every fifth of the run.
  """
  cfg = nano.get_config(f"steps={num_steps}")
  decay_steps = round(DECAY_SHARE * num_steps)
  schedule = dataclasses.replace(
    cfg.optim.schedule,
    warmup_steps=min(cfg.optim.schedule.warmup_steps, num_steps // 10),
    stable_steps=0,
    decay_steps=decay_steps,
  )
  stable_steps = num_steps - decay_steps - schedule.warmup_steps
  schedule = dataclasses.replace(schedule, stable_steps=stable_steps)
  heldout = tuple(f"{name}_heldout" for name in corpus.heldout)
  sources = [*corpus.train, *heldout]
  cfg = dataclasses.replace(
    cfg,
    name="quickstart",
    num_steps=num_steps,
    model=dataclasses.replace(
      cfg.model, vocab_size=tok.vocab_size, bos_id=tok.bos_id, stop_ids=tuple(tok.stop_ids)
    ),
    optim=dataclasses.replace(cfg.optim, schedule=schedule),
    data=dataclasses.replace(
      cfg.data,
      sources=tuple(
        config.SourceConfig(name=n, path=str(run.workdir / "shards" / n)) for n in sources
      ),
      phases=(
        config.PhaseConfig(name="stable", start_step=0, weights=corpus.stable),
        config.PhaseConfig(name="decay", start_step=schedule.decay_start, weights=corpus.decay),
      ),
    ),
    eval_sources=heldout,
    eval_every=max(num_steps // 5, 1),
    eval_batches=0,
    log_every=max(num_steps // 50, 1),
    checkpoint=dataclasses.replace(cfg.checkpoint, every_steps=max(num_steps // 5, 1)),
  )
  return config.overrides(cfg, assignments)


def pause_step(cfg: config.TrainConfig) -> int:
  """Where part one ends: inside the stable stage."""
  return max(cfg.optim.schedule.decay_start // 2, 1)


def train_first_part(run: Run, cfg: config.TrainConfig) -> None:
  """Trains to the pause and leaves a checkpoint; nothing to do where it has been passed."""
  loop.train_to_end(dataclasses.replace(cfg, num_steps=pause_step(cfg)), run.workdir / "train")


def train_to_the_end(run: Run, cfg: config.TrainConfig) -> dict[str, float]:
  """Resumes parameters, optimiser and data position; returns the last held-out values."""
  loop.train_to_end(cfg, run.workdir / "train")
  rows = logging_lib.read_metrics(run.workdir / "train")
  last = [r for r in rows if r["step"] == cfg.num_steps and any(k.startswith("eval/") for k in r)]
  return {k: v for k, v in last[-1].items() if k.startswith("eval/")}


def plot_losses(run: Run, cfg: config.TrainConfig) -> None:
  """loss.png: training loss, held-out loss and learning rate over the steps."""
  rows = logging_lib.read_metrics(run.workdir / "train")
  steps_of = [r for r in rows if "loss" in r]
  fig, (ax,) = pictures.figure(width=9, height=5)
  ax.plot([r["step"] for r in steps_of], [r["loss"] for r in steps_of], lw=1, label="training loss")
  for name in cfg.eval_sources:
    key = f"eval/{name}/loss"
    points = [(r["step"], r[key]) for r in rows if key in r]
    ax.plot(
      *zip(*points, strict=True), "o-", ms=4, label=f"held out: {name.removesuffix('_heldout')}"
    )
  start = cfg.optim.schedule.decay_start
  ax.axvline(start, color="grey", ls="--", lw=1)
  ax.annotate("decay", (start, ax.get_ylim()[1]), textcoords="offset points", xytext=(4, -14))
  ax.set(
    xlabel="step", ylabel="nats per token", title=f"{cfg.model.name}: stable stage, then decay"
  )
  right = ax.twinx()
  right.plot(
    [r["step"] for r in steps_of],
    [r["learning_rate"] for r in steps_of],
    color="tab:red",
    alpha=0.4,
  )
  right.set_ylabel("learning rate (red)")
  ax.legend(loc="upper center")
  pictures.save(fig, run.workdir / "loss.png", dpi=120)
  run.tell(f"loss curve: {run.workdir / 'loss.png'}")


def report_bits_per_byte(
  run: Run, corpus: Corpus, indices: dict[str, shards.Index], values: dict[str, float]
) -> None:
  """The model next to a byte 5-gram model of the same training text, and gzip."""
  train = corpus.text(corpus.train.values(), BASELINE_BYTES)
  table = {}
  run.tell(f"{'held out':<14}{'bytes':>9}{'model':>8}{'5-gram':>8}{'gzip':>8}")
  for name, docs in corpus.heldout.items():
    text = b"\n".join(d.text.encode() for d in docs)
    row = {
      "bytes": indices[f"{name}_heldout"].text_bytes,
      "model": values[f"eval/{name}_heldout/bits_per_byte"],
      "ngram": _baselines.ngram_bits_per_byte(train, text),
      "gzip": _baselines.gzip_bits_per_byte(text),
    }
    table[name] = row
    run.tell(
      f"{name:<14}{row['bytes']:>9,}{row['model']:>8.3f}{row['ngram']:>8.3f}{row['gzip']:>8.3f}"
    )
  run.report["bits_per_byte"] = table


def export_and_compare(run: Run, model, params, tok: tokenizer.Tokenizer) -> None:
  """Writes `hf/`, loads it again and requires equal logits."""
  folder = run.workdir / "hf"
  mc.ckpt.save_hf(folder, model, params, tok)
  again, params_again, _ = mc.ckpt.load_hf(folder)
  tokens_BT = jnp.asarray([tok.encode("def main(argv):\n  return the value of the ")], jnp.int32)
  ours = model.apply({"params": params}, tokens_BT).logits
  theirs = again.apply({"params": params_again}, tokens_BT).logits
  difference = float(np.max(np.abs(np.asarray(ours) - np.asarray(theirs))))
  if difference > 1e-4:
    raise RuntimeError(f"{folder}: reloaded logits differ by {difference}, expected at most 1e-4")
  run.tell(f"largest difference of logits after the round trip: {difference:.1e}")
  run.report["export_logit_difference"] = difference


def write_samples(run: Run, model, params, tok: tokenizer.Tokenizer, corpus: Corpus) -> None:
  """Continues a few prompts greedily and by sampling."""
  model, params = generate.for_decoding(model, params)
  samples = []
  for title, sampling in (
    ("greedy", config.SamplingConfig(max_new_tokens=48)),
    (
      "sampled (temperature 0.8, top-p 0.95)",
      config.SamplingConfig(temperature=0.8, top_p=0.95, max_new_tokens=48),
    ),
  ):
    prompts = [tok.encode(p, add_bos=tok.add_bos) for p in corpus.prompts]
    out = generate.generate(model, params, prompts, sampling, stop_ids=tok.stop_ids)
    run.tell(f"{title}:")
    for prompt, ids in zip(corpus.prompts, out.tokens, strict=True):
      text = tok.decode(ids)
      samples.append({"mode": title, "prompt": prompt, "text": text})
      run.tell(f"  {prompt!r} -> {text!r}")
  run.report["samples"] = samples
  run.report["device"] = jax.devices()[0].device_kind
