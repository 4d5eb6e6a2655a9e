"""int4 tensors of draft checkpoints, as GPTQ or CPM.cu's Marlin files store them.

NAME.qweight, .qzeros, .scales and .g_idx of the layers' seven linears, of fc too or not; norms and
head are floats. Marlin (`model_gptq.safetensors`, quantization.md 8.2): q|k|v and gate|up are
joined, there are no .qzeros and .g_idx.
"""

import pathlib
from collections.abc import Mapping
from typing import Any

import numpy as np

from minicpm_jax.ckpt import errors, hf_names, hf_tensors, quant_io, quant_write, safetensors_file
from minicpm_jax.quant import gptq_format, marlin, qtensor

Source = dict[str, tuple[safetensors_file.Reader, str]]  # released name -> (file, name in it)


def find(
  folder: pathlib.Path, rows: Mapping[str, tuple[str, hf_names.Rule]], source: Source
) -> dict[str, list[str]]:
  """Our paths of int4 kernels -> the tensors that each has; all linears of the layers or none.

  rows: our path -> (released name, rule).
  """
  is_marlin = (folder / quant_io.MARLIN_FILE).is_file()
  bases = {path: _stored_name(name, is_marlin) for path, (name, _) in rows.items()}
  low = {path: base for path, base in bases.items() if f"{base}.qweight" in source}
  others = [
    full
    for name, (_, full) in source.items()
    if hf_names.is_quantized(name) and name.rpartition(".")[0] not in low.values()
  ]
  kernels = [path for path, (_, rule) in rows.items() if rule in ("linear", "heads_in")]
  wanted = {path for path in kernels if path.startswith("layers_")}
  floats = sorted(wanted - set(low)) if low else []
  odd = sorted(set(low) - wanted - {"fc/kernel"})
  if others or floats or odd:
    raise errors.QuantizedCheckpointError(
      f"{folder}: found quantised tensors {hf_tensors.listed(sorted(low.values())[:3] + others)}, "
      f"expected GPTQ tensors of all linears of the layers, of fc or not, of nothing else; "
      f"without them: {floats}, not to be: {odd}"
    )
  each = ("qweight", "scales") if is_marlin else ("qweight", "qzeros", "scales")
  return {path: [f"{base}.{part}" for part in each] for path, base in low.items()}


def _stored_name(name: str, is_marlin: bool) -> str:
  base = quant_io.base_name(name)
  return quant_io.marlin_name(base)[0] if is_marlin else base


def load_leaf(
  ours: str,
  name: str,
  rule: hf_names.Rule,
  shape: tuple[int, ...],
  source: Source,
  settings: quant_io.Settings,
  folder: pathlib.Path,
) -> qtensor.QTensor:
  base = _stored_name(name, settings.is_marlin)
  parts = {n: x for n, x in source.items() if n.rpartition(".")[0] == base}
  full = next(iter(parts.values()))[1].rpartition(".")[0]
  if own := quant_io.base_name(name).rsplit(".", 2)[1:]:  # not fc: the name before joining
    full = ".".join([full.rsplit(".", 2)[0], *own])
  leaf = hf_names.Leaf(ours, rule, (((), f"{full}.weight"),))
  readers = {full_name: reader for reader, full_name in parts.values()}
  return quant_io.load_leaf(leaf, shape, readers, settings, folder)


def gptq_tensors(base: str, qt: qtensor.QTensor) -> dict[str, np.ndarray]:
  found = gptq_format.encode(quant_write.layer_codes(qt, (), base), name=base)
  return {f"{base}.{part}": x for part, x in found._asdict().items()}


def marlin_tensors(low: Mapping[str, qtensor.QTensor], kind: str) -> dict[str, np.ndarray]:
  """Released name -> kernel, in the order q, k, v and gate, up, to CPM.cu's tensors.

  Symmetric groups of 128 in order; outputs in multiples of 64, inputs (of each half of fc) of 128.
  """
  if kind == "eagle":
    raise errors.CheckpointError(
      "draft.cfg.kind: found 'eagle', expected 'minicpm' or 'eagle3' (CPM.cu's Marlin drafts)"
    )
  joined: dict[str, list[gptq_format.Codes]] = {}
  for name, qt in low.items():
    base = quant_io.base_name(name)
    if qt.group_size != 128 or qt.zero is not None or qt.g_idx is not None:
      raise errors.CheckpointError(
        f"{base}: found group_size {qt.group_size}, expected symmetric groups of 128 in order "
        "(Marlin)"
      )
    codes = quant_write.layer_codes(qtensor.unpack(qt), (), base)
    joined.setdefault(quant_io.marlin_name(base)[0], []).append(codes)
  tensors = {}
  for base, parts in joined.items():
    codes_IO = np.concatenate([c.codes_IO for c in parts], axis=1)
    scale_QO = np.concatenate([c.scale_QO for c in parts], axis=1)
    halves = 2 if base == "fc" and kind == "minicpm" else 1
    if len(scale_QO) % halves:
      raise errors.CheckpointError(
        f"{base}: found {len(codes_IO)} inputs, expected a multiple of 256 (Marlin)"
      )
    try:
      words = [marlin.pack(x, base) for x in np.split(codes_IO, halves)]
    except ValueError as error:
      raise errors.CheckpointError(f"Marlin: {error}") from error
    scales = [marlin.permute_scales(x) for x in np.split(scale_QO, halves)]
    tensors |= {
      f"{base}.qweight": np.concatenate(words, axis=1),
      f"{base}.scales": np.concatenate(scales, axis=1),
    }
  return tensors


def settings_json(group_size: int) -> dict[str, Any]:
  """`quantization_config` of a written draft."""
  return {
    "bits": 4,
    "checkpoint_format": "gptq",
    "desc_act": False,
    "group_size": group_size,
    "lm_head": False,
    "quant_method": "gptq",
    "static_groups": True,
    "sym": True,
  }
