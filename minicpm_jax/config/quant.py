"""Low-bit weights: which kernels, which scheme, which form the parameters have."""

import dataclasses
import re
from typing import Literal

from minicpm_jax.config.dtypes import DTypeName
from minicpm_jax.config.validate import require, require_hints

SchemeName = Literal["none", "ternary", "asym", "half", "sym", "five", "int4", "int8"]
WeightsForm = Literal["latent", "codes", "packed"]

# Projections of attention (GQA and latent), MLP and experts: never embedding, head, norms, router.
PROJECTIONS = r"(^|/)(attn|mlp|moe)/(q|k|v|o|gate|up|down|q_a|q_b|kv_a|kv_b)/kernel$"
# For running only (codes, packed): an untied model's head, and the table of embeddings, which is
# also the head of a tied one.
HEAD = r"^lm_head/kernel$"
EMBEDDING = r"^embed/embedding$"


@dataclasses.dataclass(frozen=True, kw_only=True)
class FP8Config:
  """Block-wise FP8 matmuls: forward and input gradient; the weight gradient stays (section 9).

  block: activations in tiles of 1 x 128 along the contraction, weights in 128 x 128. tensor: one
  scale a matrix, for comparison.
  """

  granularity: Literal["block", "tensor"] = "block"
  format: Literal["e4m3", "e5m2"] = "e4m3"
  power_of_two_scales: bool = False
  wgrad_dtype: DTypeName = "bf16"  # inputs of the weight gradient's product; sums are float32

  def __post_init__(self):
    require_hints(self, "fp8.")


@dataclasses.dataclass(frozen=True, kw_only=True)
class QuantConfig:
  """How the kernels at paths matching `include` (and not `exclude`) are quantised.

  weights says what a parameter leaf is: "latent" floats that every forward fake-quantises with a
  straight-through gradient (training), or a QTensor of "codes" or "packed" codes (running).
  """

  scheme: SchemeName = "ternary"
  group_size: int = -1  # input channels that share a scale; -1 = one scale per output channel
  weights: WeightsForm = "latent"
  scale_dtype: DTypeName = (
    "f32"  # scales are rounded to it before codes are taken; f16 = GGUF, GPTQ
  )
  scale_shards: int = 1  # group_size -1: o and down keep one scale for each part of their inputs
  include: tuple[str, ...] = (PROJECTIONS,)  # regexes searched in parameter paths
  exclude: tuple[str, ...] = ()
  act_bits: Literal[8] | None = None  # per-token absmax int8 of the inputs; BitCPM4 leaves it off
  fp8: FP8Config | None = None  # the matmuls of training; with scheme "none": FP8 training alone

  def __post_init__(self):
    require_hints(self, "quant.")
    size = self.group_size
    require(size == -1 or size > 0, "quant.group_size", size, "-1 or input channels > 0")
    require(self.scale_shards > 0, "quant.scale_shards", self.scale_shards, "an integer > 0")
    require(
      self.scale_shards == 1 or size == -1,
      "quant.scale_shards",
      self.scale_shards,
      f"1 with group_size {size} (groups already lie inside shards)",
    )
    require(len(self.include) > 0, "quant.include", self.include, "at least one pattern")
    for name in ("include", "exclude"):
      for pattern in getattr(self, name):
        try:
          re.compile(pattern)
        except re.error as error:
          require(False, f"quant.{name}", pattern, f"a regular expression ({error})")
    if self.scheme == "none":
      require(self.weights == "latent", "quant.weights", self.weights, "latent for scheme 'none'")
    if self.weights != "latent":
      require(self.fp8 is None, "quant.fp8", self.fp8, f"None with weights {self.weights!r}")

  def selects(self, path: str) -> bool:
    """True for the parameter paths that this config quantises."""
    hit = any(re.search(p, path) for p in self.include)
    return hit and not any(re.search(p, path) for p in self.exclude)
