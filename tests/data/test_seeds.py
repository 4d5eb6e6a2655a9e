"""Seed pools, sampling, split, the LLM judge, statistics."""

import collections
import dataclasses
import json
import random

import pytest

from minicpm_jax.data import documents, judge, seeds, stats
from minicpm_jax.data.documents import Doc


def docs(name, count, text="some words of {} number {}"):
  return [Doc(id=f"{name}{i}", text=text.format(name, i), source=name) for i in range(count)]


@pytest.mark.smoke
def test_instruction_pools_are_rendered(tmp_path):
  path = tmp_path / "qa.jsonl"
  path.write_text(json.dumps({"id": "1", "question": "Why?", "answer": "Because."}) + "\n")
  pool = seeds.SeedPool(name="qa", path=str(path), lang="en", kind="instruction")
  (doc,) = seeds.read_pool(pool)
  assert (doc.id, doc.text, doc.lang, doc.meta["pool"]) == ("1", "Why?\n\nBecause.", "en", "qa")
  path.write_text('{"question": "Why?"}\n')
  with pytest.raises(documents.CorpusError, match=r"qa\.jsonl: line 1: found keys .*'answer'"):
    list(seeds.read_pool(pool))


def test_negatives_have_equal_shares_and_small_sources_give_all():
  sources = {"a": docs("a", 100), "b": docs("b", 10), "c": docs("c", 100)}
  chosen = collections.Counter(d.source for d in seeds.sample_negatives(sources, 90))
  assert chosen == {"a": 40, "b": 10, "c": 40}
  assert len(seeds.sample_negatives(sources, 1000)) == 210
  shuffled = {name: random.Random(1).sample(d, len(d)) for name, d in sources.items()}
  assert seeds.sample_negatives(shuffled, 33) == seeds.sample_negatives(sources, 33)


def test_positives_are_capped_by_pool():
  chosen = seeds.sample_positives({"a": docs("a", 50), "b": docs("b", 5)}, pool_cap=20)
  assert collections.Counter(d.source for d in chosen) == {"a": 20, "b": 5}


def test_split_is_by_document_and_has_its_shares():
  made = list(seeds.pieces([Doc(id="d", text="x" * 95)], 10))
  assert [len(d.text) for d in made] == [10] * 9 + [5] and made[3].id == "d#3"
  assert list(seeds.pieces(docs("a", 2))) == docs("a", 2)
  counts = collections.Counter(seeds.split_of(f"id{i}") for i in range(20_000))
  assert counts["dev"] == pytest.approx(2000, rel=0.1)
  assert counts["test"] == pytest.approx(2000, rel=0.1)


def test_negatives_near_a_positive_go():
  rng = random.Random(0)
  words = [f"w{i}" for i in range(3000)]
  good = [Doc(id=f"g{i}", text=" ".join(rng.sample(words, 200))) for i in range(5)]
  other = [Doc(id=f"b{i}", text=" ".join(rng.sample(words, 200))) for i in range(5)]
  copy = Doc(id="copy", text=good[3].text + " and one more")
  kept, removed = seeds.without_near([*other, copy, Doc(id="empty", text="")], good)
  assert [d.id for d in kept] == [d.id for d in other] + ["empty"]
  assert removed == [("copy", "g3")]


# --- Judge ---------------------------------------------------------------------------------------


@pytest.mark.smoke
@pytest.mark.parametrize(
  "answer, parsed",
  [
    ("Score: 5\nReason: clear.", (5.0, "clear.")),
    ("**Score: 4.5**", (4.5, "")),
    ("score：**3**\nreason：short", (3.0, "short")),
    ("Score: 7", None),
    ("I cannot rate this.", None),
  ],
)
def test_answers_are_parsed(answer, parsed):
  assert judge.parse(answer) == parsed


def test_judge_keeps_scores_above_four():
  seen = []

  def generate(prompts, sampling):
    seen.append(len(prompts))
    return [p[0]["content"].rsplit("Text:\n", 1)[1] for p in prompts]

  cfg = judge.JudgeConfig(model_id="scripted", batch_size=2, max_chars=30)
  texts = ["Score: 5\nReason: a", "Score: 4\nReason: b", "no idea", "Score: 4.5"]
  given = [Doc(id=str(i), text=t) for i, t in enumerate(texts)]
  out = list(judge.JudgeStage(generate, cfg)(given))
  assert seen == [2, 2]
  assert out[0].meta["llm"] == {
    "prompt": judge.PROMPT_ID,
    "model": "scripted",
    "score": 5.0,
    "reason": "a",
  }
  assert [o.reason for o in out[1:3]] == ["llm_score", "no_llm_score"]
  assert isinstance(out[3], Doc)
  with pytest.raises(ValueError, match="found 0 answers, expected 2"):
    list(judge.JudgeStage(lambda prompts, sampling: [], cfg)(given))


# --- Statistics ----------------------------------------------------------------------------------


def test_statistics_by_hand_and_merged():
  given = [
    Doc(id="1", text="one two\nthree\n", lang="en", source="a", score=0.97),
    Doc(id="2", text="字é", lang="zh", source="b", score=1.0),
    Doc(id="3", text="", source="a"),
  ]
  whole = stats.collect(given)
  found = whole.as_dict()
  assert (found["documents"], found["empty"], found["characters"]) == (3, 1, 16)
  assert (found["bytes"], found["words"], found["lines"]) == (14 + 5, 4, 3)
  assert found["by_lang"] == {"en": 1, "unknown": 1, "zh": 1}
  assert found["by_source"] == {"a": 2, "b": 1}
  assert found["characters_histogram"] == {"0": 1, "2": 1, "8": 1}
  assert found["score_histogram"]["0.95"] == 2 and sum(found["score_histogram"].values()) == 2
  assert found["median_characters_at_least"] == 2
  parts = stats.collect(given[:1]).merge(stats.collect(given[1:]))
  assert parts == whole == stats.collect(given[::-1])
  assert json.loads(json.dumps(found)) == found
  assert dataclasses.replace(whole).as_dict() == found
