"""Decontamination: planted questions are found, and only those, by exact 13-grams."""

import gzip
import json
import random

import pytest

from minicpm_jax.data import decontaminate, documents, executor

ZH = "的是了在和有不这中国人民大学生产发展社会经济文化历史科学技术研究问题方法理论实践"


def _filler(count, seed):
  return " ".join(f"w{random.Random(seed * 1000 + i).randrange(10**6)}" for i in range(count))


def _zh(count, seed):
  return "".join(random.Random(seed).choices(ZH, k=count))


def _index(*texts, size=13):
  return decontaminate.Index({"bench": [(f"q{i}", t) for i, t in enumerate(texts)]}, size=size)


def _brute_force(text, questions, size=13):
  """Does the text share a run of `size` lower-case words with a question?"""
  runs = set()
  for words in (q.lower().split() for q in questions):
    runs |= {tuple(words[i : i + size]) for i in range(len(words) - size + 1)}
  words = text.lower().split()
  return any(tuple(words[i : i + size]) in runs for i in range(len(words) - size + 1))


@pytest.mark.smoke
def test_a_run_of_13_words_is_a_hit_and_12_are_not():
  question = _filler(30, 1)
  words = question.split()
  index = _index(question)
  for start in range(16):
    for length in (12, 13, 15):
      run = words[start : start + length]
      text = f"{_filler(20, 2)} {' '.join(run)} {_filler(20, 3)}"
      hits = list(index.hits(text))
      assert len(hits) == max(0, len(run) - 12)
      assert all((h.benchmark, h.item, h.end - h.start) == ("bench", "q0", 13) for h in hits)


def test_case_symbols_and_line_breaks_do_not_hide_a_hit():
  question = _filler(13, 1)
  index = _index(question)
  assert list(index.hits(question.upper().replace(" ", " -- ").replace("W", "\nW")))
  assert not list(index.hits(" ".join(reversed(question.split()))))


def test_chinese_runs_of_26_characters():
  question = _zh(40, 1)
  index = _index(question)
  for length, is_hit in ((25, False), (26, True)):
    text = _zh(50, 2) + "A" + question[5 : 5 + length] + "B" + _zh(50, 3)
    assert bool(list(index.hits(text))) == is_hit
  spaced = "，\n".join(question[i : i + 7] for i in range(0, 40, 7))
  assert list(index.hits(spaced))


def test_agrees_with_brute_force_on_random_text():
  draw = random.Random(0)
  vocabulary = [f"w{i}" for i in range(6)]
  questions = [" ".join(draw.choices(vocabulary, k=20)) for _ in range(20)]
  index = _index(*questions, size=5)
  found = 0
  for _ in range(200):
    text = " ".join(draw.choices(vocabulary, k=40))
    expected = _brute_force(text, questions, size=5)
    assert bool(list(index.hits(text))) == expected
    found += expected
  assert 20 < found < 180


@pytest.fixture
def bench(tmp_path):
  rows = [{"id": f"q{i}", "question": _filler(20, 10 + i)} for i in range(3)]
  rows.append({"id": "short", "question": "Too short to protect?"})
  path = tmp_path / "bench.jsonl.gz"
  with gzip.open(path, "wt", encoding="utf-8") as file:
    file.writelines(json.dumps(row) + "\n" for row in rows)
  return str(path)


def test_stage_and_report(bench, tmp_path):
  pytest.importorskip("pyarrow")
  texts = [_filler(50, 1), f"{_filler(9, 2)} {_filler(20, 11)}", _filler(14, 12), _filler(20, 11)]
  rows = "".join(json.dumps({"id": f"d{i}", "text": t}) + "\n" for i, t in enumerate(texts))
  (tmp_path / "in.jsonl").write_text(rows)
  stage = decontaminate.Decontaminate(paths=(bench,))
  executor.run([tmp_path / "in.jsonl"], [stage], tmp_path / "out", num_workers=1)
  drops = list(executor.read_drops(tmp_path / "out"))
  found = [(d["id"], d["detail"]) for d in drops]
  assert found == [("d1", "bench q1"), ("d2", "bench q2"), ("d3", "bench q1")]
  index = decontaminate.load_index(stage.paths, stage.size, stage.fields)
  assert decontaminate.report(drops, index) == {
    "bench": {"items": 4, "items_too_short": 1, "documents_dropped": 3, "items_hit": 2}
  }


def test_passages_are_taken_out(bench):
  stage = decontaminate.Decontaminate(paths=(bench,), remove="passage")
  question = _filler(20, 11)
  broken = question.replace(" ", "\n", 10)
  half = " ".join(question.split()[:10]) + "\n" + " ".join(question.split()[10:])
  texts = [
    f"first line\n{question}\nlast line",
    f"first line\n{half}\nlast line",
    question,
    f"a\n{broken}\nb",
    "clean\ntext",
  ]
  docs = [documents.Doc(id=str(i), text=t) for i, t in enumerate(texts)]
  one, two, whole, scattered, clean = stage(docs)
  assert one.text == two.text == "first line\nlast line"
  assert one.meta == {"contaminated": ["bench q1"]}
  assert whole == documents.Dropped("2", "contaminated", "bench q1")
  assert scattered == documents.Dropped("3", "contaminated", "bench q1")
  assert clean is docs[4]


def test_other_questions_make_another_stage(bench, tmp_path):
  before = decontaminate.Decontaminate(paths=(bench,))
  with gzip.open(bench, "wt") as file:
    file.write(json.dumps({"id": "new", "question": _filler(20, 99)}))
  assert repr(decontaminate.Decontaminate(paths=(bench,))) != repr(before)
  (tmp_path / "bad.jsonl").write_text('{"id": "x", "text": "?"}\n')
  with pytest.raises(ValueError, match=r"bad\.jsonl: line 1: found keys.*'question'"):
    list(decontaminate.read_items(tmp_path / "bad.jsonl"))


def test_real_questions_planted_in_real_text(shared_dir):
  """Every MMLU question of 13 words and more is found in a page that quotes it; pages without
  a quotation pass."""
  path = shared_dir / "data/mini/eval/mmlu_validation.jsonl.gz"
  stage = decontaminate.Decontaminate(paths=(str(path),))
  questions = [t for _, t in decontaminate.read_items(path) if len(t.split()) >= 20][:40]
  pages = list(documents.read([shared_dir / "data/mini/pretrain/en_web_c4.jsonl.gz"]))[:40]
  quoting = [
    documents.Doc(id=f"q{i}", text=f"{p.text[:300]} {q} {p.text[300:600]}")
    for i, (p, q) in enumerate(zip(pages, questions, strict=False))
  ]
  assert all(isinstance(item, documents.Dropped) for item in stage(quoting))
  assert all(isinstance(item, documents.Doc) for item in stage(pages))


@pytest.mark.parametrize("stem", ["test", "a#1"])
def test_files_of_one_name_are_both_read_and_changed_files_again(tmp_path, stem):
  words = {name: " ".join(f"{name}{i}" for i in range(20)) for name in "abc"}
  paths = []
  for name in "ab":
    (tmp_path / name).mkdir()
    paths.append(tmp_path / name / f"{stem}.jsonl")
    paths[-1].write_text(json.dumps({"question": words[name]}))
  docs = [documents.Doc(id=name, text=text) for name, text in words.items()]

  def details():
    stage = decontaminate.Decontaminate(paths=tuple(map(str, paths)))
    return [getattr(item, "detail", None) for item in stage(docs)]

  assert details() == [f"{stem} 1", f"{stem}#2 1", None]
  paths[0].write_text(json.dumps({"question": words["c"]}))
  assert details() == [None, f"{stem}#2 1", f"{stem} 1"]


@pytest.mark.parametrize("content", [b"", b"no json", b"[1]", b'{"id": "a"}', b"\xff"])
def test_a_file_without_items_is_refused_by_name(tmp_path, content):
  path = tmp_path / "bench.jsonl"
  path.write_bytes(content)
  stage = decontaminate.Decontaminate(paths=(str(path),))
  with pytest.raises(ValueError, match=r"bench\.jsonl"):
    list(stage([documents.Doc(id="1", text="a")]))
