"""The command line of CPM.cu as a config: what `experiments.generate` and `serve` take as flags.

Names and defaults are CPM.cu's (common/args.py; inference.md 18) unless a comment says otherwise;
the fields behind `backend` are ours or belong to one of the two commands.
"""

import dataclasses
from typing import Literal

from minicpm_jax.config.infer import SamplingConfig
from minicpm_jax.config.validate import require, require_hints


@dataclasses.dataclass(frozen=True, kw_only=True)
class InferConfig:
  """One run of the decode engine."""

  # Model
  model_path: str | None = None  # HF folder, run folder or GGUF file; required
  draft_model_path: str | None = None  # enables speculation
  frspec_path: str | None = None  # file, or folder with freq_{r}
  model_type: Literal["auto", "llama", "minicpm", "minicpm4"] = "auto"  # minicpm4 = sparse
  dtype: Literal["auto", "float16", "bfloat16", "float32"] = "auto"  # ours: bf16, f32 on CPU
  minicpm4_yarn: bool = False  # LongRoPE factors of the 128K set
  cuda_graph: bool = True  # accepted, no effect: everything is compiled
  # System
  memory_limit: float = 0.9  # share of the memory for weights and cache together
  chunk_length: int = 2048  # tokens of one prefill forward
  plain_output: bool = False  # no colour
  # Speculation
  use_eagle3: bool = False
  spec_window_size: int = 1024  # tokens that a draft row sees, 0 = all
  spec_num_iter: int = 2  # levels of the tree
  spec_topk_per_iter: int = 10
  spec_tree_size: int = 12  # nodes, root included
  frspec_vocab_size: int = 32768
  # Sparse attention, for models that have it
  sink_window_size: int = 1  # blocks
  block_window_size: int = 8  # blocks
  sparse_topk_k: int = 64  # blocks
  sparse_switch: int = 0  # tokens; dense below
  use_compress_lse: bool = True  # log-sum-exp from the coarse level
  # Sampling (ours but for temperature)
  temperature: float = 0.0
  top_k: int = 0
  top_p: float = 1.0
  min_p: float = 0.0
  repetition_penalty: float = 1.0
  generation_config: bool = False  # those not given: the checkpoint's generation_config.json
  # Ours
  draft_kind: Literal["eagle", "eagle3", "mtp", "chain", "hier", "bita", "ngram", "none"] | None = (
    None  # None: bita by the draft folder, else eagle3 or eagle by use_eagle3; none without
  )
  draft_logit_scale: float | None = None  # None: what the draft's folder says, else 1
  hier_draft_path: str | None = None  # hier: EAGLE draft of the small model; None = n-grams
  hier_min_length: int = 6  # hier: tokens of a chain at least
  bita_width: int = 5  # bita: candidates of the first level
  quant_head: Literal["none", "int8", "int4"] = "none"  # round the target's output head
  rounds_per_dispatch: int = 1
  max_batch: int = 4  # rows that decode together (server)
  max_context: int = 0  # tokens of prompt and answer; 0 = what model and memory allow
  json_schema: str | None = None  # file with a schema that every answer must satisfy
  grammar_file: str | None = None  # file with a Lark grammar
  fast_forward: bool = False  # append what the constraint forces; other cuts of it never come
  compilation_cache: str | None = None  # folder of compiled programs for later starts
  backend: Literal["jax"] = "jax"
  # generate
  prompt_file: str | None = None
  prompt_text: str = "Who are you"
  use_chat_template: bool = True
  use_stream: bool = True
  num_generate: int = 1024  # tokens
  random_seed: int | None = None
  ignore_eos: bool = False
  # serve
  host: str = "127.0.0.1"  # CPM.cu: 0.0.0.0
  port: int = 8000
  shrinks: bool | None = None  # rounds of the live rows alone; None: on a CPU (measured there)
  warmup: bool = True  # compile first, then listen
  warmup_tokens: int = 0  # prompt and answer that find all compiled; 0 = what the first span holds
  warmup_constrained: bool | None = None  # grammars too; None: where they can be served

  def __post_init__(self):
    require_hints(self, "")
    require(0 < self.memory_limit <= 1, "memory_limit", self.memory_limit, "in (0, 1]")
    require(self.chunk_length >= 16, "chunk_length", self.chunk_length, "tokens >= 16")
    counts = ("spec_num_iter", "spec_topk_per_iter", "num_generate", "max_batch", "bita_width")
    require(self.spec_tree_size <= 64, "spec_tree_size", self.spec_tree_size, "1..64 nodes")
    sizes = ("hier_min_length", "spec_tree_size", "frspec_vocab_size", "sparse_topk_k")
    for name in (*counts, *sizes):
      require(getattr(self, name) >= 1, name, getattr(self, name), ">= 1")
    sizes = ("spec_window_size", "max_context", "sparse_switch", "warmup_tokens")
    for name in (*sizes, "sink_window_size", "block_window_size"):
      require(getattr(self, name) >= 0, name, getattr(self, name), ">= 0")
    rounds = self.rounds_per_dispatch
    require(1 <= rounds <= 64, "rounds_per_dispatch", rounds, "1..64")
    require(0 <= self.port < 65536, "port", self.port, "0..65535")
    scale = self.draft_logit_scale
    require(scale is None or scale > 0, "draft_logit_scale", scale, "None or a number > 0")
    self.sampling(0 if self.random_seed is None else self.random_seed)  # refuses its fields
    inner, kind = self.hier_draft_path, self.draft_kind
    require(inner is None or kind == "hier", "hier_draft_path", inner, f"None with {kind!r} drafts")
    both = self.json_schema is not None and self.grammar_file is not None
    require(not both, "json_schema, grammar_file", "both", "at most one of them")

  def sampling(self, seed: int) -> SamplingConfig:
    """How tokens are drawn."""
    return SamplingConfig(
      repetition_penalty=self.repetition_penalty,
      temperature=self.temperature,
      top_k=self.top_k,
      top_p=self.top_p,
      min_p=self.min_p,
      max_new_tokens=self.num_generate,
      seed=seed,
    )


SAMPLING = ("temperature", "top_k", "top_p", "min_p", "repetition_penalty")
SPARSE_ONLY = (
  "sink_window_size",
  "block_window_size",
  "sparse_topk_k",
  "sparse_switch",
  "use_compress_lse",
)
SERVE_ONLY = ("host", "port", "shrinks", "warmup", "warmup_tokens", "warmup_constrained")
GENERATE_ONLY = (
  "fast_forward",
  "prompt_file",
  "prompt_text",
  "use_chat_template",
  "use_stream",
  "num_generate",
  "random_seed",
  "ignore_eos",
)
