"""MiniCPM4.1-8B: MiniCPM4-8B with 64K long-context training (repository README).

Only the length is published. Everything else is carried over from MiniCPM4's 32K stage: 20B
tokens, learning rate from the end of the anneal to a tenth of it, half long and half short data.
Hybrid thinking is post-training and no part of this recipe. Attention is dense; the stage with
sparse attention is that of minicpm4_8b_sparse.

Cost: 20B tokens, 2.1e21 FLOPs, about 62 H100-days at 40% MFU.
Expected (no published number): loss on 4K rows unchanged, falling with position up to 65536.
Command: python -m experiments.continue_long --config=minicpm4p1_8b --workdir=runs/minicpm4p1_8b
  --set init_from=runs/minicpm4_8b --set mesh.cp=8
"""

from configs import _common
from minicpm_jax import config
from minicpm_jax.models import zoo


def get_config(arg: str = "") -> config.TrainConfig:
  cfg = _common.recipe(
    "minicpm4p1_8b",
    zoo.minicpm4p1_8b(**_common.large()),
    peak_lr=3.5e-4,
    schedule=_common.wsd(decay_start=100, decay_steps=5000, shape="linear_to"),
    phases={"long": _common.MINICPM4_LONG},
    rows=64,
    seq_len=65536,
  )
  return _common.apply(cfg, arg)
