"""Draft models of speculative decoding: shapes, scales, head (inference.md sections 10-12)."""

import dataclasses
import math
from typing import Literal

from minicpm_jax.config.data import DataConfig
from minicpm_jax.config.mesh import MeshConfig
from minicpm_jax.config.model import ModelConfig
from minicpm_jax.config.optim import OptimConfig
from minicpm_jax.config.train import CheckpointConfig
from minicpm_jax.config.validate import require, require_hints

DraftKind = Literal["eagle", "minicpm", "eagle3"]


@dataclasses.dataclass(frozen=True, kw_only=True)
class DraftConfig:
  """One draft model. `layer` is the shape of its decoder layer(s), not of the target.

  eagle: EAGLE-1/2 of Llama (no pre-norms, first layer without input norm). minicpm: MiniCPM4's
  EAGLE, which is also the MTP module. eagle3: three features of the target, own norm and head.
  """

  kind: DraftKind
  layer: ModelConfig  # num_layers: draft layers; vocab_size, model_dim, scale_emb: the target's
  fc_bias: bool = False  # eagle only
  residual_scale: float = 1.0  # of the two branches of a draft layer
  draft_logit_scale: float = 1.0  # multiplies the logits; no other divisor is applied
  feature_scale: float = 1.0  # eagle3: of the target's features (CPM.cu's reading; plain: 1)
  feature_layers: tuple[int, ...] = ()  # eagle3: the residual stream *before* these layers, 3
  draft_vocab_size: int | None = None  # eagle3: rows of its own head; None = the target's
  window_size: int = 0  # tokens a draft row sees, itself included; 0 = all

  def __post_init__(self):
    require_hints(self, "draft.")
    is_plain = self.layer.moe is None and self.layer.mla is None
    require(is_plain, "draft.layer", "experts or latent attention", "a dense layer with GQA")
    require(not self.fc_bias or self.kind == "eagle", "draft.fc_bias", True, "False")
    for name in ("residual_scale", "draft_logit_scale", "feature_scale"):
      found = getattr(self, name)
      require(0 < found < 2**31, f"draft.{name}", found, "a number > 0, below 2**31")
    found = self.window_size
    require(0 <= found < 2**31, "draft.window_size", found, "tokens >= 0, of 31 bits")
    is_3 = self.kind == "eagle3"
    expected = "three layer numbers >= 0" if is_3 else "none"
    ok = len(self.feature_layers) == (3 if is_3 else 0) and all(i >= 0 for i in self.feature_layers)
    require(ok, "draft.feature_layers", self.feature_layers, expected)
    if self.draft_vocab_size is not None:
      ok = is_3 and 0 < self.draft_vocab_size <= self.layer.vocab_size
      expected = f"1..{self.layer.vocab_size}" if is_3 else "None (the target's head is used)"
      require(ok, "draft.draft_vocab_size", self.draft_vocab_size, expected)
    if is_3:
      require(self.layer.num_layers == 1, "draft.layer.num_layers", self.layer.num_layers, "1")

  @property
  def head_size(self) -> int:
    """Rows of the draft's head."""
    return self.draft_vocab_size or self.layer.vocab_size

  @property
  def feature_dim(self) -> int:
    """Width of what the target hands over for one token."""
    return self.layer.model_dim * (3 if self.kind == "eagle3" else 1)


@dataclasses.dataclass(frozen=True, kw_only=True)
class BitaConfig:
  """Mask tokens and soft prompts of BiTA: a target drafts for itself (inference.md 15).

  The shapes are the target's. Defaults are the paper's.
  """

  vocab_size: int
  model_dim: int
  num_layers: int
  num_kv_heads: int
  head_dim: int
  num_masks: int = 3  # mask i asks for the token 1 + i ahead
  num_prompts: int = 16  # soft prompts, seen by mask tokens alone

  def __post_init__(self):
    require_hints(self, "draft.")
    for field in dataclasses.fields(self):
      value = getattr(self, field.name)
      require(value >= 1, f"draft.{field.name}", value, ">= 1")

  @property
  def kind(self) -> str:
    return "bita"


@dataclasses.dataclass(frozen=True, kw_only=True)
class DistillConfig:
  """Training of one draft for one frozen target; `workdir/config.py` rebuilds it.

  The defaults of losses are those of the EAGLE repository (inference.md section 17).
  """

  name: str = "draft"
  target: str  # HF folder, GGUF file or run folder[@step]
  draft: DraftConfig | BitaConfig
  optim: OptimConfig
  data: DataConfig = DataConfig()
  mesh: MeshConfig = MeshConfig()
  checkpoint: CheckpointConfig = CheckpointConfig()
  init_from: str | None = None  # draft folder; None = random, or the target's MTP module
  from_mtp: bool = False  # start from the target's MTP module (kind minicpm)
  head_from_target: bool = True  # eagle3: norm and head start as the target's rows, else random
  unit_features: bool = True  # eagle3: features at rms 1 while training (`align.draft_scale`)
  num_steps: int = 1000
  seed: int = 0
  grad_accum: int = 1
  ttt_steps: int = 7  # eagle3: steps of training-time test
  ttt_decay: float = 0.8  # eagle3: weight of step i is ttt_decay ** i
  feature_loss_weight: float = 1.0  # eagle, minicpm: SmoothL1 on features
  ce_weight: float = 0.1  # eagle, minicpm: soft cross entropy
  loss_temperature: float = 1.0  # divides both sides' logits in it; < 1: the best tokens count
  loss_vocab_size: int | None = None  # eagle, minicpm: CE over the most frequent tokens only
  loss_chunk: int = 0  # columns whose logits exist together (large vocabularies); 0 = all
  stored_rows: int = 0  # rows gone over again and again, the target run over them once; 0 = never
  stored_dtype: str = "bf16"  # of their features on disk
  num_groups: int = 64  # bita: groups of mask tokens in a row, at consecutive places
  noise: float = 0.2  # eagle, minicpm: width of the uniform feature noise, times 512 / T
  grad_clip_value: float = 0.5  # elementwise; 0 = off
  log_every: int = 10
  eval_every: int = 100  # steps between acceptance curves
  eval_batches: int = 4
  eval_sources: tuple[str, ...] = ()  # names of data.sources that only measure acceptance
  eval_depth: int = 5  # acc_1 .. acc_depth

  def __post_init__(self):
    require_hints(self, "")
    counts = ("num_steps", "grad_accum", "ttt_steps", "log_every", "eval_every", "eval_depth")
    for name in (*counts, "num_groups"):
      require(getattr(self, name) > 0, name, getattr(self, name), "> 0")
    for name in ("feature_loss_weight", "ce_weight", "noise", "grad_clip_value"):
      require(getattr(self, name) >= 0, name, getattr(self, name), ">= 0")
    for name in ("loss_chunk", "stored_rows", "eval_batches"):
      require(getattr(self, name) >= 0, name, getattr(self, name), ">= 0")
    ok = not self.loss_chunk or self.data.seq_len % self.loss_chunk == 0
    require(ok, "loss_chunk", self.loss_chunk, f"a divisor of data.seq_len {self.data.seq_len}")
    types = ("bf16", "f32")
    require(self.stored_dtype in types, "stored_dtype", self.stored_dtype, f"one of {types}")
    ok = not self.stored_rows or self.stored_rows >= self.data.batch_size
    require(ok, "stored_rows", self.stored_rows, f"0 or >= data.batch_size {self.data.batch_size}")
    if self.draft.kind == "bita":
      found, most = self.eval_depth, self.draft.num_masks
      require(found <= most, "eval_depth", found, f"at most {most}, the mask tokens")
      for name, off in (("loss_vocab_size", None), ("stored_rows", 0), ("loss_chunk", 0)):
        require(getattr(self, name) == off, name, getattr(self, name), f"{off} for bita")
    elif self.loss_vocab_size is not None:
      ok = self.draft.kind != "eagle3" and 0 < self.loss_vocab_size <= self.draft.layer.vocab_size
      expected = f"None for eagle3 (draft.draft_vocab_size), 1..{self.draft.layer.vocab_size} else"
      require(ok, "loss_vocab_size", self.loss_vocab_size, expected)
    require(0 < self.ttt_decay <= 1, "ttt_decay", self.ttt_decay, "in (0, 1]")
    found = self.loss_temperature
    require(0 < found < math.inf, "loss_temperature", found, "a number > 0")
    ok = found == 1 or self.draft.kind != "bita"
    require(ok, "loss_temperature", found, "1 for bita (its target is a token)")
    require(
      self.data.batch_size % self.grad_accum == 0,
      "grad_accum",
      self.grad_accum,
      f"a divisor of data.batch_size {self.data.batch_size}",
    )
    names = [s.name for s in self.data.sources]
    for name in self.eval_sources:
      require(name in names, "eval_sources", name, f"one of {names}")
    ok = not self.from_mtp or (self.draft.kind == "minicpm" and self.init_from is None)
    require(ok, "from_mtp", self.from_mtp, "False unless draft.kind is minicpm without init_from")
