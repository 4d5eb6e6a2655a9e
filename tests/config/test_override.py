"""`--set a.b=text`: coercion by type hint, errors that list names, and the printed round trip."""

import ast
import dataclasses

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from minicpm_jax import config
from minicpm_jax.models import zoo

BASE = config.TrainConfig(
  model=zoo.minicpm4_0p5b(),
  data=config.DataConfig(
    sources=(config.SourceConfig(name="a", path="data/a"),),
    phases=(config.PhaseConfig(weights=(("a", 1.0),)),),
  ),
)


def rebuilt(cfg):
  scope = {}
  exec(config.as_python(cfg), scope)
  return scope["get_config"]()


@pytest.mark.smoke
@pytest.mark.parametrize(
  "path, text, value",
  [
    ("num_steps", "1_000", 1000),
    ("optim.peak_lr", "1e-3", 1e-3),
    ("model.tie_embeddings", "false", False),
    ("model.rope.kind", "none", "none"),
    ("model.pad_id", "none", None),
    ("model.pad_id", "7", 7),
    ("model.scale_depth", "1.4", 1.4),
    ("model.stop_ids", "2,73440", (2, 73440)),
    ("profile_steps", "(10, 20)", (10, 20)),
    ("profile_steps", "none", None),
    ("optim.frozen", "embed,lm_head", ("embed", "lm_head")),
    ("init_from", "runs/a@10", "runs/a@10"),
    ("model.mtp.loss_weight", "0.1", 0.1),  # starts from the default MTPConfig
    ("model.moe.num_experts", "4", 4),
    ("data.phases", "none", ValueError),
    ("checkpoint.keep_steps", "[1, 2, 3]", (1, 2, 3)),
  ],
)
def test_values_are_coerced_by_the_type_of_the_field(path, text, value):
  if value is ValueError:
    with pytest.raises(ValueError, match=path):
      config.override(BASE, path, text)
    return
  found = config.override(BASE, path, text)
  for name in path.split("."):
    found = getattr(found, name)
  assert found == value and type(found) is type(value)


@pytest.mark.parametrize(
  "assignment, message",
  [
    ("model.num_layer=4", "num_layer'; valid fields: .*num_layers"),
    ("modle.num_layers=4", "valid fields: .*model"),
    ("model.num_layers=four", "model.num_layers: found 'four', expected int"),
    ("model.num_layers.x=4", "plain value"),
    ("model.rope.kind=yarn", "found 'yarn', expected one of none, linear, dynamic, longrope"),
    ("model.tie_embeddings=maybe", "expected true or false"),
    ("profile_steps=1,2,3", "found 3 values, expected 2"),
    ("model.rope=none", "is a group; set one of its fields: .*theta"),
    ("model.mla.v_head_dim=3", "model.mla"),  # MLA needs arch minicpm3
    ("num_steps", "expected FIELD=VALUE"),
    ("num_steps=0", "num_steps: found 0, expected > 0"),
    ("optim.schedule.min_ratio=2", "schedule.min_ratio: found 2.0"),
  ],
)
def test_bad_assignments_name_the_field(assignment, message):
  with pytest.raises(ValueError, match=message):
    config.overrides(BASE, [assignment])


@pytest.mark.smoke
@pytest.mark.parametrize("name", zoo.ZOO)
def test_printed_config_rebuilds_itself(name):
  cfg = dataclasses.replace(BASE, model=zoo.ZOO[name](mtp=config.MTPConfig(loss_weight=0.1)))
  assert rebuilt(cfg) == cfg
  ast.parse(config.as_python(cfg))


@settings(max_examples=25, deadline=None, derandomize=True)
@given(
  num_steps=st.integers(1, 10**9),
  lr=st.floats(1e-12, 10.0),
  text=st.text(max_size=20),
  keep=st.lists(st.integers(0, 10**6), max_size=4),
  weights=st.lists(st.floats(0.1, 9.0), min_size=1, max_size=3),
)
def test_any_values_survive_the_printed_form(num_steps, lr, text, keep, weights):
  sources = tuple(
    config.SourceConfig(name=f"s{i}", path=text + str(i)) for i in range(len(weights))
  )
  phase = config.PhaseConfig(
    weights=tuple((s.name, w) for s, w in zip(sources, weights, strict=True))
  )
  cfg = config.TrainConfig(
    name=text,
    model=zoo.nano(),
    num_steps=num_steps,
    optim=config.OptimConfig(peak_lr=lr),
    checkpoint=config.CheckpointConfig(keep_steps=tuple(keep)),
    data=config.DataConfig(sources=sources, phases=(phase,)),
  )
  assert rebuilt(cfg) == cfg
  assert config.override(cfg, "optim.peak_lr", repr(lr)).optim.peak_lr == lr
  assert config.override(BASE, "checkpoint.keep_steps", str(keep)).checkpoint.keep_steps == tuple(
    keep
  )
