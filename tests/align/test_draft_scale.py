"""Features at unit size in training: a change of units that files and later runs do not see."""

import dataclasses
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from minicpm_jax import ckpt
from minicpm_jax.align import draft_run, draft_scale
from minicpm_jax.models import draft as draft_lib
from tests.align import small_run
from tests.models import common


@pytest.fixture(scope="module")
def target():
  """A target with a stream some hundred times as large as usual."""
  model, params = common.build(common.config(num_layers=2))
  table = params["embed"]["embedding"] * 300
  return model, params | {"embed": {"embedding": table}}, None


def test_the_exponent_brings_features_of_real_tokens_to_rms_1(target):
  model, params, _ = target
  draft = draft_lib.for_target(model.cfg, "eagle3")
  rng = np.random.default_rng(0)
  segments = np.array([[1] * 7 + [2] * 3, [1] * 4 + [0] * 6], np.int32)
  batch = {"tokens": rng.integers(0, 256, (2, 10)).astype(np.int32), "segment_ids": segments}
  batch["positions"] = np.array([[*range(7), *range(3)], [*range(4), *[0] * 6]], np.int32)
  k = draft_scale.exponent(draft, model, params, batch)
  taps = model.apply(
    {"params": params}, *(batch[n] for n in ("tokens", "positions", "segment_ids")),
    tap_layers=draft.feature_layers,
  ).taps  # fmt: skip
  rms = np.sqrt(np.mean(np.square(np.asarray(taps, np.float64)[segments > 0])))
  assert k < -3
  assert 2**-0.5 <= rms * draft_scale.scaled(draft, k).feature_scale <= 2**0.5
  with pytest.raises(ValueError, match="mean square of 0.0"):
    draft_scale.exponent(draft, model, jax.tree.map(np.zeros_like, params), batch)


def test_training_in_other_units_gives_the_same_file(tmp_path, target):
  """As a run whose config has that scale, bit for bit but for fc, which carries 2^k."""
  cfg = small_run.distill(target[0].cfg, tmp_path, 40, num_steps=1, eval_every=9)
  found = draft_run.train(cfg, tmp_path / "a", target=target)
  k = json.loads((tmp_path / "a" / "feature_exponent.json").read_text())["exponent"]
  assert k < -3
  other = dataclasses.replace(cfg, draft=draft_scale.scaled(cfg.draft, k), unit_features=False)
  expected = draft_run.train(other, tmp_path / "b", target=target).params
  expected["fc"]["kernel"] = expected["fc"]["kernel"] * np.float32(2.0**k)
  common.assert_trees_close(found.params, expected, atol=0, rtol=0)
  loaded = ckpt.load_draft(tmp_path / "a" / "draft", target[0].cfg)
  assert loaded.cfg.feature_scale == cfg.draft.feature_scale
  model, moved = draft_lib.DraftModel(cfg.draft), draft_scale.moved(found.params, 0.5, 2.0)
  feature = np.random.default_rng(0).normal(size=(1, 3, cfg.draft.feature_dim)).astype(np.float32)
  fuse = jax.jit(lambda p: model.apply({"params": p}, jnp.asarray(feature), method="fuse"))
  x, y = fuse(found.params), fuse(moved)
  np.testing.assert_array_equal(y, x / 4)


@pytest.mark.slow
def test_a_run_goes_on_from_such_a_file(tmp_path, target):
  cfg = small_run.distill(target[0].cfg, tmp_path, 40, num_steps=1)
  found = draft_run.train(cfg, tmp_path / "a", target=target)
  more = dataclasses.replace(
    cfg,
    init_from=str(tmp_path / "a" / "draft"),
    optim=dataclasses.replace(cfg.optim, peak_lr=1e-12),
  )
  again = draft_run.train(more, tmp_path / "b", target=target)
  common.assert_trees_close(again.params, found.params, atol=1e-8, rtol=1e-6)
