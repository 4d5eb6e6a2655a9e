"""The command lines: two local processes give the losses of one; long continuation; refusals."""

import dataclasses
import os
import pathlib
import subprocess
import sys

import jax
import numpy as np
import portpicker
import pytest

from experiments import continue_long
from minicpm_jax import config
from minicpm_jax.ckpt import orbax_io, run_config
from minicpm_jax.core import logging as logging_lib
from minicpm_jax.core import mesh as mesh_lib
from minicpm_jax.models import transformer
from minicpm_jax.optim import build
from minicpm_jax.train import loop
from minicpm_jax.train import start as start_lib
from minicpm_jax.train import step as step_lib
from tests import words
from tests.models import common

ROOT = pathlib.Path(__file__).parents[2]
SEQ, VOCAB = 32, words.NumberTokenizer.vocab_size


@pytest.fixture(scope="module")
def base(tmp_path_factory) -> config.TrainConfig:
  """Every document fills one row, in file order: all hosts together see the rows of one host."""
  folder = tmp_path_factory.mktemp("data")
  rng = np.random.default_rng(0)
  texts = [words.text_of(rng.integers(2, VOCAB, SEQ - 1)) for _ in range(48)]
  source = words.write_source(folder, "a", texts)
  return config.TrainConfig(
    model=words.model_config(VOCAB),
    optim=config.OptimConfig(peak_lr=0.01, schedule=config.ScheduleConfig(warmup_steps=1)),
    data=config.DataConfig(
      sources=(source,),
      phases=(config.PhaseConfig(weights=(("a", 1.0),)),),
      seq_len=SEQ,
      batch_size=8,
      shuffle=False,
    ),
    checkpoint=config.CheckpointConfig(every_steps=0),
    num_steps=3,
    log_every=1,
    eval_sources=("a",),
    eval_batches=0,
  )


def start(devices, *args, module="experiments.pretrain"):
  flags = f"--xla_force_host_platform_device_count={devices} --xla_backend_optimization_level=0"
  return subprocess.Popen(
    [sys.executable, "-m", module, *args],
    cwd=ROOT,
    env={**os.environ, "XLA_FLAGS": flags, "JAX_PLATFORMS": "cpu"},
    stdout=subprocess.PIPE,
    stderr=subprocess.PIPE,
    text=True,
  )


def finish(process):
  out, err = process.communicate(timeout=400)
  return process.returncode, out, err


def test_two_processes_give_the_losses_of_one(base, tmp_path):
  """2 x 2 devices, fsdp over all four, against one process with four; all three at once."""
  cfg = dataclasses.replace(base, mesh=config.MeshConfig(dp=1, fsdp=4))
  path = run_config.write(tmp_path, cfg)
  port = portpicker.pick_unused_port()
  single = start(4, f"--config={path}", f"--workdir={tmp_path / 'one'}")
  pair = [
    start(
      2,
      f"--config={path}",
      f"--workdir={tmp_path / 'two'}",
      f"--coordinator=127.0.0.1:{port}",
      "--num_processes=2",
      f"--process_id={i}",
    )
    for i in range(2)
  ]
  results = [finish(p) for p in (single, *pair)]
  assert [r[0] for r in results] == [0, 0, 0], results[-1][2][-3000:] + results[0][2][-3000:]
  one, two = (logging_lib.read_metrics(tmp_path / name) for name in ("one", "two"))
  assert [r["step"] for r in one] == [r["step"] for r in two] == [1, 2, 3, 3]
  for a, b in zip(one, two, strict=True):
    for name in ("loss", "grad_norm", "tokens_seen", "eval/a/loss", "eval/a/bits_per_byte"):
      assert (name in a) == (name in b)
      if name in a:
        assert b[name] == pytest.approx(a[name], rel=1e-5), name
  positions = sorted(p.name for p in (tmp_path / "two/checkpoints/3/data").glob("process*"))
  assert positions == ["process_0-of-2.json", "process_1-of-2.json"]
  assert "2 processes" in results[1][1] and "loss" not in results[2][1]  # one process prints
  one, two = (orbax_io.load_run(tmp_path / name)[1] for name in ("one", "two"))
  for a, b in zip(jax.tree.leaves(one), jax.tree.leaves(two), strict=True):
    np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5)


@pytest.fixture(scope="module")
def source(base, tmp_path_factory):
  """(folder, model, params) of imported weights."""
  folder = tmp_path_factory.mktemp("source") / "run"
  model = transformer.Transformer(base.model)
  params = transformer.init_params(model, jax.random.key(0))
  orbax_io.import_params(folder, base.model, params)
  return folder, model, params


@pytest.mark.parametrize("changes", [{"vocab_multiple": 48}, {"moe": config.MoEConfig()}])
def test_weights_are_converted_without_changing_the_function(base, source, changes):
  """Untied head (MiniCPM section 7.2), padded vocabulary, upcycled experts (7.3): equal logits."""
  folder, model, params = source
  tokens = jax.random.randint(jax.random.key(1), (2, 8), 0, VOCAB)
  expected = common.apply(model, params, tokens).logits
  cfg = dataclasses.replace(base.model, tie_embeddings=False, **changes)
  model, mesh = transformer.Transformer(cfg), mesh_lib.make_mesh(config.MeshConfig(tp=2))
  tx = build.make_optimizer(base.optim, cfg, transformer.abstract_params(model)[0])
  abstract = step_lib.abstract_state(model, tx, mesh)
  with jax.set_mesh(mesh):
    params, _ = start_lib.load_weights(str(folder), model, abstract, mesh, 0)
    found = common.apply(model, params, tokens).logits
  np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-5)


def test_continue_long(base, source, tmp_path):
  """32 -> 64 tokens by LongRoPE with a curriculum, untied head: one schedule, growing rows."""
  rope = config.RopeConfig(
    kind="longrope",
    theta=1e6,
    short_factor=(1.0,) * 4,
    long_factor=(1.0, 1.5, 2.0, 4.0),
    original_max_position=32,
  )
  cfg = dataclasses.replace(
    base,
    model=dataclasses.replace(base.model, rope=rope, max_position=128, tie_embeddings=False),
    data=dataclasses.replace(base.data, batch_size=16),
    num_steps=4,
    eval_sources=(),
    init_from=str(source[0]),
  )
  planned = continue_long.stages(cfg, tmp_path / "long", (32, 64))
  assert [(c.data.seq_len, c.data.batch_size, c.num_steps) for c, _ in planned] == [
    (32, 16, 2),
    (64, 8, 4),
  ]
  for stage, workdir in planned:
    result = loop.train(stage, workdir)
  assert int(result.state.step) == 4 and result.values["tokens_seen"] == 4 * 512
  assert result.state.params["lm_head"]["kernel"].shape == (32, VOCAB)
  assert run_config.read(tmp_path / "long/length_64").branch_from.endswith("length_32@2")


@pytest.mark.parametrize(
  "changes, lengths, text",
  [
    ({"init_from": None}, (), "init_from: found None"),
    ({}, (64, 32), "expected growing lengths"),
    ({}, (128,), "expected at most max_position 64"),
    ({}, (48,), "expected a divisor of 256 tokens a step"),
  ],
)
def test_continue_long_refuses(base, tmp_path, changes, lengths, text):
  cfg = dataclasses.replace(base, **({"init_from": "somewhere"} | changes))
  with pytest.raises(ValueError, match=text):
    continue_long.stages(cfg, tmp_path, lengths)


@pytest.mark.parametrize("module", ["experiments.pretrain", "experiments.continue_long"])
def test_bad_input_is_one_line(tmp_path, module):
  status, _, err = finish(start(1, "--config=no_such", f"--workdir={tmp_path}", module=module))
  assert status == 1 and "found 'no_such', expected one of" in err.splitlines()[-1]
  assert "Traceback" not in err and not list(tmp_path.iterdir())
