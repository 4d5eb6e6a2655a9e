"""A sweep over every field of every config: what has no place there is refused by the field's name.

The classes are called as outside the tests, without beartype's look at the arguments.
"""

import dataclasses
import enum
import math
import types
import typing

import numpy as np
import pytest

from minicpm_jax import config
from minicpm_jax.infer.drafters import bita, chain, eagle, hierarchical, ngram
from minicpm_jax.models import bita as bita_lib
from minicpm_jax.models import draft as draft_lib
from minicpm_jax.models import transformer, zoo

NANO = zoo.nano()
TARGET = transformer.Transformer(NANO)
SHAPE = dict(vocab_size=9, model_dim=8, num_layers=1, num_kv_heads=1, head_dim=8)
DRAFT = draft_lib.for_target(NANO, "eagle")
REQUIRED = {  # fields without a default
  config.ModelConfig: {f.name: getattr(NANO, f.name) for f in dataclasses.fields(NANO)},
  config.TrainConfig: dict(model=NANO),
  config.DraftConfig: dict(kind="eagle", layer=DRAFT.layer),
  config.BitaConfig: SHAPE,
  config.DistillConfig: dict(target="t", draft=DRAFT, optim=config.OptimConfig()),
  config.SourceConfig: dict(name="a", path="b"),
  config.PhaseConfig: dict(weights=(("a", 1.0),)),
  chain.ChainDrafter: dict(model=TARGET),
  hierarchical.HierarchicalDrafter: dict(model=TARGET, inner=ngram.NGramDrafter(num_levels=2)),
  eagle.EagleDrafter: dict(cfg=DRAFT),
  bita.BitaDrafter: dict(model=TARGET, cfg=bita_lib.for_target(NANO)),
}
CONFIGS = [getattr(config, name) for name in config.__all__ if name.endswith("Config")]
DRAFTERS = [kind for kind in REQUIRED if not kind.__name__.endswith("Config")]
KINDS = [*CONFIGS, *DRAFTERS, ngram.NGramDrafter]
SIGNED = {  # numbers that may be negative: -7 is fine there
  "SamplingConfig.seed",
  "TrainConfig.seed",
  "DistillConfig.seed",
  "InferConfig.random_seed",
  "ModelConfig.bos_id",
  "ModelConfig.pad_id",
}
STRANGER = object()


def bad_values(hint):
  """What a field of this hint must refuse."""
  origin, args = typing.get_origin(hint), typing.get_args(hint)
  if origin in (typing.Union, types.UnionType):
    lists = [bad_values(part) for part in args if part is not type(None)]
    common = [x for x in lists[0] if all(any(x is y for y in other) for other in lists)]
    return [x for x in common if x is not None or type(None) not in args]
  found = [None, math.nan, STRANGER]
  if hint is int:
    return [*found, "x", True, 1.5, -7]
  if hint is float:
    return [*found, "x", True, -7]
  if hint is bool:
    return [*found, "x", 3, -7]
  if hint is str:
    return [*found, 3, True, -7]
  if origin is typing.Literal:
    return [*found, "x", 1.5, True, -7]
  if origin is tuple:
    inside = [x for x in bad_values(args[0]) if x != -7]
    return [*found, "x", 3, True, *((x,) for x in inside)]
  return [*found, "x", 3, True, -7] if isinstance(hint, type) else []


def make(kind, fields):
  made = object.__new__(kind)
  for field in dataclasses.fields(kind):
    object.__setattr__(made, field.name, fields.get(field.name, field.default))
  made.__post_init__()
  return made


@pytest.mark.parametrize("kind", KINDS, ids=lambda kind: kind.__name__)
def test_every_field_refuses_what_has_no_place_there(kind):
  given = REQUIRED.get(kind, {})
  make(kind, given)
  hints, silent, num = typing.get_type_hints(kind), [], 0
  for field in dataclasses.fields(kind):
    for bad in bad_values(hints[field.name]):
      if bad == -7 and f"{kind.__name__}.{field.name}" in SIGNED:
        continue
      num += 1
      try:
        make(kind, given | {field.name: bad})
      except (ValueError, TypeError) as error:
        if field.name in str(error):
          continue
        silent.append((field.name, bad, str(error)))
      else:
        silent.append((field.name, bad, "accepted"))
  assert not silent, "\n".join(f"{kind.__name__}.{n}: {b!r}: {why}" for n, b, why in silent)
  assert num >= 3


def test_what_a_hint_allows_passes():
  """Whole numbers and numpy's for floats, None where the hint has it, lists for tuples, words of
  numpy and of enumerations for those of a Literal."""
  word = enum.StrEnum("Word", {"linear": "linear"})
  for kind in (np.str_("linear"), word.linear):
    make(config.RopeConfig, dict(kind=kind, factor=2))
  for value in (1, np.float32(0.5), np.int64(2)):
    make(config.OptimConfig, dict(peak_lr=value))
  make(config.InferConfig, dict(random_seed=None, draft_kind=None, shrinks=None, model_type="auto"))
  made = make(config.TrainConfig, dict(model=NANO, profile_steps=[3, 5], eval_sources=[]))
  assert made == config.TrainConfig(model=NANO, profile_steps=(3, 5)) and hash(made)
  phase = make(config.PhaseConfig, dict(weights=[["a", 1.0]]))
  assert phase == config.PhaseConfig(weights=(("a", 1.0),)) and hash(phase)
