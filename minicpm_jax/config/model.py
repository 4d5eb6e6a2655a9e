"""Model configuration of the MiniCPM family (shapes, multipliers, rope, MoE, MLA, MTP, sparse).

Data only: no jax import, no callables. Values of released members live in `models/zoo.py`;
the mapping to and from Hugging Face `config.json` lives in `ckpt/hf_config.py`.
"""

import dataclasses
import math
from typing import Any, Literal

from minicpm_jax.config.dtypes import DTypeName
from minicpm_jax.config.quant import QuantConfig
from minicpm_jax.config.validate import require, require_hints


@dataclasses.dataclass(frozen=True, kw_only=True)
class RopeConfig:
  """Rotary position embedding: plain, linear, dynamic NTK or LongRoPE (models.md 3.3-3.6).

  `kind` names the *scaling*; "none" is plain RoPE, not "no RoPE".
  """

  kind: Literal["none", "linear", "dynamic", "longrope"] = "none"
  theta: float = 10000.0
  factor: float | None = None  # linear, dynamic: required. longrope: replaces M/O in the scale m
  short_factor: tuple[float, ...] = ()  # longrope, length rotary_dim / 2
  long_factor: tuple[float, ...] = ()  # longrope, length rotary_dim / 2
  original_max_position: int | None = None  # longrope: O, tokens

  def __post_init__(self):
    require_hints(self, "rope.")
    require(self.theta > 0, "rope.theta", self.theta, "a positive number")
    for name in ("factor", "original_max_position"):
      value = getattr(self, name)
      require(value is None or value > 0, f"rope.{name}", value, "None or a number > 0")
    if self.kind in ("linear", "dynamic"):
      ok = self.factor is not None and self.factor >= 1
      require(ok, "rope.factor", self.factor, f"a number >= 1 for kind {self.kind!r}")
    if self.kind == "longrope":
      same = len(self.short_factor) == len(self.long_factor)
      found = (len(self.short_factor), len(self.long_factor))
      require(same and found[0] > 0, "rope.short_factor/long_factor", found, "equal lengths > 0")
      for name in ("short_factor", "long_factor"):
        values = getattr(self, name)
        require(all(x > 0 for x in values), f"rope.{name}", min(values), "positive numbers")
      ok = self.original_max_position is not None and self.original_max_position > 1
      require(
        ok, "rope.original_max_position", self.original_max_position, "tokens > 1 for longrope"
      )


@dataclasses.dataclass(frozen=True, kw_only=True)
class SparseAttentionConfig:
  """InfLLM v2 switch, same weights with or without it (infllm_v2.md sections 1 and 7)."""

  kernel_size: int = 32  # tokens pooled into one fine compressed key
  kernel_stride: int = 16  # tokens between fine compressed keys
  init_blocks: int = 1  # blocks at the start that every query sees
  block_size: int = 64  # tokens per selectable block
  window_size: int = 2048  # tokens of local window, whole blocks
  topk: int = 64  # blocks selected per query (how init and local count: `selection`)
  use_nope: bool = False  # score blocks with keys before RoPE
  dense_len: int = 8192  # dense below this length (tokens); -1 = always sparse
  selection: Literal["joint", "split"] = "joint"
  lse: Literal["exact", "coarse"] = "exact"

  _HF_KEYS = (
    "kernel_size",
    "kernel_stride",
    "init_blocks",
    "block_size",
    "window_size",
    "topk",
    "use_nope",
    "dense_len",
  )

  def __post_init__(self):
    require_hints(self, "sparse.")  # a released config.json may hold anything
    for name in ("kernel_size", "kernel_stride", "block_size", "topk"):
      require(getattr(self, name) > 0, f"sparse.{name}", getattr(self, name), "an integer > 0")
    for name in ("init_blocks", "window_size"):
      require(getattr(self, name) >= 0, f"sparse.{name}", getattr(self, name), "an integer >= 0")
    require(
      self.kernel_size % self.kernel_stride == 0,
      "sparse.kernel_size",
      self.kernel_size,
      f"a multiple of kernel_stride {self.kernel_stride}",
    )
    require(
      self.block_size % self.kernel_stride == 0,
      "sparse.block_size",
      self.block_size,
      f"a multiple of kernel_stride {self.kernel_stride}",
    )
    require(
      self.window_size % self.block_size == 0,
      "sparse.window_size",
      self.window_size,
      f"a multiple of block_size {self.block_size}",
    )
    least = self.init_blocks + (self.selection == "joint")
    require(
      self.topk >= least,
      "sparse.topk",
      self.topk,
      f"{least} or more: init_blocks {self.init_blocks} (and the block that joint adds) are in it",
    )
    require(self.dense_len >= -1, "sparse.dense_len", self.dense_len, "-1 or tokens >= 0")
    for name, width in (("kernel_size", 1), ("topk", self.block_size), ("window_size", 1)):
      found = getattr(self, name)
      require(found * width < 2**31, f"sparse.{name}", found, "positions of 31 bits")

  @classmethod
  def from_hf(
    cls,
    sparse_config: dict[str, Any] | None,
    selection: Literal["joint", "split"] = "joint",
    lse: Literal["exact", "coarse"] = "coarse",
  ) -> "SparseAttentionConfig | None":
    """From the `sparse_config` dict of a released config.json; None (dense) gives None.

    Unknown keys are refused. `coarse` is what MiniCPM4.1 checkpoints are served with.
    """
    if sparse_config is None:
      return None
    require(isinstance(sparse_config, dict), "sparse_config", sparse_config, "a dict or None")
    unknown = sorted(map(str, set(sparse_config) - set(cls._HF_KEYS)))
    require(not unknown, "sparse_config", unknown, f"only the keys {list(cls._HF_KEYS)}")
    return cls(selection=selection, lse=lse, **sparse_config)

  @property
  def alignment(self) -> int:
    """Tokens; packed documents must start at multiples of it (64 for the released values)."""
    windows = self.kernel_stride * (4 if self.lse == "coarse" else 1)
    return math.lcm(windows, self.block_size)

  def to_hf(self) -> dict[str, Any]:
    """The `sparse_config` dict as released (it has no keys for selection and lse)."""
    return {key: getattr(self, key) for key in self._HF_KEYS}


@dataclasses.dataclass(frozen=True, kw_only=True)
class MoEConfig:
  """MiniCPM-MoE block: every layer, no shared expert, no capacity (models.md 4)."""

  num_experts: int = 8
  experts_per_token: int = 2
  aux_loss_weight: float = 0.01  # Switch balance loss, summed over layers
  aux_counts: Literal["all_slots", "top1"] = "all_slots"  # what f_e counts; paper is silent
  router_init_std: float = 0.1  # P1 section 7.3: variance 0.01

  def __post_init__(self):
    require_hints(self, "moe.")
    for name in ("aux_loss_weight", "router_init_std"):
      require(getattr(self, name) >= 0, f"moe.{name}", getattr(self, name), "a number >= 0")
    require(self.num_experts > 0, "moe.num_experts", self.num_experts, "an integer > 0")
    require(
      0 < self.experts_per_token <= self.num_experts,
      "moe.experts_per_token",
      self.experts_per_token,
      f"1..num_experts ({self.num_experts})",
    )


@dataclasses.dataclass(frozen=True, kw_only=True)
class MLAConfig:
  """MiniCPM3 latent attention (models.md 5). The latent norms use eps 1e-6, not norm_eps."""

  q_lora_rank: int = 768
  kv_lora_rank: int = 256
  qk_nope_head_dim: int = 64
  qk_rope_head_dim: int = 32
  v_head_dim: int = 64
  latent_norm_eps: float = 1e-6

  def __post_init__(self):
    require_hints(self, "mla.")
    for f in dataclasses.fields(self):
      require(getattr(self, f.name) > 0, f"mla.{f.name}", getattr(self, f.name), "> 0")


@dataclasses.dataclass(frozen=True, kw_only=True)
class MTPConfig:
  """One extra one-layer Transformer that predicts token i+2 (MiniCPM4 section 2.3.2)."""

  loss_weight: float = 0.3  # lambda; not given by the paper (DeepSeek-V3 used 0.3, then 0.1)
  scale_depth_over_sqrt_layers: bool = True  # residual scale scale_depth/sqrt(L+1); False: 1

  def __post_init__(self):
    require_hints(self, "mtp.")
    require(self.loss_weight >= 0, "mtp.loss_weight", self.loss_weight, "a number >= 0")


@dataclasses.dataclass(frozen=True, kw_only=True)
class ModelConfig:
  """One decoder-only Transformer of the family: MiniCPM (muP), Llama (MiniCPM5) or MiniCPM3."""

  name: str = "custom"
  arch: Literal["minicpm", "llama", "minicpm3"] = "minicpm"
  vocab_size: int
  model_dim: int  # D
  mlp_dim: int  # F
  num_layers: int  # L
  num_heads: int  # N
  num_kv_heads: int  # K
  head_dim: int  # H (minicpm3: nope + rope width)
  max_position: int  # tokens, `max_position_embeddings`
  rope: RopeConfig = RopeConfig()
  norm_eps: float = 1e-5
  tie_embeddings: bool = True
  # muP multipliers (training.md 1). None switches a rule off, which is Llama.
  scale_emb: float = 1.0
  scale_depth: float | None = None
  dim_model_base: int | None = None
  mup_denominator: int | None = None  # kept for draft heads; unused by the base model
  act: Literal["silu", "fatrelu"] = "silu"
  act_threshold: float = 0.0  # fatrelu: x if x > threshold else 0
  moe: MoEConfig | None = None
  mla: MLAConfig | None = None
  mtp: MTPConfig | None = None
  sparse: SparseAttentionConfig | None = None
  quant: QuantConfig | None = None  # low-bit projections (None = off)
  bos_id: int | None = 1
  stop_ids: tuple[int, ...] = (2,)
  pad_id: int | None = None
  generation: str | None = None  # the rest of generation_config.json: SamplingConfig.from_hf
  # In-memory form and numerics.
  vocab_multiple: int = 1  # embedding and head rows are padded up to a multiple of this
  dtype: DTypeName = "f32"  # compute
  param_dtype: DTypeName = "f32"  # storage
  scan_layers: bool = True  # stacked params under nn.scan; False: one subtree a layer
  scan_unroll: int = 1  # layers in one turn of the scan, at most num_layers (a straight program)
  remat: Literal["none", "dots", "full", "offload"] = "none"
  attention: Literal["auto", "xla", "ref", "cudnn"] = "auto"  # dense attention implementation
  # Initialisation (training.md 1).
  init_std: float = 0.1
  mup_embedding: Literal["matrix", "vector"] = "matrix"  # is the embedding a 2-D tensor of Table 7?

  def __post_init__(self):
    require_hints(self, "model.")
    sizes = ("vocab_size", "model_dim", "mlp_dim", "num_layers", "num_heads", "num_kv_heads")
    for name in sizes + ("head_dim", "max_position", "vocab_multiple", "scan_unroll"):
      found = getattr(self, name)
      require(0 < found < 2**31, f"model.{name}", found, "an integer > 0 of 31 bits")
    require(
      self.num_heads % self.num_kv_heads == 0,
      "model.num_heads",
      self.num_heads,
      f"a multiple of num_kv_heads {self.num_kv_heads}",
    )
    require(self.scale_emb > 0, "model.scale_emb", self.scale_emb, "a number > 0")
    for name in ("scale_depth", "dim_model_base", "mup_denominator"):
      value = getattr(self, name)
      require(value is None or value > 0, f"model.{name}", value, "None or a number > 0")
    for name in ("act_threshold", "init_std"):
      require(getattr(self, name) >= 0, f"model.{name}", getattr(self, name), "a number >= 0")
    require(0 < self.norm_eps < 1, "model.norm_eps", self.norm_eps, "a number in (0, 1)")
    require(
      (self.arch == "minicpm3") == (self.mla is not None),
      "model.mla",
      self.mla,
      f"set exactly when arch is 'minicpm3' (arch is {self.arch!r})",
    )
    require(
      self.sparse is None or self.mla is None, "model.sparse", self.sparse, "None with latent heads"
    )
    fp8 = self.quant is not None and self.quant.fp8 is not None
    require(not (fp8 and self.moe), "model.quant.fp8", self.quant, "None with experts (not built)")
    if self.mla is not None:
      width = self.mla.qk_nope_head_dim + self.mla.qk_rope_head_dim
      require(self.head_dim == width, "model.head_dim", self.head_dim, f"nope + rope = {width}")
    require(self.rotary_dim % 2 == 0, "model.head_dim", self.rotary_dim, "an even rotary width")
    if self.rope.kind == "longrope":
      require(
        len(self.rope.long_factor) == self.rotary_dim // 2,
        "model.rope.long_factor",
        f"{len(self.rope.long_factor)} factors",
        f"rotary_dim / 2 = {self.rotary_dim // 2} factors",
      )

  @property
  def rotary_dim(self) -> int:
    """Channels of a head that RoPE turns."""
    return self.mla.qk_rope_head_dim if self.mla is not None else self.head_dim

  @property
  def v_head_dim(self) -> int:
    return self.mla.v_head_dim if self.mla is not None else self.head_dim

  @property
  def padded_vocab_size(self) -> int:
    return -(-self.vocab_size // self.vocab_multiple) * self.vocab_multiple

  @property
  def residual_scale(self) -> float:
    """Multiplier of every residual branch output: scale_depth / sqrt(L); 1 for Llama."""
    return 1.0 if self.scale_depth is None else self.scale_depth / math.sqrt(self.num_layers)

  @property
  def width_ratio(self) -> float:
    """muP width ratio w = D / dim_model_base; 1 where muP is off."""
    return 1.0 if self.dim_model_base is None else self.model_dim / self.dim_model_base

  @property
  def logit_divisor(self) -> float:
    """The hidden state is divided by this before the head (equals the width ratio)."""
    return self.width_ratio
