"""GGUF files of the llama and minicpm architectures into our parameter tree (`save_gguf` is in
`gguf_write`).

Every type that the gguf package dequantises is read (F32, F16, BF16, Q8_0, Q4_0, Q4_1, Q4_K, ...);
parameters are plain floats afterwards. The rows of attn_q and attn_k lie in interleaved-pair RoPE
order and are put back into half-split order (models.md 3.3); V and O are as in the HF layout.
muP of `minicpm`: embedding_scale, residual_scale and logit_scale, the last a divisor
(inference.md 20.1). Not read: yarn and llama-3 RoPE scaling, biases, other architectures.
"""

import dataclasses
import functools
import math
import os
import pathlib
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import jax
import numpy as np

from minicpm_jax import config
from minicpm_jax.ckpt import errors, gguf_sampling, gguf_vocab, gguf_write
from minicpm_jax.core import mesh as mesh_lib
from minicpm_jax.core import trees, types
from minicpm_jax.core.extras import require_extra
from minicpm_jax.models import transformer
from minicpm_jax.text import tokenizer

ARCHITECTURES = ("llama", "minicpm")
save_gguf = gguf_write.save_gguf
_IGNORED = ("rope_factors_long.weight", "rope_factors_short.weight", "rope_freqs.weight")


@dataclasses.dataclass(frozen=True)
class Tensor:
  """One stored tensor and how it becomes one layer's leaf."""

  name: str
  shape: tuple[int, ...]  # as stored, numpy order [out, in]
  convert: Callable[[np.ndarray], np.ndarray]


class GGUFFile:
  """Metadata and tensors of one file; every failure names the file."""

  def __init__(self, path: str | os.PathLike[str]):
    gguf = require_extra("gguf", extra="gguf")
    self.path = pathlib.Path(path)
    if not self.path.is_file():
      raise errors.MissingFileError(f"{self.path}: no such file")
    with open(self.path, "rb") as file:
      magic = file.read(4)
    if magic != b"GGUF":
      raise errors.CheckpointError(f"{self.path}: found first bytes {magic!r}, expected b'GGUF'")
    try:
      reader = gguf.GGUFReader(self.path)
      self.fields = {key: field.contents() for key, field in reader.fields.items()}
      self.tensors = {t.name: t for t in reader.tensors}
    except (ValueError, IndexError, KeyError, OSError, OverflowError) as error:
      raise errors.CheckpointError(
        f"{self.path}: damaged or truncated GGUF: found {self.path.stat().st_size} bytes and "
        f"{type(error).__name__}: {error}, expected all tensors that its header announces"
      ) from error
    self.arch = self.fields.get("general.architecture")
    if self.arch not in ARCHITECTURES:
      raise errors.CheckpointError(
        f"{self.path}: general.architecture: found {self.arch!r}, expected one of {ARCHITECTURES}"
      )

  def get(self, key: str, default: Any = None) -> Any:
    """Value of `<arch>.<key>`; float32 numbers come as the shortest decimal that gives them."""
    value = self.fields.get(f"{self.arch}.{key}", default)
    if not isinstance(value, float):
      return value
    if not math.isfinite(value):
      raise self.error(f"{self.arch}.{key}", value, "a finite number")
    return float(str(np.float32(value)))

  def number(self, key: str, default: float | None = None) -> float | None:
    value = self.get(key, default)
    if value is None:
      return None
    if isinstance(value, bool) or not isinstance(value, int | float):
      raise self.error(f"{self.arch}.{key}", value, "a number")
    return float(value)

  def integer(self, key: str, default: int | None = None) -> int:
    value = self.get(key, default)
    if not isinstance(value, int) or value <= 0:
      raise self.error(f"{self.arch}.{key}", value, "an integer > 0")
    return value

  def array(self, name: str, shape: tuple[int, ...]) -> np.ndarray:
    """The tensor as float32 in numpy order, dequantised."""
    gguf = require_extra("gguf", extra="gguf")
    tensor = self.tensors.get(name)
    if tensor is None:
      raise self.error(name, "no such tensor", f"a tensor of shape {shape}")
    found = tuple(int(n) for n in reversed(tensor.shape))
    if found != shape:
      raise self.error(name, f"shape {found}", f"shape {shape}")
    try:
      x = gguf.dequantize(tensor.data, tensor.tensor_type).reshape(shape)
    except NotImplementedError as error:
      raise self.error(name, f"type {tensor.tensor_type.name}", "a type gguf can read") from error
    if not np.all(np.isfinite(x)):
      raise self.error(name, "inf or nan", "finite weights (damaged file?)")
    return x

  def error(self, what: str, found: Any, expected: str) -> errors.CheckpointError:
    return errors.CheckpointError(f"{self.path}: {what}: found {found}, expected {expected}")


def load_gguf(
  path: str | os.PathLike[str],
  *,
  dtype: str = "f32",
  mesh: jax.sharding.Mesh | None = None,
  scan_layers: bool = True,
  logit_scale: float | None = None,
) -> tuple[transformer.Transformer, types.Params, tokenizer.Tokenizer | None]:
  """(model, params, tok) of a GGUF file; tok is None where the file holds no tokenizer.

  Args:
    dtype: of parameters and computation (f32, bf16, f16).
    mesh: parameters are placed on it leaf by leaf, by their logical axis names.
    scan_layers: stacked layers, or one subtree a layer (faster decoding on a CPU).
    logit_scale: the logit divisor for a `minicpm` file that does not store it.
  """
  file = GGUFFile(path)
  tok = gguf_vocab.read_tokenizer(file.fields, str(file.path))
  try:
    cfg = read_config(file, tok, logit_scale=logit_scale)
  except errors.CheckpointError:
    raise
  except (ValueError, TypeError) as error:  # of a config, which does not know the file
    raise errors.CheckpointError(f"{file.path}: {error}") from error
  cfg = dataclasses.replace(cfg, dtype=dtype, param_dtype=dtype, scan_layers=scan_layers)
  model = transformer.Transformer(cfg)
  return model, _read_params(file, model, mesh), tok


def read_config(
  file: GGUFFile, tok: tokenizer.Tokenizer | None = None, *, logit_scale: float | None = None
) -> config.ModelConfig:
  """ModelConfig from the metadata; shapes that the tensors fix are taken from them."""
  width, layers = file.integer("embedding_length"), file.integer("block_count")
  if layers > len(file.tensors):
    raise file.error("block_count", layers, f"what {len(file.tensors)} tensors can hold")
  heads = file.integer("attention.head_count")
  head_dim = file.integer("attention.key_length", file.get("rope.dimension_count", width // heads))
  rotary, value_dim = (
    file.get(k, head_dim) for k in ("rope.dimension_count", "attention.value_length")
  )
  if (rotary, value_dim) != (head_dim, head_dim):
    raise file.error(
      "rope.dimension_count, attention.value_length", (rotary, value_dim), f"both {head_dim}"
    )
  embedding = file.tensors.get("token_embd.weight")
  if embedding is None:
    raise file.error("token_embd.weight", "no such tensor", "the embedding")
  vocab_size = int(embedding.shape[-1])
  num_tokens = len(file.fields.get("tokenizer.ggml.tokens") or [])
  for what, found in (("vocab_size", file.get("vocab_size")), ("number of tokens", num_tokens)):
    if found and found != vocab_size:
      raise file.error(what, found, f"{vocab_size}, the rows of token_embd.weight")
  eps = file.get("attention.layer_norm_rms_epsilon")
  if eps is None:
    raise file.error(f"{file.arch}.attention.layer_norm_rms_epsilon", "no such key", "a number > 0")
  experts = file.get("expert_count") or 0
  eos_id = file.fields.get("tokenizer.ggml.eos_token_id")
  stop_ids = tok.stop_ids if tok is not None else () if eos_id is None else (eos_id,)
  return config.ModelConfig(
    name=str(file.fields.get("general.name", file.path.stem)),
    arch=file.arch,
    vocab_size=vocab_size,
    model_dim=width,
    mlp_dim=file.integer("feed_forward_length"),
    num_layers=layers,
    num_heads=heads,
    num_kv_heads=file.integer("attention.head_count_kv", heads),
    head_dim=head_dim,
    max_position=file.integer("context_length"),
    rope=_read_rope(file, head_dim),
    norm_eps=eps,
    tie_embeddings="output.weight" not in file.tensors,
    moe=_read_moe(file, experts) if experts else None,
    bos_id=file.fields.get("tokenizer.ggml.bos_token_id"),
    stop_ids=stop_ids,
    pad_id=file.fields.get("tokenizer.ggml.padding_token_id"),
    generation=gguf_sampling.read(file.fields),
    init_std=0.1 if file.arch == "minicpm" else 0.02,
    **(_read_mup(file, width, layers, logit_scale) if file.arch == "minicpm" else {}),
  )


def _read_mup(file: GGUFFile, width: int, layers: int, logit_scale: float | None) -> dict[str, Any]:
  """scale_emb, scale_depth, dim_model_base; the defaults of the first two are llama.cpp's."""
  if logit_scale is not None and not 0 < logit_scale < math.inf:
    raise file.error("logit_scale", logit_scale, "a number > 0")
  stored = file.number("logit_scale")
  if stored is None and logit_scale is None:
    raise file.error(
      "minicpm.logit_scale",
      "no such key",
      "hidden_size / dim_model_base (llama.cpp would guess, and scale the logits wrongly); "
      "pass load_gguf(..., logit_scale=) for such a file",
    )
  divisor = logit_scale if stored is None else stored
  base = round(width / divisor) if divisor > 0 else 0
  if base < 1 or abs(width / base - divisor) > 1e-4 * divisor:
    raise file.error("minicpm.logit_scale", divisor, f"{width} / an integer (a divisor)")
  residual = file.number("residual_scale", 1.4 / math.sqrt(layers))
  return {
    "scale_emb": file.number("embedding_scale", 12.0),
    "scale_depth": round(residual * math.sqrt(layers), 6),
    "dim_model_base": base,
  }


def _read_moe(file: GGUFFile, experts: int) -> config.MoEConfig:
  used = file.integer("expert_used_count")
  return config.MoEConfig(num_experts=experts, experts_per_token=used)


def _read_rope(file: GGUFFile, rotary: int) -> config.RopeConfig:
  theta = file.get("rope.freq_base", 10000.0)
  kind = file.get("rope.scaling.type", "none")
  if "rope_freqs.weight" in file.tensors:
    freqs = file.array("rope_freqs.weight", (rotary // 2,))
    if not np.all(freqs == 1.0):
      raise file.error("rope_freqs.weight", "llama-3 RoPE scaling", "no such tensor, or all ones")
  has_factors = "rope_factors_long.weight" in file.tensors
  if kind == "none" and not has_factors:
    return config.RopeConfig(theta=theta)
  if kind == "linear":
    return config.RopeConfig(kind="linear", theta=theta, factor=file.get("rope.scaling.factor"))
  if kind != "longrope" and not has_factors:
    raise file.error("rope.scaling.type", repr(kind), "none, linear or longrope")
  long, short = (
    tuple(float(x) for x in file.array(f"rope_factors_{name}.weight", (rotary // 2,)))
    for name in ("long", "short")
  )
  # The stock converter leaves the original length out; all released members have M = O.
  context = file.integer("context_length")
  original = file.integer("rope.scaling.original_context_length", context)
  scale = file.get("rope.scaling.attn_factor", 1.0)  # m of models.md 3.5; 1 where not stored
  if scale < 1.0:
    raise file.error("rope.scaling.attn_factor", scale, "a number >= 1")
  factor = original ** (scale * scale - 1.0) if scale != 1.0 or context > original else None
  return config.RopeConfig(
    kind="longrope",
    theta=theta,
    factor=factor,
    short_factor=short,
    long_factor=long,
    original_max_position=original,
  )


def _half_split(x: np.ndarray, heads: int, width: int) -> np.ndarray:
  """Rows of a q or k projection from interleaved pairs to half-split order."""
  return x.reshape(heads, width // 2, 2, -1).swapaxes(1, 2).reshape(x.shape)


def _layer_tensors(cfg: config.ModelConfig) -> dict[str, Tensor]:
  """Our path inside a layer -> the tensor of that layer (name without `blk.{i}.`)."""
  D, F, N, K, H = cfg.model_dim, cfg.mlp_dim, cfg.num_heads, cfg.num_kv_heads, cfg.head_dim

  def rotated(x: np.ndarray, heads: int) -> np.ndarray:
    return _half_split(x, heads, H).T.reshape(D, heads, H)

  tensors = {
    "attn_norm/scale": Tensor("attn_norm", (D,), np.asarray),
    "mlp_norm/scale": Tensor("ffn_norm", (D,), np.asarray),
    "attn/q/kernel": Tensor("attn_q", (N * H, D), functools.partial(rotated, heads=N)),
    "attn/k/kernel": Tensor("attn_k", (K * H, D), functools.partial(rotated, heads=K)),
    "attn/v/kernel": Tensor("attn_v", (K * H, D), lambda x: x.T.reshape(D, K, H)),
    "attn/o/kernel": Tensor("attn_output", (D, N * H), lambda x: x.T.reshape(N, H, D)),
  }
  if cfg.moe is None:
    for ours, theirs, shape in (
      ("gate", "gate", (F, D)),
      ("up", "up", (F, D)),
      ("down", "down", (D, F)),
    ):
      tensors[f"mlp/{ours}/kernel"] = Tensor(f"ffn_{theirs}", shape, np.transpose)
    return tensors
  E = cfg.moe.num_experts
  tensors["moe/router/kernel"] = Tensor("ffn_gate_inp", (E, D), np.transpose)
  for ours, shape in (("gate", (E, F, D)), ("up", (E, F, D)), ("down", (E, D, F))):
    tensors[f"moe/{ours}/kernel"] = Tensor(f"ffn_{ours}_exps", shape, lambda x: x.swapaxes(1, 2))
  return tensors


def _read_params(
  file: GGUFFile, model: transformer.Transformer, mesh: jax.sharding.Mesh | None
) -> types.Params:
  """The whole tree, one leaf in host memory at a time, each placed before the next is read."""
  cfg = model.cfg
  shapes, specs = transformer.abstract_params(model)
  place: Mapping[str, Any] = {}
  if mesh is not None:
    place = trees.flatten_paths(mesh_lib.tree_shardings(mesh, specs, shapes))
  wanted = trees.flatten_paths(shapes)
  params, used = {}, set(_IGNORED)
  for path, leaf in _leaves(file, cfg, used):
    if leaf.shape != wanted[path].shape:
      raise file.error(path, f"shape {leaf.shape}", f"shape {wanted[path].shape}")
    params[path] = jax.device_put(leaf, place.get(path))
  unexpected = sorted(set(file.tensors) - used)
  if unexpected:
    shown = ", ".join(unexpected[:8]) + (" ..." if len(unexpected) > 8 else "")
    raise file.error("tensors", f"unexpected {shown}", "only those of the architecture")
  return trees.unflatten(params)


def _leaves(
  file: GGUFFile, cfg: config.ModelConfig, used: set[str]
) -> Iterator[tuple[str, np.ndarray]]:
  """(our path, array in the parameter dtype) of every leaf; tensor names go into `used`."""
  dtype = np.dtype(types.dtype_of(cfg.param_dtype))
  D, V = cfg.model_dim, cfg.vocab_size

  def read(name: str, shape: tuple[int, ...], convert: Callable[..., np.ndarray]) -> np.ndarray:
    used.add(name)
    return convert(file.array(name, shape)).astype(dtype)

  yield "embed/embedding", read("token_embd.weight", (V, D), np.asarray)
  yield "final_norm/scale", read("output_norm.weight", (D,), np.asarray)
  if not cfg.tie_embeddings:
    yield "lm_head/kernel", read("output.weight", (V, D), np.transpose)
  for path, tensor in _layer_tensors(cfg).items():
    names = [f"blk.{i}.{tensor.name}.weight" for i in range(cfg.num_layers)]
    if cfg.scan_layers:
      first = read(names[0], tensor.shape, tensor.convert)
      stacked = np.empty((cfg.num_layers, *first.shape), dtype)
      stacked[0] = first
      for i, name in enumerate(names[1:], start=1):
        stacked[i] = read(name, tensor.shape, tensor.convert)
      yield f"layers/{path}", stacked
    else:
      for i, name in enumerate(names):
        yield f"layers_{i}/{path}", read(name, tensor.shape, tensor.convert)
