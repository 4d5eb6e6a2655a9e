"""The measurements of bench_ultraclean run, and count what they say they count."""

import pytest

from experiments import _bench_ultraclean as bench
from minicpm_jax.data import ultraclean


@pytest.fixture
def corpus(shared_dir):
  return str(shared_dir / "data/mini/pretrain")


def test_filter_speed(corpus):
  pytest.importorskip("pyarrow")
  docs = bench.read(corpus, "en")[:150]
  found = bench.filter_speed(docs, "/bin/false", 1)
  assert found["documents"] == 150 and 0 < found["kept"] < 150
  assert found["executor_documents_per_s"] > 0 and found["datatrove"].startswith("not run")


def test_planted_copies_are_found(corpus):
  found = bench.minhash(corpus, 400)
  assert found["planted_copies"] > 20
  assert found["copies_found"] >= 0.9 * found["planted_copies"]
  assert found["removed"] <= 1.1 * found["planted_copies"]


@pytest.mark.slow
def test_score(corpus):
  pytest.importorskip("fasttext")
  docs = bench.read(corpus, "en")
  found = bench.score(docs, ultraclean.WhitespaceSegmenter(), 1)
  assert found["documents"] == len(docs) and found["time_over_raw"] > 0
