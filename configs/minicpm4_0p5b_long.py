"""MiniCPM4-0.5B, long context: 4K -> 32K with LongRoPE (MiniCPM4 section 5.1).

From the paper: 20B tokens, LongRoPE with the released factors, starting from the annealed model;
no 128K training (YaRN at inference). Learning rate and mixture are not given: the rate goes on
from the end of the anneal (5% of 7e-3) to a tenth of it, half long and half short data; both are
ours.

Cost: 20B tokens, 1.5e20 FLOPs, about 4.5 H100-days at 40% MFU.
Expected (no published number): loss on 4K rows unchanged, falling with position up to 32768.
Command: python -m experiments.continue_long --config=minicpm4_0p5b_long --workdir=runs/0p5b_long
  --set init_from=runs/minicpm4_0p5b
"""

from configs import _common
from minicpm_jax import config
from minicpm_jax.models import zoo


def get_config(arg: str = "") -> config.TrainConfig:
  cfg = _common.recipe(
    "minicpm4_0p5b_long",
    zoo.minicpm4_0p5b(**_common.large()),
    peak_lr=3.5e-4,
    schedule=_common.wsd(decay_start=100, decay_steps=5000, shape="linear_to"),
    phases={"long": _common.MINICPM4_LONG},
    rows=120,
    seq_len=32768,
  )
  return _common.apply(cfg, arg)
