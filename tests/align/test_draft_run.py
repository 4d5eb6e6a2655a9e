"""A whole draft run: resume is bitwise, the export loads, curves are written, changes refused."""

import dataclasses
import json

import jax.numpy as jnp
import numpy as np
import pytest

from experiments import distill_draft
from minicpm_jax import ckpt, config
from minicpm_jax.align import draft_run
from minicpm_jax.data import shards
from minicpm_jax.models import draft as draft_lib
from minicpm_jax.nn import functional
from minicpm_jax.train import start
from tests.align import small_run
from tests.models import common

SIZE = 40


@pytest.fixture(scope="module")
def target():
  return (*common.build(common.config(num_layers=2)), None)


@pytest.fixture(scope="module")
def cfg(target, tmp_path_factory):
  return small_run.distill(target[0].cfg, tmp_path_factory.mktemp("sources"), SIZE)


def test_resume_is_bitwise_and_what_is_left_behind_loads(tmp_path, target, cfg):
  straight = draft_run.train(cfg, tmp_path / "a", target=target)
  half = draft_run.train(dataclasses.replace(cfg, num_steps=2), tmp_path / "b", target=target)
  again = draft_run.train(cfg, tmp_path / "b", target=target)
  common.assert_trees_close(again.params, straight.params, atol=0, rtol=0)
  assert np.max(np.abs(half.params["fc"]["kernel"] - straight.params["fc"]["kernel"])) > 0
  loaded = ckpt.load_draft(tmp_path / "b" / "draft", target[0].cfg)
  common.assert_trees_close(loaded.params, straight.params, atol=0, rtol=0)
  # The reduced vocabulary: the most frequent ids of the training text, sorted; stop ids are in.
  counts = np.zeros(256, int)
  for x in np.random.default_rng(0).integers(0, 256, (20, 40)).reshape(-1):
    counts[x**2 // 256] += 1
  assert np.all(np.diff(loaded.ids) > 0) and loaded.ids.size == SIZE and 2 in loaded.ids
  assert counts[loaded.ids].sum() >= np.sort(counts)[::-1][: SIZE - 1].sum()
  curves = json.loads((tmp_path / "b" / "acceptance.json").read_text())["curves"]["held"]
  assert [row["step"] for row in curves] == [0, 2, 4]
  assert all(0 <= row["acc_1"] <= 1 for row in curves)
  with pytest.raises(start.WorkdirError, match="ttt_steps: found 2, expected 3"):
    draft_run.train(dataclasses.replace(cfg, ttt_steps=3), tmp_path / "b", target=target)


def test_an_eagle3_head_may_start_as_the_targets(target, cfg):
  """On the target's own last stream it gives the target's logits of the reduced vocabulary."""
  model, params, _ = target
  ids = np.sort(np.random.default_rng(0).permutation(256)[:SIZE])
  x = jnp.asarray(np.random.default_rng(1).normal(size=(1, 3, 32)), jnp.float32)
  scaled = functional.rms_norm(x, params["final_norm"]["scale"], model.cfg.norm_eps)
  expected = model.apply({"params": params}, scaled, method="unembed")[..., ids]
  head = draft_run._head_of(model.cfg, params, ids)
  found = draft_lib.DraftModel(cfg.draft).apply({"params": head}, x, method="logits")
  np.testing.assert_allclose(found, expected, atol=1e-4)


def test_a_draft_for_another_target_is_refused(tmp_path, cfg):
  other = (*common.build(common.config(num_layers=2, vocab_size=300)), None)
  with pytest.raises(ValueError, match="vocab_size: found 256, expected the target's 300"):
    draft_run.train(cfg, tmp_path / "a", target=other)


@pytest.mark.slow
def test_a_mesh_with_sharded_weights_equals_copies(tmp_path, target, cfg):
  one = dataclasses.replace(cfg, mesh=config.MeshConfig(dp=8), num_steps=2)
  many = dataclasses.replace(one, mesh=config.MeshConfig(fsdp=2, tp=2, dp=2))
  first = draft_run.train(one, tmp_path / "a", target=target)
  second = draft_run.train(many, tmp_path / "b", target=target)
  # Two updates of Adam at rate 0.01, which amplify the rounding of small gradients.
  common.assert_trees_close(second.params, first.params, atol=1e-4)


@pytest.mark.parametrize(
  "args, match",
  [
    ([], "--workdir: found none"),
    (["--workdir=x"], "--target: found none"),
    (["--workdir=x", "--target=nowhere"], "target: found 'nowhere'"),
    (["--workdir=x", "--kind=medusa"], "kind"),
    (["--workdir=x", "oops"], "arguments: found 'oops'"),
  ],
)
def test_bad_flags_are_one_line(tmp_path, monkeypatch, capsys, args, match):
  monkeypatch.chdir(tmp_path)
  assert distill_draft.main(["distill_draft", *args]) == 1
  assert match in capsys.readouterr().err


@pytest.mark.slow
def test_command_regenerates_text_and_trains_from_the_mtp_module(tmp_path, capsys):
  """A run folder as target: its own text, then int4 training from the draft of the first run."""
  from minicpm_jax.ckpt import orbax_io
  from minicpm_jax.models import convert

  model, params = common.build(common.config(num_layers=2, mtp=config.MTPConfig()))
  orbax_io.import_params(tmp_path / "target", model.cfg, params)
  texts = small_run.source(tmp_path, "text", 0)
  common_args = [f"--target={tmp_path / 'target'}", f"--data=text:{texts.path}", "--steps=2"]
  for item in ("data.seq_len=16", "data.batch_size=8", "eval_every=1", "log_every=1"):
    common_args.append(f"--set={item}")
  first = [f"--workdir={tmp_path / 'one'}", "--from_mtp", "--regenerate=6", "--regenerate_tokens=8"]
  assert distill_draft.main(["x", *common_args, *first]) == 0
  assert "generated_heldout: acc_1" in capsys.readouterr().out
  index = shards.read_index(tmp_path / "one" / "generated" / "train")
  assert index.num_documents == 6 and index.num_tokens >= 6 * 40
  draft = ckpt.load_draft(tmp_path / "one" / "draft", model.cfg)
  start_cfg, start_params = convert.mtp_to_eagle(model.cfg, params)
  assert draft.cfg.residual_scale == start_cfg.residual_scale
  moved = np.abs(
    np.asarray(draft.params["fc"]["kernel"]) - np.asarray(start_params["fc"]["kernel"])
  )
  assert 0 < moved.max() < 1e-3
  second = [f"--workdir={tmp_path / 'two'}", f"--init_from={tmp_path / 'one' / 'draft'}"]
  assert distill_draft.main(["x", *common_args, *second, "--int4=16"]) == 0
  assert distill_draft.main(["x", f"--workdir={tmp_path / 'two'}"]) == 0  # nothing left to do
  third = [f"--workdir={tmp_path / 'three'}", f"--init_from={tmp_path / 'two' / 'draft_int4'}"]
  assert distill_draft.main(["x", *common_args, *third]) == 1
  assert "draft_int4: found quantised weights, expected floats" in capsys.readouterr().err
