"""Text for calibration and evaluation, perplexity, and the cost of a larger model."""

import json
import pathlib
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from minicpm_jax import ckpt
from minicpm_jax.ckpt import gguf_write, quant_write
from minicpm_jax.config import ModelConfig, QuantConfig
from minicpm_jax.core import files, pictures, trees, types
from minicpm_jax.data import documents
from minicpm_jax.deploy import quantize
from minicpm_jax.models import convert, transformer, zoo
from minicpm_jax.quant import gguf_types, gptq, tree


def token_stream(paths: Sequence[pathlib.Path], tok: Any) -> np.ndarray:
  """All texts as one row of tokens, documents apart by a BOS or else an EOS."""
  ids: list[int] = []
  for doc in documents.read(paths):
    ids += tok.encode(doc.text, add_bos=tok.add_bos)
    if not tok.add_bos and tok.eos_id is not None:
      ids.append(tok.eos_id)
  return np.asarray(ids, np.int32)


def windows(stream: np.ndarray, num: int, length: int, seed: int | None) -> np.ndarray:
  """`num` rows of `length` tokens: drawn at random, or (seed None) one after the other."""
  for name, value in (("sequences", num), ("length", length)):
    if value < 1:
      raise ValueError(f"--{name}: found {value}, expected 1 or more")
  if len(stream) < length + 1:
    raise ValueError(f"--text: found {len(stream)} tokens, expected more than --length={length}")
  if seed is None:
    starts = np.arange(min(num, len(stream) // length)) * length
  else:
    starts = np.random.default_rng(seed).integers(0, len(stream) - length, num)
  return np.stack([stream[s : s + length] for s in starts])


def batches(rows: np.ndarray, batch_size: int) -> list[quantize.Batch]:
  """Batches of equal shape; rows are one document each, the last batch is filled with padding."""
  found = []
  for i in range(0, len(rows), batch_size):
    tokens = rows[i : i + batch_size]
    empty = batch_size - len(tokens)
    segments = np.pad(np.ones_like(tokens), ((0, empty), (0, 0)))
    found.append((np.pad(tokens, ((0, empty), (0, 0))), segments))
  return found


def check_output(
  output: str, method: str, solver: gptq.GPTQConfig, *, format: str, kind: str
) -> None:
  """Refuses, before the model is quantised, what could not be written afterwards."""
  if output.endswith(".gguf"):
    if kind not in gguf_write.KINDS:
      raise ValueError(f"--kind: found {kind!r}, expected one of {sorted(gguf_write.KINDS)}")
    if method == "ternary" and kind.startswith("q4"):
      raise ValueError(f"--kind: found {kind}, expected tq2_0 or tq1_0 for ternary codes")
    if method != "ternary" and kind.startswith("tq"):
      raise ValueError(f"--kind: found {kind}, expected a type that holds 4-bit codes")
  elif method == "ternary":
    raise ValueError(f"--output: found {output}, expected a .gguf name for ternary codes")
  elif format == "marlin" and not (solver.symmetric and solver.group_size in (-1, 128)):
    raise ValueError(
      f"--format=marlin: found group_size {solver.group_size}, symmetric {solver.symmetric}, "
      "expected 128 or -1 and symmetric"
    )


def check_model(cfg: ModelConfig, output: str, group_size: int, *, format: str) -> None:
  """`check_output` of what depends on the model."""
  if output.endswith(".gguf"):
    gguf_write.check_model(cfg)
  else:
    quant_write.check_model(cfg, group_size, is_marlin=format == "marlin")


def perplexity(
  model: transformer.Transformer, params: types.Params, rows: np.ndarray, batch_size: int = 4
) -> float:
  """exp of the mean next-token loss over all positions of the rows (each starts afresh)."""

  @jax.jit
  def logits(params, tokens_BT, segment_ids_BT):
    return model.apply({"params": params}, tokens_BT, segment_ids_BT=segment_ids_BT).logits

  return perplexity_of(lambda batch: logits(params, *batch), rows, batch_size)


def perplexity_of(
  forward: Callable[[quantize.Batch], Any], rows: np.ndarray, batch_size: int = 4
) -> float:
  """`perplexity` of what gives the logits of a batch."""
  loss = sum(float(_loss(forward(batch), *batch)) for batch in batches(rows, batch_size))
  return float(np.exp(loss / (len(rows) * (rows.shape[1] - 1))))


@jax.jit
def _loss(logits_BTV, tokens_BT, segment_ids_BT):
  logprobs = jax.nn.log_softmax(logits_BTV[:, :-1])
  picked = jnp.take_along_axis(logprobs, tokens_BT[:, 1:, None], axis=-1)[..., 0]
  return -jnp.sum(picked * (segment_ids_BT[:, 1:] != 0))


def named_run(text: str) -> tuple[str, str]:
  """(name, run) of --trained."""
  name, _, run = text.partition(":")
  if not name or not run:
    raise ValueError(f"--trained: found {text!r}, expected NAME:RUN")
  return name, run


def trained_codes(run: str, vocab_size: int) -> tuple[transformer.Transformer, types.Params]:
  """(model, params) of a run of quantisation-aware training, with its weights as codes."""
  model, latent, _ = ckpt.load_run(run)
  if model.cfg.vocab_size != vocab_size:
    found = model.cfg.vocab_size
    raise ValueError(f"--trained: {run}: found a vocabulary of {found}, expected {vocab_size}")
  cfg, codes = convert.to_codes(model.cfg, latent)
  return transformer.Transformer(cfg), codes


def work(cfg: ModelConfig, tokens: int) -> dict[str, float]:
  """Floating-point operations of each phase, the leading terms (dense attention left out)."""
  D, F, N, K, H = cfg.model_dim, cfg.mlp_dim, cfg.num_heads, cfg.num_kv_heads, cfg.head_dim
  kernels = {
    "qkv": (D, (N + 2 * K) * H),
    "o": (N * H, D),
    "gate_up": (D, 2 * F),
    "down": (F, D),
  }
  size = {name: i * o for name, (i, o) in kernels.items()}
  before = [0, size["qkv"], size["qkv"] + size["o"], sum(size.values()) - size["down"]]
  inputs = sum(i * i for i, _ in kernels.values())
  return {
    "forward": cfg.num_layers * 2.0 * tokens * sum(size.values()),
    "hessian": cfg.num_layers * 2.0 * tokens * (sum(before) + inputs),
    "solve": cfg.num_layers * sum(2.0 * i * i * o + i**3 for i, o in kernels.values()),
  }


def cost_of(
  measured: quantize.Quantized, cfg: ModelConfig, tokens: int, target: str, target_tokens: int
) -> dict[str, float]:
  """Hours by phase for a zoo member, at the operations a second that were measured here."""
  here = work(cfg, tokens)
  there = work(zoo.ZOO[target](), target_tokens)
  hours = {
    phase: measured.seconds[phase] * there[phase] / here[phase] / 3600
    for phase in here
    if measured.seconds[phase] > 0
  }
  if measured.seconds["smooth"] > 0:  # forwards of a fixed number of tokens
    hours["smooth"] = measured.seconds["smooth"] * there["forward"] / target_tokens / 3600
    hours["smooth"] /= here["forward"] / tokens
  return hours


def through_gguf(params: types.Params, kind: str) -> types.Params:
  """The model as GGUF blocks of one type leave it (projections only)."""

  def one(path, w):
    if not QuantConfig().selects(path):
      return w
    num_in, num_lead = tree.layout(path)
    width = int(np.prod(w.shape[num_lead : num_lead + num_in]))
    w_LIO = np.asarray(w, np.float32).reshape(-1, width, int(np.prod(w.shape[num_lead + num_in :])))
    rows = np.ascontiguousarray(w_LIO.swapaxes(1, 2))
    back = gguf_types.unpack(gguf_types.pack(rows, kind), kind)
    return jnp.asarray(back.swapaxes(1, 2).reshape(w.shape))

  return trees.map_with_path(one, params)


def _plot(path: pathlib.Path, result: dict[str, Any]) -> None:
  figure, (axes,) = pictures.figure(width=6, height=3.2)
  names = list(result["perplexity"])
  for i, name in enumerate(names):
    values = result["perplexity"][name]
    axes.plot([i] * len(values), values, "o", color="tab:blue")
    axes.plot([i - 0.3, i + 0.3], [np.mean(values)] * 2, color="black")
  axes.set_xticks(range(len(names)), names, rotation=30)
  axes.set_ylabel("perplexity")
  pictures.save(figure, path, dpi=120)


def read_perplexity(folder: pathlib.Path, setting: dict[str, Any]) -> dict[str, Any]:
  """The JSON so far, or an empty one of this setting; that of another is refused."""
  path = folder / "quantize_ppl.json"
  if not path.exists():
    return {**setting, "perplexity": {}, "seconds": {}}
  found = json.loads(path.read_text())
  for name, wanted in setting.items():
    if found.get(name) != wanted:
      raise ValueError(f"{path}: {name}: found {found.get(name)}, expected {wanted}")
  for name, values in found["perplexity"].items():  # null: not finite
    found["perplexity"][name] = [float("nan") if value is None else value for value in values]
  return found


def write_perplexity(folder: pathlib.Path, result: dict[str, Any]) -> None:
  """JSON (renamed into place) and plot of the values so far."""
  files.write_json(folder / "quantize_ppl.json", result)
  _plot(folder / "quantize_ppl.png", result)
