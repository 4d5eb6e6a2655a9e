"""Planted good and bad data are told apart; runs differ in the data only; refusals; bootstrap."""

import dataclasses
import json

import numpy as np
import pytest

from minicpm_jax import config
from minicpm_jax.data import documents, iterator
from minicpm_jax.tunnel import likelihood, verification


@pytest.fixture(scope="module")
def sets(planted):
  good = [documents.Doc(id=str(i), text=t) for i, t in enumerate(planted.counting(99, 40))]
  question = likelihood.Item("q", (("5 6 7", " 8"), ("5 6 7", " 30")), 0)
  return [
    likelihood.text_set("good", good),
    likelihood.EvalSet("next", "choice", (question,) * 3),
  ]


def make(base_run, candidate, **changes):
  given = dict(checkpoints=(base_run,), candidate=candidate, share=0.5, stage2_steps=8)
  return verification.VerificationConfig(**(given | changes))


def test_good_data_is_accepted_and_bad_rejected(base_run, planted, sets, tmp_path):
  tok = planted.tokenizer()
  good = planted.write(tmp_path, "counting", planted.counting(7, 120))
  bad = planted.write(tmp_path, "noise", planted.noise(8, 120))
  reports = {
    source.name: verification.verify(
      make(base_run, source, stage1_steps=2, stage2_steps=16), tmp_path / "runs", tok, sets[:1]
    )
    for source in (good, bad)
  }
  assert reports["counting"]["decision"] == "accept" and reports["counting"]["delta"] > 0
  assert reports["noise"]["decision"] == "reject" and reports["noise"]["delta"] < 0
  assert reports["counting"]["wins"] == 1 and reports["noise"]["wins"] == 0
  written = json.loads((tmp_path / "runs" / "verification-counting.json").read_text())
  assert written == json.loads(json.dumps(reports["counting"]))
  (seed,) = written["seeds"]
  # 16 steps of 8 rows of 32 tokens, half of the places replaced; the baseline has none
  assert seed["candidate"]["tokens"]["counting"] == 16 * 8 * 32 // 2
  assert sum(seed["candidate"]["tokens"].values()) == sum(seed["baseline"]["tokens"].values())
  assert "counting" not in seed["baseline"]["tokens"]
  # one baseline for both: not trained again
  again = json.loads((tmp_path / "runs" / "verification-noise.json").read_text())["seeds"][0]
  assert again["baseline"]["config_hash"] == seed["baseline"]["config_hash"]
  assert again["baseline"]["sets"] == seed["baseline"]["sets"]


def test_streams_differ_at_replaced_places_only(base_run, planted, tmp_path):
  candidate = planted.write(tmp_path, "new", planted.counting(3))
  runs = verification.plan(make(base_run, candidate, share=0.3), base_run, tmp_path)
  assert runs.stage1 is None and runs.baseline.branch_from == base_run
  assert dataclasses.replace(runs.candidate, name="", data=runs.baseline.data) == (
    dataclasses.replace(runs.baseline, name="")
  )
  streams = [iterator.make_iterator(run.data) for run in (runs.baseline, runs.candidate)]
  number, seen = len(runs.baseline.data.sources), 0
  for step in range(14):
    plain, other = (next(stream) for stream in streams)
    is_new = other["source_ids"][:, 0] == number
    assert step >= 6 or not is_new.any()
    seen += is_new.sum()
    for key in ("tokens", "targets", "segment_ids", "positions", "loss_mask", "source_ids"):
      np.testing.assert_array_equal(plain[key][~is_new], other[key][~is_new])
  assert seen == int(0.3 * 8 * 8)
  # where the baseline stands, the candidate can go on: the past is the same
  fresh = iterator.make_iterator(runs.candidate.data)
  begun = iterator.make_iterator(runs.baseline.data)
  for _ in range(6):
    next(begun)
  fresh.set_state(begun.get_state())
  assert fresh.step == 6
  for stream in (*streams, fresh, begun):
    stream.close()


def test_schedule_and_stages(base_run, planted, tmp_path):
  candidate = planted.write(tmp_path, "new", planted.counting(3))
  cfg = make(base_run, candidate, stage1_steps=4)
  runs = verification.plan(cfg, base_run, tmp_path)
  assert runs.stage1.num_steps == 10 and runs.baseline.num_steps == 18
  assert runs.baseline.branch_from == f"{tmp_path / 'stage1'}@10"
  schedule = runs.baseline.optim.schedule  # one decay from step 6 to 18
  assert (schedule.decay_start, schedule.decay_steps) == (6, 12)
  assert runs.stage1.optim.schedule == schedule
  own = config.ScheduleConfig(kind="constant", warmup_steps=0)
  runs = verification.plan(dataclasses.replace(cfg, stage2_schedule=own), base_run, tmp_path)
  assert runs.candidate.optim.schedule == own and runs.stage1.optim.schedule == schedule


def test_refusals(base_run, planted, tmp_path, sets):
  small = planted.write(tmp_path, "small", planted.counting(3, 2))
  cfg = make(base_run, small, stage2_steps=40)
  with pytest.raises(verification.VerificationError, match=r"small: found \d+ tokens.*4 epochs"):
    verification.verify(cfg, tmp_path, planted.tokenizer(), sets)
  same = dataclasses.replace(small, name="half")
  with pytest.raises(verification.VerificationError, match="candidate.name: found 'half'"):
    verification.plan(make(base_run, same), base_run, tmp_path)
  with pytest.raises(verification.VerificationError, match="share: found 0"):
    make(base_run, small, share=0.0)
  with pytest.raises(verification.VerificationError, match="decide_by"):
    verification.compare([], [], sets[:1], make(base_run, small, decide_by="accuracy"))


def fake(nats, correct):
  n = np.asarray(nats, np.float64)
  right = np.asarray(correct, np.float64)
  return likelihood.Scores(n, np.full(len(n), 10.0), right, right)


def test_deltas_and_interval_by_hand(base_run):
  """Constant differences have an interval of width 0; symmetric ones straddle 0."""
  cfg = make(base_run, config.SourceConfig(name="x", path="x"), num_draws=2000)
  items = tuple(likelihood.Item(str(i), (("", "t"),)) for i in range(40))
  text = likelihood.EvalSet("text", "text", items)
  choice = likelihood.EvalSet("choice", "choice", items)
  nats = np.linspace(5, 9, 40)
  found = verification.compare(
    [{"text": fake(nats, nats * 0)}], [{"text": fake(nats - 0.5, nats * 0)}], [text], cfg
  )
  expected = 0.5 / 10 / np.log(2)  # nats less per item, bytes per item
  np.testing.assert_allclose([found["delta"], *found["interval"]], expected, rtol=1e-9)
  assert found["decision"] == "accept"
  sign = np.where(np.arange(40) % 2, 1.0, -1.0)
  found = verification.compare(
    [{"text": fake(nats, nats * 0)}], [{"text": fake(nats + sign, nats * 0)}], [text], cfg
  )
  assert found["decision"] == "undecided" and found["interval"][0] < 0 < found["interval"][1]
  right = (np.arange(40) < 30).astype(float)
  accuracy = dataclasses.replace(cfg, decide_by="accuracy")
  both = [{"choice": fake(nats, right)}, {"choice": fake(nats, right)}]
  worse = [{"choice": fake(nats, right * 0)}, {"choice": fake(nats, right)}]
  found = verification.compare(both, worse, [choice], accuracy)
  assert found["delta"] == pytest.approx(-37.5)  # mean of -75 and 0 points
  # items: 30 of -37.5... per item -50 or 0; the standard error is 50 sqrt(.75 * .25 / 40) = 3.4
  low, high = found["interval"]
  assert low == pytest.approx(-37.5 - 1.96 * 3.42, abs=1.5)
  assert high == pytest.approx(-37.5 + 1.96 * 3.42, abs=1.5)
  assert found["decision"] == "reject"


def test_decision():
  assert verification.decide(0.1, 0.2) == "accept"
  assert verification.decide(-0.2, -0.1) == "reject"
  assert verification.decide(-0.1, 0.0) == verification.decide(0.0, 0.1) == "undecided"
