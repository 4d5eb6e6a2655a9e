"""Planted good and bad text for the tests of classifiers, and pieces of the shared data."""

import random

import pytest

from minicpm_jax.data import documents

GOOD = "theorem proof lemma implies because therefore energy cell history method".split()
BAD = "buy cheap click casino bonus free now offer winner viagra".split()
COMMON = "the of and to in is a that it for".split()


def planted(is_good: bool, count: int, seed: int = 0) -> list[documents.Doc]:
  """Documents of common words and, one word in three, words of one kind."""
  rng, own = random.Random(f"{is_good}/{seed}"), GOOD if is_good else BAD
  docs = []
  for i in range(count):
    words = [rng.choice(own if rng.random() < 1 / 3 else COMMON) for _ in range(40)]
    doc_id = f"{'good' if is_good else 'bad'}/{seed}/{i}"
    docs.append(documents.Doc(id=doc_id, text=" ".join(words), lang="en", source=doc_id[:4]))
  return docs


@pytest.fixture(scope="session")
def planted_docs():
  return planted
