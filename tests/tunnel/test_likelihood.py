"""Option log-likelihoods against a plain forward; formats of the evaluation sets."""

import functools
import json
import math

import jax
import numpy as np
import pytest

from minicpm_jax import config
from minicpm_jax.data import documents
from minicpm_jax.models import transformer
from minicpm_jax.tunnel import likelihood


@pytest.fixture(scope="module")
def setup(base_config, planted):
  model = transformer.Transformer(base_config.model)
  params = transformer.init_params(model, jax.random.key(0))
  return model, params, likelihood.Scorer(model, planted.tokenizer(), seq_len=16, batch_size=4)


@functools.cache
def forward(model):
  return jax.jit(lambda params, ids: model.apply({"params": params}, ids).logits[0])


def plain_nats(model, params, ids, first):
  """-sum of log p(ids[i] | ids[:i]) for i >= first; what follows the ids cannot matter."""
  padded = np.zeros((1, 16), np.int32)
  padded[0, : len(ids) - 1] = ids[:-1]
  logits = np.asarray(forward(model)(params, padded))
  logp = logits - np.log(np.exp(logits.astype(np.float64)).sum(axis=1, keepdims=True))
  return -sum(logp[i - 1, ids[i]] for i in range(first, len(ids)))


def test_options_are_scored_given_their_question(setup):
  model, params, scorer = setup
  item = likelihood.Item("q", (("5 6 7", " 8 9"), ("5 6 7", " 30"), ("5 6 7", " 2 2 2")), 1)
  other = likelihood.Item("r", (("", "3 4 5 6"), ("9", "10")), 0)
  scores = scorer.score(params, likelihood.EvalSet("x", "choice", (item, other)))
  nats = [
    plain_nats(model, params, [1, 5, 6, 7, *target], 4) for target in ([8, 9], [30], [2, 2, 2])
  ]
  np.testing.assert_allclose(scores.nats[0], nats[1], rtol=1e-4)
  np.testing.assert_allclose(
    scores.nats[1], plain_nats(model, params, [1, 3, 4, 5, 6], 1), rtol=1e-4
  )
  assert scores.num_bytes.tolist() == [len(" 30"), len("3 4 5 6")]
  assert scores.correct[0] == (np.argmin(nats) == 1)
  assert scores.correct_per_byte[0] == (np.argmin(np.array(nats) / [4, 3, 6]) == 1)


def test_every_token_of_a_long_document_counts_once(setup):
  model, params, scorer = setup
  ids = [2 + i % 40 for i in range(39)]
  text = " ".join(map(str, ids))
  made = likelihood.text_set("d", [documents.Doc(id="d", text=text)])
  scores = scorer.score(params, made)
  whole = [1, *ids]  # EOS starts it; rows of 16 predicted tokens, each given the token before
  expected = sum(plain_nats(model, params, whole[at : at + 17], 1) for at in (0, 16, 32))
  np.testing.assert_allclose(scores.nats[0], expected, rtol=1e-4)
  assert scores.bits_per_byte == pytest.approx(expected / math.log(2) / len(text), rel=1e-4)


def test_long_question_keeps_its_end(setup):
  model, params, scorer = setup
  question = list(range(2, 40))
  item = likelihood.Item("q", ((" ".join(map(str, question)), " 7 8"),), 0)
  scores = scorer.score(params, likelihood.EvalSet("x", "choice", (item,)))
  expected = plain_nats(model, params, [*question[-15:], 7, 8], 15)
  np.testing.assert_allclose(scores.nats[0], expected, rtol=1e-4)


def test_formats(tmp_path):
  rows = {
    "arc_easy": {"question": "Why?", "choices": ["a", "b"], "label": 1},
    "boolq": {"question": "Is it?", "choices": ["no", "yes"], "label": 0, "passage": "It is."},
    "hellaswag": {"question": "He sat", "choices": ["down.", "up."], "label": 0},
    "winogrande": {"question": "Ann saw Eve, so _ ran.", "choices": ["Ann", "Eve"], "label": 0},
  }
  expected = {
    "arc_easy": ("Question: Why?\nAnswer:", " b"),
    "boolq": ("It is.\n\nQuestion: Is it?\nAnswer:", " no"),
    "hellaswag": ("He sat", " down."),
    "winogrande": ("Ann saw Eve, so Ann", " ran."),
  }
  for name, row in rows.items():
    path = tmp_path / f"{name}.jsonl"
    path.write_text(json.dumps({"id": "1"} | row) + "\n")
    (item,) = likelihood.choice_set(path).items
    assert item.options[item.label] == expected[name]
  path.write_text('{"question": "x", "choices": ["a"], "label": 1}\n')
  with pytest.raises(ValueError, match=r"winogrande\.jsonl: line 1: .*label 1"):
    likelihood.choice_set(path)


def test_real_eval_files_are_read(shared_dir):
  for path in sorted((shared_dir / "data" / "mini" / "eval").glob("*.jsonl.gz")):
    items = likelihood.choice_set(path, limit=20).items
    assert items and all(len(item.options) > 1 for item in items), path


def test_a_tokenizer_without_start_is_refused(base_config, planted):
  class Bare(planted.tokenizer):
    eos_id = None

  with pytest.raises(ValueError, match="neither BOS nor EOS"):
    likelihood.Scorer(transformer.Transformer(base_config.model), Bare(), seq_len=16)
  assert isinstance(base_config, config.TrainConfig)
