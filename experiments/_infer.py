"""What generate and serve share: CPM.cu's flags, and the engine that they describe.

`--config=minicpm4_8b[:arg]` starts from a preset of configs/infer (or a path.py); flags win.
"""

import dataclasses
import importlib
import json
import pathlib
import secrets
import types as python_types
import typing
from collections.abc import Generator, Sequence
from typing import Any

import jax
import numpy as np
from absl import flags

from experiments import _command, _flags, _models
from minicpm_jax import ckpt, config
from minicpm_jax.ckpt import bita_io
from minicpm_jax.config import cpmcu
from minicpm_jax.core import types
from minicpm_jax.infer import chat, constrained, detokenize, engine, generate
from minicpm_jax.infer import rows as rows_lib
from minicpm_jax.infer.drafters import base
from minicpm_jax.models import cache, transformer
from minicpm_jax.nn import rope
from minicpm_jax.text import tokenizer

PRESETS = pathlib.Path(__file__).resolve().parents[1] / "configs" / "infer"
MIN_CONTEXT = 64  # tokens; less memory than for these is refused


@dataclasses.dataclass(frozen=True)
class Loaded:
  """A model on its engine."""

  engine: engine.Engine
  tok: tokenizer.Tokenizer
  stop_ids: tuple[int, ...]
  is_fast: bool = False  # --fast_forward


def define(values: flags.FlagValues, leave_out: Sequence[str]) -> None:
  """One flag for each field of InferConfig."""
  flags.DEFINE_string("config", None, "Preset NAME[:arg] or PATH.py[:arg].", flag_values=values)
  hints = typing.get_type_hints(config.InferConfig)
  makers = {str: flags.DEFINE_string, int: flags.DEFINE_integer, float: flags.DEFINE_float}
  makers |= {bool: flags.DEFINE_bool}
  for field in dataclasses.fields(config.InferConfig):
    if field.name in leave_out:
      continue
    options = [o for o in _members(hints[field.name]) if o is not type(None)]
    text = f"See config/cpmcu.py: {field.name}."
    if isinstance(options[0], str):
      flags.DEFINE_enum(field.name, field.default, options, text, flag_values=values)
    else:
      makers[options[0]](field.name, field.default, text, flag_values=values)


def _members(hint: Any) -> list[Any]:
  """Types and literal values of a hint."""
  origin = typing.get_origin(hint)
  if origin in (typing.Union, python_types.UnionType):
    return [m for part in typing.get_args(hint) for m in _members(part)]
  return list(typing.get_args(hint)) if origin is typing.Literal else [hint]


def read(values: flags.FlagValues) -> config.InferConfig:
  """The preset with the flags that were given."""
  cfg = _preset(values.config) if values.config else config.InferConfig()
  names = [f.name for f in dataclasses.fields(cfg) if f.name in values]
  given = {name: values[name].value for name in names if values[name].present}
  cfg = dataclasses.replace(cfg, **given)
  if cfg.model_path is None:
    raise ValueError(f"--model: found none, expected {_models.KINDS}")
  _refuse_unread(values, cfg)
  return cfg


def _refuse_unread(values: flags.FlagValues, cfg: config.InferConfig) -> None:
  """ValueError for a flag of speculation or grammars that was given where nothing reads it."""
  kind = draft_kind(cfg)
  is_tree = kind in ("eagle", "eagle3", "mtp") or cfg.hier_draft_path is not None
  drafts = "no draft" if kind == "none" else f"{kind} drafts"
  has_constraint = cfg.json_schema is not None or cfg.grammar_file is not None
  for name, is_read, found_with in (
    ("hier_min_length", kind == "hier", drafts),
    ("bita_width", kind == "bita", drafts),
    ("spec_num_iter", is_tree or kind in ("chain", "hier"), drafts),
    ("spec_topk_per_iter", is_tree, drafts),
    ("spec_tree_size", is_tree, drafts),
    ("spec_window_size", is_tree and kind != "mtp", drafts),
    ("frspec_vocab_size", cfg.frspec_path is not None, "no --frspec_path"),
    ("warmup_tokens", cfg.warmup, "--nowarmup"),
    ("warmup_constrained", cfg.warmup, "--nowarmup"),
    ("fast_forward", has_constraint, "no --json_schema or --grammar_file"),
  ):
    if name in values and not is_read:
      _command.refuse_unread(values, [name], found_with)


def sampling(cfg: config.InferConfig) -> config.SamplingConfig:
  """Without --random_seed the noise differs from run to run."""
  return cfg.sampling(secrets.randbits(31) if cfg.random_seed is None else cfg.random_seed)


def with_generation(
  values: flags.FlagValues, cfg: config.InferConfig, model: config.ModelConfig
) -> config.InferConfig:
  """--generation_config: the checkpoint's sampling where neither a flag nor the preset says one.

  Only on demand, for without it CPM.cu's default is promised: greedy.
  """
  if not cfg.generation_config:
    return cfg
  if model.generation is None:
    raise ValueError(
      f"--generation_config: found none in {cfg.model_path}, expected a folder whose "
      "generation_config.json has more than token ids, or a GGUF file with general.sampling keys"
    )
  theirs = config.SamplingConfig.from_hf(model.generation)
  free = {n: getattr(config.InferConfig(), n) for n in cpmcu.SAMPLING if not values[n].present}
  free = [name for name, default in free.items() if getattr(cfg, name) == default]
  return dataclasses.replace(cfg, **{name: getattr(theirs, name) for name in free})


def _preset(text: str) -> config.InferConfig:
  name, _, arg = text.partition(":")
  if name.endswith(".py") or "/" in name:
    return _flags.load(text)
  known = sorted(path.stem for path in PRESETS.glob("[!_]*.py"))
  if name not in known:
    raise ValueError(f"--config: found {name!r}, expected one of {', '.join(known)} or a path.py")
  return importlib.import_module(f"configs.infer.{name}").get_config(arg)


# --- Model, draft, engine ---------------------------------------------------------------------


def load(cfg: config.InferConfig, *, max_batch: int, num_tokens: int | None = None) -> Loaded:
  """Everything that the config describes. `num_tokens`: context wanted; None = all there is."""
  num_nodes = 1 if draft_kind(cfg) == "none" else cfg.spec_tree_size
  model, params, tok = _models.load(cfg.model_path, max_batch * num_nodes, cfg.quant_head)
  model, params = _as_asked(cfg, model, params)
  drafter, draft_params = _draft(cfg, model, params)
  nodes = 1 if drafter is None else base.num_rows(drafter)
  capacity = context_length(cfg, model.cfg, params, max_batch, draft=(drafter, draft_params))
  if num_tokens is not None:
    capacity = min(capacity, generate.bucket(num_tokens + nodes))
  sizes = config.EngineConfig(
    capacity=capacity,
    max_batch=max_batch,
    chunk_size=cfg.chunk_length,
    rounds_per_dispatch=cfg.rounds_per_dispatch,
    shrinks=jax.default_backend() == "cpu" if cfg.shrinks is None else cfg.shrinks,
  )
  stops = () if cfg.ignore_eos else chat.stop_ids(model.cfg, tok)
  more = {"drafter": drafter, "draft_params": draft_params, "stop_ids": stops}
  return Loaded(engine.Engine(model, params, sizes, **more), tok, stops, cfg.fast_forward)


def context_length(
  cfg: config.InferConfig,
  model: config.ModelConfig,
  params: types.Params,
  max_batch: int,
  *,
  draft: tuple[base.Drafter | None, Any] = (None, ()),
) -> int:
  """Tokens a row: the model's, less where max_context or the memory say so (inference.md 2).

  draft: the drafter and its parameters, whose weights and caches take their share.
  """
  limit = cfg.max_context or model.max_position
  leaves = {id(x): x for x in jax.tree.leaves((params, draft[1]))}  # shared ones count once
  loaded = sum(x.nbytes for x in leaves.values())
  spare = memory_bytes(loaded) * cfg.memory_limit - loaded
  small, large = (
    sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(_cache_shapes(model, n, params, draft)))
    for n in (1024, 2048)
  )
  room = int(spare // (max_batch * (large - small) / 1024))
  if jax.default_backend() == "gpu":  # the engine rounds up, with room for a chunk or a tree
    room = room // rows_lib.SLOTS * rows_lib.SLOTS - 64
  if min(limit, room) < MIN_CONTEXT:
    raise ValueError(
      f"memory_limit: found room for {room} tokens of {max_batch} rows, expected {MIN_CONTEXT}"
    )
  return min(limit, room)


def _cache_shapes(model: config.ModelConfig, capacity: int, params: Any, draft: Any) -> Any:
  """Shapes of one row's cache and of the drafter's state for it."""
  drafter, draft_params = draft

  def made() -> Any:
    own = cache.init(model, 1, capacity, per_row=True)
    if drafter is None:
      return own
    both = base.Params(params, draft_params)
    return own, drafter.init_state(transformer.Transformer(model), both, 1, capacity)

  return jax.eval_shape(made)


def memory_bytes(loaded: int) -> int:
  """Of the device; on a CPU the `loaded` bytes and what is still free, else 8 GiB."""
  stats = jax.local_devices()[0].memory_stats() or {}
  if "bytes_limit" in stats:
    return int(stats["bytes_limit"])
  meminfo = pathlib.Path("/proc/meminfo")
  if not meminfo.is_file():
    return 8 * 2**30
  fields = dict(line.split(":", 1) for line in meminfo.read_text().splitlines())
  return loaded + int(fields["MemAvailable"].split()[0]) * 1024


def _as_asked(
  cfg: config.InferConfig, model: transformer.Transformer, params: types.Params
) -> tuple[transformer.Transformer, types.Params]:
  """model_type, dtype, minicpm4_yarn and the sparse flags applied to what was loaded."""
  arch, shape = model.cfg.arch, model.cfg
  wanted = {"llama": "llama", "minicpm": "minicpm", "minicpm4": "minicpm"}.get(cfg.model_type, arch)
  if arch != wanted:
    raise ValueError(f"--model_type: found {cfg.model_type}, but the checkpoint is a {arch}")
  if cfg.model_type == "minicpm4" and shape.sparse is None:
    raise ValueError("--model_type: found minicpm4, but the checkpoint has no sparse_config")
  if cfg.model_type in ("llama", "minicpm"):
    shape = dataclasses.replace(shape, sparse=None)
  for name in cpmcu.SPARSE_ONLY if shape.sparse is None else ():
    if (found := getattr(cfg, name)) != getattr(config.InferConfig(), name):
      raise ValueError(f"--{name}: found {found} with dense attention, which does not read it")
  if shape.sparse is not None:
    sparse = dataclasses.replace(
      shape.sparse,
      init_blocks=cfg.sink_window_size,
      window_size=cfg.block_window_size * shape.sparse.block_size,
      topk=cfg.sparse_topk_k,
      dense_len=cfg.sparse_switch,
      lse="coarse" if cfg.use_compress_lse else "exact",
    )
    shape = dataclasses.replace(shape, sparse=sparse)
  if cfg.minicpm4_yarn:
    shape = _with_yarn(shape)
  if cfg.dtype != "auto":
    name = {"float16": "f16", "bfloat16": "bf16", "float32": "f32"}[cfg.dtype]
    if jax.default_backend() == "cpu" and name != "f32":
      raise ValueError(f"--dtype: found {cfg.dtype}, expected float32 or auto on a CPU")
    shape = dataclasses.replace(shape, dtype=name, param_dtype=name)
    dtype = types.dtype_of(name)
    floats = lambda x: x.astype(dtype) if np.issubdtype(x.dtype, np.floating) else x  # noqa: E731
    params = params if name == model.cfg.param_dtype else jax.tree.map(floats, params)
  return transformer.Transformer(shape), params


def _with_yarn(shape: config.ModelConfig) -> config.ModelConfig:
  """LongRoPE factors of the released 128K set of this model (models.md 3.6)."""
  for family, extension in (("minicpm4_8b", 4), ("minicpm4p1_8b", 2)):
    base = rope.longrope_factors(family)
    same = len(base) == len(shape.rope.long_factor)
    if same and np.allclose(base, shape.rope.long_factor, rtol=1e-2):
      factors = rope.longrope_factors(family, extension=extension)
      longer = dataclasses.replace(
        shape.rope, short_factor=factors, long_factor=factors, factor=1.0
      )
      return dataclasses.replace(shape, rope=longer, max_position=131072)
  raise ValueError("--minicpm4_yarn: found other factors than MiniCPM4-8B's or MiniCPM4.1-8B's")


def draft_kind(cfg: config.InferConfig) -> str:
  """The kind that the flags mean."""
  if cfg.draft_kind is not None:
    return cfg.draft_kind
  if cfg.draft_model_path is None:
    return "none"
  if bita_io.is_bita(cfg.draft_model_path):
    return "bita"
  return "eagle3" if cfg.use_eagle3 else "eagle"


def _draft(cfg: config.InferConfig, model: transformer.Transformer, params: types.Params) -> Any:
  """(drafter, its parameters)."""
  kind = draft_kind(cfg)
  if kind in ("none", "ngram", "mtp") and cfg.draft_model_path is not None:
    raise ValueError(
      f"--draft_model_path: found with --draft_kind={kind}, which has no draft model"
    )
  if kind in ("eagle", "eagle3", "chain", "hier", "bita") and cfg.draft_model_path is None:
    raise ValueError(f"--draft_model_path: found none, expected a draft for --draft_kind={kind}")
  has_inner = kind == "hier" and cfg.hier_draft_path is not None  # of the small model
  if cfg.use_eagle3 and not (kind == "eagle3" or has_inner):
    raise ValueError(f"--use_eagle3: found with {kind} drafts, expected an EAGLE-3 draft's folder")
  has_target_head = kind in ("eagle", "mtp") or (has_inner and not cfg.use_eagle3)
  if cfg.frspec_path is not None and not has_target_head:
    raise ValueError(
      f"--frspec_path: found with {kind} drafts, expected EAGLE or MTP drafts (their head is the "
      "target's)"
    )
  if cfg.draft_logit_scale is not None and not (kind in ("eagle", "eagle3") or has_inner):
    raise ValueError(f"--draft_logit_scale: found with {kind} drafts, expected EAGLE drafts")
  if kind == "none":
    return None, ()
  if kind == "ngram":
    from minicpm_jax.infer.drafters import ngram

    return ngram.NGramDrafter(), ()
  if kind == "chain":
    from minicpm_jax.infer.drafters import chain

    small, small_params, _ = _models.load(
      cfg.draft_model_path, flag="--draft_model_path"
    )  # writes token by token
    return chain.ChainDrafter(small, num_levels=max(1, cfg.spec_num_iter)), small_params
  if kind == "hier":
    return _hierarchical(cfg)
  if kind == "bita":
    from minicpm_jax.infer.drafters import bita

    draft = ckpt.load_bita(cfg.draft_model_path, model.cfg)
    return bita.make(draft, model, params, width=cfg.bita_width)
  return _eagle(cfg, kind, model, params)


def _hierarchical(cfg: config.InferConfig) -> Any:
  """The small model of --draft_model_path, and its own drafter: --hier_draft_path or n-grams."""
  from minicpm_jax.infer.drafters import hierarchical, ngram

  small, small_params, _ = _models.load(
    cfg.draft_model_path, cfg.spec_tree_size, flag="--draft_model_path"
  )
  inner: tuple[Any, Any] = (ngram.NGramDrafter(num_levels=max(1, cfg.spec_num_iter)), ())
  if cfg.hier_draft_path is not None:
    own = dataclasses.replace(cfg, draft_model_path=cfg.hier_draft_path)
    inner = _eagle(own, "eagle3" if cfg.use_eagle3 else "eagle", small, small_params)
  drafter = hierarchical.HierarchicalDrafter(small, inner[0], cfg.hier_min_length)
  return drafter, (small_params, inner[1])


def _eagle(cfg: config.InferConfig, kind: str, model, params) -> Any:
  from minicpm_jax.infer import frspec
  from minicpm_jax.infer.drafters import eagle, mtp

  sizes = {
    "num_levels": cfg.spec_num_iter,
    "top_k": cfg.spec_topk_per_iter,
    "num_nodes": cfg.spec_tree_size,
  }
  ids = None
  if cfg.frspec_path is not None:
    ids = frspec.load_index(cfg.frspec_path, cfg.frspec_vocab_size)
  if kind == "mtp":
    return mtp.make(model, params, fr_ids=ids, **sizes)
  draft = ckpt.load_draft(
    cfg.draft_model_path,
    model.cfg,
    window_size=cfg.spec_window_size,
    draft_logit_scale=cfg.draft_logit_scale,
  )
  if (draft.cfg.kind == "eagle3") != (kind == "eagle3"):
    raise ValueError(f"--draft_model_path: found a draft of kind {draft.cfg.kind}, expected {kind}")
  return eagle.make(draft, model, params, fr_ids=ids, **sizes)


# --- Answers ----------------------------------------------------------------------------------


def read_text(flag: str, path: str) -> str:
  """The text of the file that a flag names."""
  try:
    return pathlib.Path(path).read_text(encoding="utf-8")
  except (OSError, UnicodeDecodeError) as error:
    reason = getattr(error, "strerror", None) or f"no UTF-8 ({error})"
    raise ValueError(f"--{flag}: {path}: {reason}") from error


def constraint(cfg: config.InferConfig, loaded: Loaded) -> constrained.Constraint | None:
  """A new one of --json_schema or --grammar_file."""
  path = cfg.json_schema or cfg.grammar_file
  if path is None:
    return None
  stops = loaded.stop_ids or loaded.tok.stop_ids
  compiler = constrained.GrammarCompiler(
    loaded.tok, loaded.engine.model.cfg.vocab_size, stop_ids=stops
  )
  flag = "json_schema" if cfg.grammar_file is None else "grammar_file"
  text = read_text(flag, path)
  if cfg.grammar_file is not None:
    return compiler.lark(text)
  try:
    schema = json.loads(text)
  except json.JSONDecodeError as error:
    raise ValueError(f"--json_schema: {path}: not valid JSON: {error}") from error
  return compiler.json_schema(schema)


def answer(
  loaded: Loaded,
  prompt: Sequence[int],
  settings: config.SamplingConfig,
  stats: list[engine.Stats],
  mask: constrained.Constraint | None = None,
) -> Generator[str]:
  """Text of one answer piece by piece; its stats are appended (also where it is closed early)."""
  text = detokenize.TextStream(loaded.tok, stop_ids=loaded.stop_ids)
  is_fast = mask is not None and loaded.is_fast
  request = engine.Request(list(prompt), settings, (), mask, fast_forward=is_fast)
  for event in loaded.engine.stream([request]):
    if event.finish_reason is not None:
      stats.append(event.stats)
    if piece := text.push(event.tokens):
      yield piece
  if piece := text.finish("length"):
    yield piece
