"""The quickstart's corpus: real, stable, split without leaks."""

import ast
import sys

import pytest

from minicpm_jax.data import documents, python_corpus


@pytest.fixture(scope="module")
def corpus():
  return {s: list(python_corpus.documents_of(s, "all")) for s in python_corpus.SOURCES}


def test_sizes_are_worth_training_on(corpus):
  sizes = {name: sum(len(d.text.encode()) for d in docs) for name, docs in corpus.items()}
  assert sizes["reference"] > 400_000
  assert sizes["docstrings"] > 1_000_000
  assert sizes["source"] > 6_000_000


def test_known_texts_are_there(corpus):
  by_id = {d.id: d.text for docs in corpus.values() for d in docs}
  assert "lambda" in by_id["python/reference/lambda"]
  assert by_id["python/source/textwrap"].startswith('"""Text wrapping and filling.')
  assert (
    "textwrap.dedent\nRemove any common leading whitespace" in by_id["python/docstrings/textwrap"]
  )
  assert "builtins.len\nReturn the number of items" in by_id["python/docstrings/builtins"]


def test_ids_and_texts_are_unique_and_no_test_or_installed_package_is_in(corpus):
  ids = [d.id for docs in corpus.values() for d in docs]
  assert len(ids) == len(set(ids))
  for docs in corpus.values():
    assert len({documents.stable_id(d.text, 0) for d in docs}) == len(docs)
  modules = {d.meta["key"].split(".")[0] for d in corpus["source"]}
  assert modules <= set(sys.stdlib_module_names)
  assert not modules & {"test", "idlelib", "lib2to3", "encodings", "numpy"}
  for doc in corpus["source"][:40]:
    ast.parse(doc.text)


def test_split_is_disjoint_complete_and_by_module(corpus):
  heldout_keys, train_keys = set(), set()
  for docs in corpus.values():
    split = [documents.is_heldout(d.meta["key"], python_corpus.HELDOUT_PERMILLE) for d in docs]
    assert 3 <= sum(split) < len(docs) / 5
    heldout_keys |= {d.meta["key"] for d, is_out in zip(docs, split, strict=True) if is_out}
    train_keys |= {d.meta["key"] for d, is_out in zip(docs, split, strict=True) if not is_out}
  assert not heldout_keys & train_keys
  train = list(python_corpus.documents_of("reference", "train"))
  heldout = list(python_corpus.documents_of("reference", "heldout"))
  assert {d.meta["key"] for d in heldout} <= heldout_keys
  assert {d.meta["key"] for d in train} <= train_keys
  assert sorted(d.id for d in train + heldout) == [d.id for d in corpus["reference"]]


def test_it_is_deterministic_and_can_be_cut(corpus):
  again = list(python_corpus.documents_of("reference", "all"))
  assert again == corpus["reference"]
  cut = list(python_corpus.documents_of("reference", "all", max_bytes=50_000))
  assert cut == again[: len(cut)]
  assert sum(len(d.text.encode()) for d in cut[:-1]) < 50_000


def test_unknown_source():
  with pytest.raises(ValueError, match="source: found 'web', expected one of"):
    list(python_corpus.documents_of("web"))
