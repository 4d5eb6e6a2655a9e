"""--config, --set, --data and the distributed flags."""

import jax
import pytest
from absl import flags

from experiments import _flags
from minicpm_jax import config


def parsed(*args):
  """The flags as if a process had been started with these arguments."""
  values = flags.FlagValues()
  _flags.define(values)
  values(["program", *args])
  return values


def test_config_set_and_data_apply_in_this_order():
  cfg = _flags.get_config(
    parsed(
      "--config=minicpm4_0p5b:tiny,steps=30",
      "--set=optim.peak_lr=0.5",
      "--set=data.batch_size=4",
      "--data=web:/data/web:0.9/0.4",
      "--data=good:/data/good:0.1/0.6",
      "--data=held:/data/held:eval",
    )
  )
  assert (cfg.optim.peak_lr, cfg.data.batch_size, cfg.num_steps) == (0.5, 4, 30)
  assert [(s.name, s.path) for s in cfg.data.sources] == [
    ("web", "/data/web"),
    ("good", "/data/good"),
    ("held", "/data/held"),
  ]
  assert [p.weights for p in cfg.data.phases] == [
    (("web", 0.9), ("good", 0.1)),
    (("web", 0.4), ("good", 0.6)),
  ]
  assert [p.start_step for p in cfg.data.phases] == [0, cfg.optim.schedule.decay_start]
  assert cfg.eval_sources == ("held",)


def test_weight_zero_leaves_a_source_out_of_a_phase():
  cfg = _flags.with_sources(_flags.load("nano"), ["a:x", "b:y:0/2"])
  assert [p.weights for p in cfg.data.phases] == [(("a", 1.0),), (("a", 1.0), ("b", 2.0))]


@pytest.mark.parametrize(
  "texts, message",
  [
    (["web"], "'web', expected NAME:PATH"),
    (["web:"], "expected NAME:PATH"),
    (["web:x:heavy"], "weight 'heavy'"),
    (["web:x:1/2/3"], "3 weights.*2 phases"),
    (["web:x:eval"], "only evaluation sources"),
    (["web:x", "web:y"], r"data\.sources.*unique"),
    (["web:x:-1/1"], r"weight '-1/1' in 'web:x:-1/1', expected numbers >= 0"),
    (["web:x", "good:y:nan"], "weight 'nan'"),
  ],
)
def test_bad_data_flags_are_refused(texts, message):
  with pytest.raises(ValueError, match=message):
    _flags.with_sources(_flags.load("nano"), texts)


def test_a_config_file_anywhere_and_the_errors(tmp_path):
  cfg = _flags.load("nano:tiny")
  path = tmp_path / "config.py"
  path.write_text(config.as_python(cfg))
  assert _flags.load(f"{path}:ignored") == cfg  # as_python rebuilds the run
  with pytest.raises(ValueError, match="'nanoo', expected one of .*minicpm_2b.*nano"):
    _flags.load("nanoo")
  with pytest.raises(ValueError, match="no file .*missing.py"):
    _flags.load(str(tmp_path / "missing.py"))
  path.write_text("x = 1\n")
  with pytest.raises(ValueError, match="without get_config"):
    _flags.load(str(path))
  with pytest.raises(ValueError, match="--config: found none, expected one of .*nano"):
    _flags.get_config(parsed())
  with pytest.raises(ValueError, match="--workdir"):
    _flags.get_workdir(parsed())
  with pytest.raises(ValueError, match="valid fields: .*num_layers"):
    _flags.get_config(parsed("--config=nano", "--set=model.layers=2"))


def test_distributed_flags_reach_jax(monkeypatch):
  calls = []
  monkeypatch.setattr(jax.distributed, "initialize", lambda *a, **k: calls.append((a, k)))
  _flags.start_distributed(parsed())
  assert calls == []
  _flags.start_distributed(parsed("--distributed"))
  _flags.start_distributed(parsed("--coordinator=h:1", "--num_processes=2", "--process_id=1"))
  assert [a for a, _ in calls] == [(None,), ("h:1",)]
  assert calls[1][1] == {"num_processes": 2, "process_id": 1}
  with pytest.raises(ValueError, match="coordinator"):
    _flags.start_distributed(parsed("--num_processes=2", "--process_id=1"))


def test_a_config_that_is_no_python_is_named(tmp_path):
  with pytest.raises(ValueError, match="notes.txt, expected a path.py or one of"):
    _flags.load(str(tmp_path / "notes.txt"))
