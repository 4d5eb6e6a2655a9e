"""int4 tensors of draft checkpoints, as GPTQ stores them.

NAME.qweight, .qzeros, .scales and .g_idx of the layers' seven linears, of fc too or not; norms and
head are floats. Files in Marlin's layout are refused.
"""

import pathlib
from collections.abc import Mapping
from typing import Any

import numpy as np

from minicpm_jax.ckpt import errors, hf_names, hf_tensors, quant_io, quant_write, safetensors_file
from minicpm_jax.quant import gptq_format, qtensor

Source = dict[str, tuple[safetensors_file.Reader, str]]  # released name -> (file, name in it)


def find(
  folder: pathlib.Path, rows: Mapping[str, tuple[str, hf_names.Rule]], source: Source
) -> dict[str, list[str]]:
  """Our paths of int4 kernels -> the tensors that each has; all linears of the layers or none.

  rows: our path -> (released name, rule).
  """
  if (folder / quant_io.MARLIN_FILE).exists():
    raise errors.QuantizedCheckpointError(
      f"{folder / quant_io.MARLIN_FILE}: found Marlin's layout, expected GPTQ tensors (a draft's "
      "names in it are not published)"
    )
  bases = {path: quant_io.base_name(name) for path, (name, _) in rows.items()}
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
  return {
    path: [f"{base}.{part}" for part in ("qweight", "qzeros", "scales")]
    for path, base in low.items()
  }


def load_leaf(
  ours: str,
  name: str,
  rule: hf_names.Rule,
  shape: tuple[int, ...],
  source: Source,
  settings: quant_io.Settings,
  folder: pathlib.Path,
) -> qtensor.QTensor:
  base = quant_io.base_name(name)
  parts = {n: x for n, x in source.items() if n.rpartition(".")[0] == base}
  full = next(iter(parts.values()))[1].rpartition(".")[0]
  leaf = hf_names.Leaf(ours, rule, (((), f"{full}.weight"),))
  readers = {full_name: reader for reader, full_name in parts.values()}
  return quant_io.load_leaf(leaf, shape, readers, settings, folder)


def gptq_tensors(base: str, qt: qtensor.QTensor) -> dict[str, np.ndarray]:
  found = gptq_format.encode(quant_write.layer_codes(qt, (), base), name=base)
  return {f"{base}.{part}": x for part, x in found._asdict().items()}


def settings_json(group_size: int) -> dict[str, Any]:
  """`quantization_config` of a written draft."""
  return {
    "bits": 4,
    "checkpoint_format": "gptq",
    "desc_act": False,
    "group_size": group_size,
    "lm_head": False,
    "quant_method": "gptq",
    "sym": True,
  }
