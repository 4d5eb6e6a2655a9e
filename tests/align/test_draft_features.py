"""Stored features: equal to the target in the step, resumable, in epochs, refused where foreign."""

import dataclasses
import json

import jax
import numpy as np
import pytest

from minicpm_jax.align import draft as draft_loss
from minicpm_jax.align import draft_features, draft_run
from minicpm_jax.models import draft as draft_lib
from minicpm_jax.train import step as step_lib
from tests.align import small_run
from tests.models import common


@pytest.fixture(scope="module")
def target():
  return (*common.build(common.config(num_layers=3)), None)


@pytest.fixture(scope="module")
def cfg(target, tmp_path_factory):
  return small_run.distill(
    target[0].cfg,
    tmp_path_factory.mktemp("sources"),
    40,
    eval_every=4,
    log_every=4,
    stored_rows=20,
    stored_dtype="f32",
  )


def batches(num, seed=0):
  rng = np.random.default_rng(seed)
  for _ in range(num):
    yield {
      "tokens": rng.integers(0, 256, (8, 16)).astype(np.int32),
      "positions": np.tile(np.arange(16, dtype=np.int32), (8, 1)),
      "segment_ids": np.ones((8, 16), np.int32),
      "loss_mask": (rng.random((8, 16)) < 0.8).astype(np.float32),
    }


@pytest.mark.parametrize("kind", ["minicpm", "eagle3"])
def test_loss_on_stored_rows_is_the_loss_with_the_target_in_the_step(tmp_path, target, cfg, kind):
  model, params, _ = target
  draft = draft_lib.for_target(model.cfg, kind)
  cfg = dataclasses.replace(cfg, draft=draft, noise=0.0, feature_loss_weight=1.0)
  weights = draft_lib.init_params(draft, jax.random.key(0))
  rows = draft_features.write(tmp_path / "a", batches(3), 20, cfg, model, params)
  assert len(rows) == 20
  live = np.concatenate([b["tokens"] for b in batches(3)])
  picked = np.array([17, 3, 9, 0, 19, 4, 4, 11])
  stored = rows.take(picked)
  np.testing.assert_array_equal(stored["tokens"], live[picked])
  plain = {k: v for k, v in stored.items() if k not in ("hidden", "features", "best")}
  fn = jax.jit(draft_loss.make_loss_fn(cfg, model))
  ctx = step_lib.LossContext(draft_loss.make_totals_fn(cfg)(plain))
  expected, _ = fn({"draft": weights, "target": params}, plain, ctx)
  head = draft_features.head_params(params)
  assert set(head) < set(params)
  found, _ = fn({"draft": weights, "target": head}, stored, ctx)
  np.testing.assert_allclose(found, expected, rtol=1e-6)
  half = dataclasses.replace(cfg, stored_dtype="bf16")
  rounded = draft_features.write(tmp_path / "b", batches(3), 20, half, model, params).take(picked)
  error = np.abs(rounded["hidden"].astype(np.float32) - stored["hidden"])
  assert 0 < error.max() <= np.abs(stored["hidden"]).max() * 2**-8


def test_writing_goes_on_behind_the_last_whole_shard(tmp_path, target, cfg, monkeypatch):
  model, params, _ = target
  monkeypatch.setattr(draft_features, "SHARD_ROWS", 8)
  whole = draft_features.write(tmp_path / "a", batches(3), 20, cfg, model, params)

  def broken():
    yield from batches(2)
    raise OSError("disk")

  with pytest.raises(OSError, match="disk"):
    draft_features.write(tmp_path / "b", broken(), 20, cfg, model, params)
  moved = jax.tree.map(lambda x: x + 0.01, params)
  with pytest.raises(draft_features.FeatureStoreError, match="target: found"):
    draft_features.write(tmp_path / "b", batches(3), 20, cfg, model, moved)
  before = (tmp_path / "b" / "rows-00000.npz").stat().st_mtime_ns
  again = draft_features.write(tmp_path / "b", batches(3), 20, cfg, model, params)
  assert (tmp_path / "b" / "rows-00000.npz").stat().st_mtime_ns == before
  for key, x in whole.take(np.arange(20)).items():
    np.testing.assert_array_equal(again.take(np.arange(20))[key], x, err_msg=key)
  # All rows of a source, the last batch filled up with rows that weigh nothing.
  masks = [b["loss_mask"] for b in whole.in_order(8)]
  assert [m.shape[0] for m in masks] == [8, 8, 8]
  assert masks[2][:4].sum() > 0 and masks[2][4:].sum() == 0
  other = dataclasses.replace(cfg, stored_dtype="bf16")
  with pytest.raises(draft_features.FeatureStoreError, match="dtype: found 'f32', expected 'bf16'"):
    draft_features.write(tmp_path / "a", batches(3), 20, other, model, params)


def test_epochs_show_every_row_once_in_new_orders():
  class Numbers(draft_features.Rows):
    def __init__(self):
      pass

    def __len__(self):
      return 10

    def take(self, rows):
      return {"row": rows}

  epochs = draft_features.Epochs(Numbers(), 4, seed=3)
  seen = np.concatenate([next(epochs)["row"] for _ in range(5)])
  assert sorted(seen[:10]) == sorted(seen[10:]) == list(range(10))
  assert list(seen[:10]) != list(seen[10:])
  again = draft_features.Epochs(Numbers(), 4, seed=3)
  again.set_state(epochs.get_state() | {"step": 3})
  np.testing.assert_array_equal(next(again)["row"], seen[12:16])
  with pytest.raises(draft_features.FeatureStoreError, match="batch_size: found 4, expected 2"):
    draft_features.Epochs(Numbers(), 2, seed=3).set_state(epochs.get_state())


@pytest.mark.slow
def test_a_run_on_stored_rows_resumes_bitwise_and_measures_the_same_acceptance(
  tmp_path, target, cfg
):
  straight = draft_run.train(cfg, tmp_path / "a", target=target)
  draft_run.train(dataclasses.replace(cfg, num_steps=2), tmp_path / "b", target=target)
  again = draft_run.train(cfg, tmp_path / "b", target=target)
  common.assert_trees_close(again.params, straight.params, atol=0, rtol=0)
  # Step 0: the same draft, so the same acceptance as with the target in the step.
  live = dataclasses.replace(cfg, stored_rows=0, num_steps=1)
  draft_run.train(live, tmp_path / "c", target=target)
  first = [
    json.loads((tmp_path / x / "acceptance.json").read_text())["curves"]["held"][0] for x in "ac"
  ]
  assert first[0] == first[1] and first[0]["acc_1"] >= 0
  # A run may ask for more held-out batches later; the rows stored before are not all of them.
  draft_run.train(dataclasses.replace(cfg, eval_batches=2), tmp_path / "b", target=target)
  indices = (tmp_path / "b" / "features" / "process0of1").glob("eval-held-*/index.json")
  assert sorted(sum(json.loads(i.read_text())["shards"]) for i in indices) == [8, 16]
