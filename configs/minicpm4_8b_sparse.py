"""MiniCPM4-8B, short to long with sparse attention (InfLLM v2, arXiv 2509.24663 section 4.1).

From the paper: dense pretraining at 4K, then 5B tokens with the selection on, the same 96 blocks a
query as at inference, exact normaliser, learning rate 3e-4 falling in a line to 2.75e-4, rows up to
32K from four bins of document length with equal shares of tokens. The weights are taken over as
they are: sparse attention has no parameters. Not published: tokens a step (ours as in the 32K
stage). Rule "joint"; documents start at multiples of 64, so that rows share one grid of blocks.

Cost: 5B tokens, 3.7e20 FLOPs with attention counted dense, about 11 H100-days at 40% MFU.
Expected: the loss goes on from that of full attention without a jump (figure 5); RULER at 32K 82.6
against 84.3 with full attention (table 1). At toy scale: python -m experiments.short_to_long
Command: python -m experiments.continue_long --config=minicpm4_8b_sparse --workdir=runs/8b_sparse
  --set init_from=runs/minicpm4_8b --set mesh.cp=4
"""

import dataclasses

from configs import _common
from minicpm_jax import config
from minicpm_jax.models import zoo

SPARSE = config.SparseAttentionConfig(selection="joint", lse="exact")
BINS = ("long_0_4k", "long_4_12k", "long_12_24k", "long_24_32k")


def get_config(arg: str = "") -> config.TrainConfig:
  cfg = _common.recipe(
    "minicpm4_8b_sparse",
    zoo.minicpm4_8b(**_common.large()),
    peak_lr=3e-4,
    schedule=_common.wsd(
      decay_start=0, decay_steps=1272, warmup_steps=0, shape="linear_to", min_ratio=2.75 / 3
    ),
    phases={"sparse": {name: 1 / len(BINS) for name in BINS}},
    rows=120,
    seq_len=32768,
  )
  cfg = dataclasses.replace(
    cfg,
    model=dataclasses.replace(cfg.model, sparse=SPARSE),
    data=dataclasses.replace(cfg.data, packing="best_fit", align=SPARSE.alignment),
  )
  return _common.apply(cfg, arg)
