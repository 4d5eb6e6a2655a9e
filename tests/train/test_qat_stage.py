"""The switch from full precision to ternary training, as two runs of the ordinary loop."""

import dataclasses

import jax
import numpy as np
import pytest

from minicpm_jax import config
from minicpm_jax.ckpt import orbax_io
from minicpm_jax.core import logging as logging_lib
from minicpm_jax.core import mesh as mesh_lib
from minicpm_jax.core import trees
from minicpm_jax.models import convert, transformer
from minicpm_jax.optim import build
from minicpm_jax.train import loop, start
from minicpm_jax.train import step as step_lib


@pytest.fixture(scope="module")
def stages(train_config, tmp_path_factory):
  """(workdir of the first stage after 3 of 6 steps, config of the second)."""
  folder = tmp_path_factory.mktemp("stages")
  qat = config.QATConfig(share=0.5, lr_peak=0.01, rewarmup_steps=2)
  first, second = config.qat_stages(train_config, qat, first_workdir=str(folder / "dense"))
  result = loop.train(first, folder / "dense")
  assert result.step == 3
  return folder, second


def test_switch_restores_weights_and_resets_step_moments_and_schedule(stages):
  folder, second = stages
  result = loop.train(second, folder / "ternary")
  rows = [r for r in logging_lib.read_metrics(folder / "ternary") if "loss" in r]
  assert [r["step"] for r in rows] == [1, 2, 3]
  # re-warm-up over 2 steps, no stable part left, one step of decay to 0.1
  np.testing.assert_allclose([r["learning_rate"] for r in rows], [0.005, 0.01, 0.001], rtol=1e-5)
  assert 0.2 < rows[0]["zero_share"] < 0.4 and 0 < rows[0]["flip_rate"] < 0.5
  flat = trees.flatten_paths(jax.device_get(result.state.opt_state))
  assert int(next(x for path, x in flat.items() if path.endswith("count"))) == 3
  # what was trained are latent weights: the run loads as a model that quantises them
  model, params, _ = orbax_io.load_run(folder / "ternary")
  assert model.cfg.quant == config.QuantConfig()
  # a fused checkpoint is refused as the start of another such stage
  fused_cfg, fused = convert.fuse(model.cfg, params)
  orbax_io.import_params(folder / "fused", fused_cfg, fused)
  again = dataclasses.replace(second, init_from=str(folder / "fused"))
  with pytest.raises(ValueError, match="attn/k/kernel: found weights that are quantised already"):
    loop.train(again, folder / "again")
  # and so are codes
  packed_cfg, packed = convert.to_codes(model.cfg, params)
  orbax_io.import_params(folder / "codes", packed_cfg, packed)
  again = dataclasses.replace(second, init_from=str(folder / "codes"))
  with pytest.raises(ValueError, match="init_from .*attn/k/kernel: found a QTensor \\(ternary\\)"):
    loop.train(again, folder / "again")


def test_moments_can_be_kept(stages):
  folder, second = stages
  cfg = dataclasses.replace(second, keep_moments=True)
  model, mesh = transformer.Transformer(cfg.model), mesh_lib.make_mesh(cfg.mesh)
  optimizer = build.make_optimizer(cfg.optim, cfg.model, transformer.abstract_params(model)[0])
  with jax.set_mesh(mesh):
    abstract = step_lib.abstract_state(model, optimizer, mesh)
    with orbax_io.CheckpointStore(folder / "kept", cfg.checkpoint) as store:
      begun = start.begin(cfg, model, optimizer, abstract, mesh, store)
    source, step, _ = orbax_io.open_run(folder / "dense")
    with source:
      params = source.params(step, abstract.params)
      moments = source.opt_state(step, abstract.opt_state)
  assert begun.step == 0 and int(begun.state.step) == 0 and "moments" in begun.description
  jax.tree.map(np.testing.assert_array_equal, begun.state.params, params)
  jax.tree.map(np.testing.assert_array_equal, begun.state.opt_state, moments)
