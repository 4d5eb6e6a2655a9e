"""What a draft's training leaves behind: its folders under released names, its acceptance curves.

WORKDIR/draft holds the floats that were trained. Training with fake quantisation adds the values
that run: draft_int4 as GPTQ tensors; draft_ternary (and other code books, which no release of a
draft stores as codes) as floats that are scale times code, of the same size as the floats.
"""

import dataclasses
import pathlib

import jax
import jax.numpy as jnp
import numpy as np
from absl import logging

from minicpm_jax import config
from minicpm_jax.ckpt import bita_io, draft_io
from minicpm_jax.core import files, pictures, types
from minicpm_jax.core import logging as logging_lib
from minicpm_jax.models import bita as bita_lib
from minicpm_jax.models import draft as draft_lib
from minicpm_jax.quant import qtensor
from minicpm_jax.quant import tree as quant_tree


def write(
  workdir: pathlib.Path, draft: draft_lib.Draft | bita_lib.Bita, target: config.ModelConfig
) -> None:
  """The folders of a draft; `draft.cfg` is that of the training."""
  if isinstance(draft, bita_lib.Bita):
    bita_io.save_bita(workdir / "draft", draft)
    return
  draft_io.save_draft(workdir / "draft", draft, target)
  quant = draft.cfg.layer.quant
  if quant is not None:
    runs = as_int4(draft) if quant.scheme == "int4" else fused(draft)
    draft_io.save_draft(workdir / f"draft_{quant.scheme}", runs, target)


def as_int4(draft: draft_lib.Draft) -> draft_lib.Draft:
  """A draft that was trained with fake quantisation in the form that runs, same values.

  EAGLE-3's fc carries a power of two (`align.draft_scale`); where its scales in float16 do not hold
  that, they being subnormal then, fc is stored as floats, which readers take.
  """
  quant = draft.cfg.layer.quant
  if quant is None or quant.scheme != "int4" or quant.weights != "latent":
    raise ValueError(f"draft.layer.quant: found {quant!r}, expected latent int4 weights")
  runs = _with_quant(draft, dataclasses.replace(quant, weights="codes"), _codes(draft))
  return _with_exact_fc(draft, runs) if draft.cfg.kind == "eagle3" else runs


def _with_exact_fc(draft: draft_lib.Draft, runs: draft_lib.Draft) -> draft_lib.Draft:
  """The int4 draft `runs`, fc as floats where its scales are not those of a larger fc times 2^k."""
  kernel = np.asarray(draft.params["fc"]["kernel"], np.float32)
  up = np.float32(2.0 ** -np.floor(np.log2(max(np.abs(kernel).max(), 1e-30))))
  larger = {**draft.params, "fc": {"kernel": kernel * up}}
  fc = _codes(dataclasses.replace(draft, params=larger))["fc"]["kernel"]
  exact = np.asarray(fc.scale, np.float32) / up
  if np.array_equal(np.asarray(runs.params["fc"]["kernel"].scale, np.float32), exact):
    return runs
  logging.warning(
    "draft_int4: fc/kernel: found int4 scales down to %.2g, expected at least float16's %.2g: "
    "stored as floats of the same values",
    *(exact.min(), np.finfo(np.float16).tiny),
  )
  cfg = draft_lib.quantized(runs.cfg, fc.group_size, "codes", has_fc=False)
  params = {**runs.params, "fc": {"kernel": qtensor.dequantize(fc) / up}}
  return draft_lib.Draft(cfg, params, runs.ids)


def fused(draft: draft_lib.Draft) -> draft_lib.Draft:
  """The same of any code book as plain floats: the values that the forward pass saw."""
  quant = draft.cfg.layer.quant
  if quant is None or quant.weights != "latent":
    raise ValueError(f"draft.layer.quant: found {quant!r}, expected latent weights")
  dtype = types.dtype_of(draft.cfg.layer.param_dtype)
  return _with_quant(draft, None, quant_tree.dequantize_params(_codes(draft), dtype))


def _codes(draft: draft_lib.Draft) -> types.Params:
  quant = dataclasses.replace(draft.cfg.layer.quant, weights="codes")
  return quant_tree.quantize_params(quant, jax.tree.map(jnp.asarray, draft.params))


def _with_quant(
  draft: draft_lib.Draft, quant: config.QuantConfig | None, params: types.Params
) -> draft_lib.Draft:
  layer = dataclasses.replace(draft.cfg.layer, quant=quant)
  return draft_lib.Draft(dataclasses.replace(draft.cfg, layer=layer), params, draft.ids)


def write_curves(workdir: pathlib.Path, cfg: config.DistillConfig) -> None:
  """acceptance.json from metrics.jsonl; acceptance.png where matplotlib is installed."""
  curves: dict[str, list[dict[str, float]]] = {}
  for row in logging_lib.read_metrics(workdir):
    for name in cfg.eval_sources:
      prefix = f"eval/{name}/"
      values = {k.removeprefix(prefix): v for k, v in row.items() if k.startswith(prefix)}
      if values:
        curves.setdefault(name, []).append({"step": row["step"], **values})
  files.write_json(workdir / "acceptance.json", {"kind": cfg.draft.kind, "curves": curves})
  try:
    figure, axes = pictures.figure(max(len(curves), 1), width=5, height=4)
  except ImportError as error:
    print(f"no acceptance.png: {error}")
    return
  for ax, (name, rows) in zip(axes, curves.items(), strict=False):
    for k in range(1, cfg.eval_depth + 1):
      ax.plot([r["step"] for r in rows], [r[f"acc_{k}"] for r in rows], label=f"acc_{k}")
    ax.set(xlabel="step", ylabel="acceptance", title=f"{cfg.draft.kind}: {name}", ylim=(0, 1))
    ax.legend()
  pictures.save(figure, workdir / "acceptance.png", dpi=120)
