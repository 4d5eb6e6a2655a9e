"""Duplicates: planted copies, brute-force Jaccard, datasketch and cosines as references."""

import dataclasses
import random

import numpy as np
import pytest

from minicpm_jax.data import dedup, documents, executor, semantic

ZH = "的是了在和有不这中国人民大学生产发展社会经济文化历史科学技术研究问题方法理论实践家学习工作"


def _docs(texts, source="s", scores=None):
  return [
    documents.Doc(id=f"d{i}", text=t, source=source, score=scores[i] if scores else None)
    for i, t in enumerate(texts)
  ]


def _removed(removals):
  return {r.id: r.detail.split()[0] for r in removals}


def _corpus(count, seed=0):
  """Random texts, and copies of some with a few words changed: (texts, copy -> original)."""
  draw = random.Random(seed)
  vocabulary = [f"w{i}" for i in range(3000)]
  texts, origin = [], {}
  for i in range(count):
    if i % 4 == 3:
      original = draw.randrange(len(texts))
      units = texts[original].split()
      for _ in range(draw.randrange(0, 6)):
        units[draw.randrange(len(units))] = draw.choice(vocabulary)
      texts.append(" ".join(units))
      origin[i] = original
    else:
      texts.append(" ".join(draw.choices(vocabulary, k=draw.randrange(60, 160))))
  return texts, origin


def _shingle_set(text, size=5):
  words = text.lower().split()
  return {tuple(words[i : i + size]) for i in range(len(words) - size + 1)}


def _jaccard(a, b):
  a, b = _shingle_set(a), _shingle_set(b)
  return len(a & b) / len(a | b)


@pytest.mark.smoke
def test_exact_duplicates_up_to_white_space_and_composition():
  texts = ["caf\u00e9 one", "cafe\u0301  one\n", "cafe one", " caf\u00e9 one", "中文", "中文 "]
  assert _removed(dedup.exact(_docs(texts))) == {"d1": "d0", "d3": "d0", "d5": "d4"}


def test_exact_keeps_the_first_by_source_priority_then_id():
  docs = [
    documents.Doc(id="b", text="t", source="web"),
    documents.Doc(id="a", text="t", source="web"),
    documents.Doc(id="z", text="t", source="book"),
  ]
  found = list(dedup.exact(docs, priority=lambda source: ["book", "web"].index(source)))
  assert [(r.source, r.id, r.detail) for r in found] == [("web", "b", "z"), ("web", "a", "z")]
  assert _removed(dedup.exact(docs[:2])) == {"b": "a"}


def test_signatures_estimate_jaccard():
  """Unbiased with standard deviation sqrt(J (1 - J) / rows): mean error over many pairs."""
  texts, origin = _corpus(400)
  cfg = dedup.MinHash(num_bands=32, band_size=8)
  errors, scale = [], []
  for copy, original in origin.items():
    true = _jaccard(texts[copy], texts[original])
    a, b = (dedup.signature(texts[i], cfg) for i in (copy, original))
    errors.append((a == b).mean() - true)
    scale.append(np.sqrt(true * (1 - true) / 256))
  errors, scale = np.array(errors), np.array(scale)
  assert abs(errors.mean()) < 4 * np.sqrt((scale**2).sum()) / len(scale)
  spread = errors[scale > 0] / scale[scale > 0]
  assert 0.8 < spread.std() < 1.25


def test_minhash_against_brute_force():
  """Pairs of Jaccard 0.9 and more are found, of 0.6 and less are not (planted, 400 texts)."""
  texts, _ = _corpus(400, seed=1)
  removed = _removed(dedup.minhash(_docs(texts)))
  sets = [_shingle_set(t) for t in texts]
  best = {}
  for i in range(len(texts)):
    for j in range(i):
      score = len(sets[i] & sets[j]) / len(sets[i] | sets[j])
      for row in (i, j):
        best[row] = max(best.get(row, 0.0), score)
  for i in range(len(texts)):
    if best[i] <= 0.6:
      assert f"d{i}" not in removed, best[i]
  for copy, kept in removed.items():
    assert best[int(copy[1:])] > 0.65 and kept not in removed
  for i in range(len(texts)):
    for j in range(i):
      if len(sets[i] & sets[j]) >= 0.9 * len(sets[i] | sets[j]):
        assert {f"d{i}", f"d{j}"} & set(removed)


def test_minhash_agrees_with_datasketch():
  """datasketch's LSH with the same bands and the same check of signatures finds the same copies,
  but for pairs so near a threshold that other hash functions decide otherwise."""
  datasketch = pytest.importorskip("datasketch")
  texts, _ = _corpus(600, seed=2)
  lsh = datasketch.MinHashLSH(num_perm=112, params=(14, 8))
  sketches, peer = [], set()
  for i, text in enumerate(texts):
    sketch = datasketch.MinHash(num_perm=112, seed=5)
    sketch.update_batch([" ".join(s).encode() for s in _shingle_set(text)])
    for j in lsh.query(sketch):
      if sketch.jaccard(sketches[j]) >= 0.8:
        peer.add((j, i))
    lsh.insert(i, sketch)
    sketches.append(sketch)
  cfg = dedup.MinHash()
  signatures = np.stack([dedup.signature(t, cfg) for t in texts])
  pairs = dedup.candidate_pairs(dedup.band_hashes(signatures, cfg), cfg.max_bucket)
  equal = (signatures[pairs[:, 0]] == signatures[pairs[:, 1]]).mean(axis=1)
  ours = set(map(tuple, pairs[equal >= 0.8].tolist()))
  assert len(peer) > 50
  assert all(0.65 < _jaccard(texts[i], texts[j]) < 0.92 for i, j in ours ^ peer)
  assert len(ours & peer) >= 0.8 * len(peer)


def test_best_of_a_cluster_stays():
  base = " ".join(f"word{i}" for i in range(200))
  texts = [base, base + " tail", base + " tail of more words", "something else entirely " * 20]
  assert _removed(dedup.minhash(_docs(texts))) == {"d0": "d2", "d1": "d2"}  # the longest
  scores = [0.2, 0.9, 0.5, None]
  assert _removed(dedup.minhash(_docs(texts, scores=scores))) == {"d0": "d1", "d2": "d1"}
  same = _removed(dedup.minhash(_docs([base] * 3)))
  assert same == {"d1": "d0", "d2": "d0"}  # the first of equals


def test_short_empty_and_chinese_texts():
  draw = random.Random(0)
  page = "".join(draw.choices(ZH, k=400))
  near = page[:200] + "家" + page[200:]
  other = "".join(draw.choices(ZH, k=400))
  texts = ["", "!!", "", "two words", "Two words!", "two others", page, near, other]
  assert _removed(dedup.minhash(_docs(texts))) == {"d3": "d4", "d6": "d7"}  # the longer stays
  assert list(dedup.minhash([])) == []


def test_large_buckets_are_bounded():
  """200 near copies of one text: pairs stay linear in the bucket, the cluster stays whole."""
  words = [f"word{i}" for i in range(300)]
  texts = [" ".join([*words, f"number{i}"]) for i in range(200)]
  removed = _removed(dedup.minhash(_docs(texts), dedup.MinHash(max_bucket=3)))
  assert len(removed) == 199
  assert len(list(dedup.bucket_pairs(range(200), 3))) == 199 + 198 + 197


def test_second_pass_drops_what_is_listed(tmp_path):
  pytest.importorskip("pyarrow")
  for name, texts in (("a", ["one", "two"]), ("b", ["two", "three"])):
    rows = "".join(f'{{"id": "{name}{i}", "text": "{t}"}}\n' for i, t in enumerate(texts))
    (tmp_path / f"{name}.jsonl").write_text(rows)
  first = executor.run(
    [tmp_path / "a.jsonl", tmp_path / "b.jsonl"], [], tmp_path / "1", num_workers=0
  )
  stage = dedup.write_removals(
    tmp_path / "dup.jsonl", dedup.exact(executor.read_kept(tmp_path / "1"))
  )
  second = executor.run(first.parquet, [stage], tmp_path / "2", num_workers=1)
  assert [d.text for d in executor.read_kept(tmp_path / "2")] == ["one", "two", "three"]
  assert second.counts["dropped"] == {"dedup/exact_duplicate": 1}
  (tmp_path / "dup.jsonl").write_text("")
  with pytest.raises(ValueError, match=r"dup\.jsonl: found sha256 .*, expected"):
    list(dataclasses.replace(stage)([]))


@pytest.mark.parametrize(
  "change, message", [({"num_bands": 0}, "num_bands: found 0"), ({"threshold": 1.1}, "threshold")]
)
def test_settings_are_checked(change, message):
  with pytest.raises(ValueError, match=message):
    dedup.MinHash(**change)


# ------------------------------------------------------------------------------------ semantic


def test_encoder_gives_unit_vectors_that_follow_overlap():
  texts = [
    "Write a poem about the sea",
    "write a poem about the sea!",
    "Solve 3x + 4 = 10 for x",
    "",
  ]
  vectors = semantic.HashedNGrams().encode(texts)
  assert vectors.shape == (4, 512) and vectors.dtype == np.float32
  np.testing.assert_allclose(np.linalg.norm(vectors[:3], axis=1), 1, rtol=1e-6)
  assert vectors[0] @ vectors[1] > 0.999 and abs(vectors[0] @ vectors[2]) < 0.25
  assert not vectors[3].any()


def test_semantic_duplicates_against_all_cosines():
  """Nothing kept is as near as the threshold, and every removed one is near a kept one."""
  pytest.importorskip("semhash")
  draw = random.Random(4)
  words = "write explain poem essay sea mountain river code python sort list tree long".split()
  texts = [f"{' '.join(draw.choices(words, k=8))} please number {i % 50}" for i in range(150)]
  texts += [t.upper() for t in texts[:10]] + [t + " ." for t in texts[10:20]]
  docs = _docs(texts)
  removed = _removed(semantic.semantic(docs))
  vectors = semantic.HashedNGrams().encode(texts)
  cosine = vectors @ vectors.T
  kept = [i for i in range(len(texts)) if f"d{i}" not in removed]
  inside = cosine[np.ix_(kept, kept)] - np.eye(len(kept))
  assert inside.max() < 0.9 + 1e-5
  assert all(cosine[int(r[1:]), kept].max() >= 0.9 - 1e-5 for r in removed)
  assert len(removed) >= 20


def test_semantic_against_another_set():
  pytest.importorskip("semhash")
  sft = _docs(["Explain how tides work in the sea", "Sum the numbers from 1 to 100"], source="sft")
  rl = _docs(
    [
      "explain how tides work in the sea.",
      "What is the capital of France?",
      "What is the capital of France?",
    ],
    source="rl",
  )
  found = list(semantic.semantic(rl, against=sft))
  assert [(r.source, r.id, r.detail.split()[0]) for r in found] == [("rl", "d0", "d0")]
