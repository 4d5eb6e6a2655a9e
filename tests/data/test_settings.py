"""Stages and settings refuse wrong types, NaN and negative numbers, and name the field."""

import dataclasses
import math
import re

import pytest

from minicpm_jax import config
from minicpm_jax.align import distill
from minicpm_jax.data import (
  classifier,
  decontaminate,
  dedup,
  documents,
  filters,
  judge,
  langid,
  pii,
  repetition,
  rounds,
  scalingbench,
  scoring,
  seeds,
  semantic,
  tolerant,
  ultraclean,
)
from minicpm_jax.deploy import quantize
from minicpm_jax.quant import gptq
from minicpm_jax.quant import prefix as prefix_lib
from minicpm_jax.tunnel import plan, search, verification

_SOURCE = config.SourceConfig(name="c", path="p")
_RUN = plan.RunSpec(
  name="a", model=plan.small_model(32), optim=config.OptimConfig(), num_steps=200, save_steps=(9,)
)
SETTINGS = (
  classifier.ClassifierConfig(),
  decontaminate.Decontaminate(paths=()),
  dedup.MinHash(),
  documents.Doc(id="1", text="a"),
  filters.GopherQuality(),
  filters.C4Quality(),
  filters.FineWebQuality(),
  filters.published(),
  judge.JudgeConfig(model_id="m"),
  langid.LanguageFilter(),
  pii.MaskPII(),
  repetition.GopherRepetition(),
  rounds.RoundsConfig(),
  scalingbench.Item(task="t", id="1", input="a", target="b"),
  scoring.ScoreStage(()),
  seeds.SeedPool(name="a", path="p", lang="en", kind="web"),
  semantic.HashedNGrams(),
  tolerant.Reader(),
  ultraclean.WhitespaceSegmenter(),
  ultraclean.CharacterSegmenter(),
  quantize.QuantizeConfig(),
  gptq.GPTQConfig(),
  prefix_lib.Tally(2),
  _RUN,
  search.Log(1.0, 2.0),
  verification.VerificationConfig(checkpoints=("a@1",), candidate=_SOURCE),
  distill.DistillLoss(),
)


def untyped(made, **fields):
  """What __post_init__ says of changed fields, without beartype's look at the arguments."""
  new = object.__new__(type(made))
  for name, value in (vars(made) | fields).items():
    object.__setattr__(new, name, value)
  new.__post_init__()


@pytest.mark.parametrize("made", SETTINGS, ids=lambda made: type(made).__name__)
def test_a_wrong_value_is_refused_by_its_field(made):
  untyped(made)  # the settings themselves pass
  for field in dataclasses.fields(made):
    value = getattr(made, field.name)
    if field.name in ("counts_L", "num_sequences", "ids"):
      continue  # of a tally: what it counts
    wrong = [object(), b"bytes"]  # nothing takes these
    wrong += [math.nan, -1.0] if isinstance(value, float) else []
    wrong += [math.nan, "1", True, 1.5] if type(value) is int else []
    wrong += ["no", 1] if isinstance(value, bool) else []
    wrong += ["abc", (object(),)] if isinstance(value, tuple) else []
    wrong += [3, None] if isinstance(value, str) else []
    for bad in wrong:
      with pytest.raises(ValueError, match=re.escape(field.name)):
        untyped(made, **{field.name: bad})


@pytest.mark.parametrize(
  "made, name, bad",
  [
    (gptq.GPTQConfig(), "damp", math.inf),
    (distill.DistillLoss(), "temperature", math.inf),
    (rounds.RoundsConfig(), "mult", math.inf),
    (classifier.ClassifierConfig(), "lr", math.inf),
    (judge.JudgeConfig(model_id="m"), "batch_size", 0),
    (decontaminate.Decontaminate(paths=()), "size", 0),
    (decontaminate.Decontaminate(paths=()), "remove", "line"),
    (dedup.MinHash(), "seed", -1),
    (repetition.GopherRepetition(), "top", ((0, 0.2),)),
    (repetition.GopherRepetition(), "repeated", ((5, math.nan),)),
    (semantic.HashedNGrams(), "sizes", ()),
    (_RUN, "branch_from", ("trunk",)),
    (verification.VerificationConfig(checkpoints=("a",), candidate=_SOURCE), "max_epochs", 0.0),
  ],
)
def test_values_out_of_range(made, name, bad):
  with pytest.raises(ValueError, match=name):
    untyped(made, **{name: bad})


def test_what_stands_for_a_kind_passes():
  """Lists for tuples, paths for text, no limit as inf, integers for numbers."""
  untyped(pii.MaskPII(), kinds=["email"])
  untyped(filters.GopherQuality(), max_mean_length=math.inf, max_symbols=1)
