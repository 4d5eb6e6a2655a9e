"""MiniCPM5-1B: Llama form without muP (repository README; no paper).

Published: stable + decay pretraining, then mid-training; no rates, batches or tokens. So 1T
tokens, and the learning rate and batch of StepLaw, MiniCPM4's own alternative to muP (section
2.3.1): lr = 1.79 N^-0.713 D^0.307 = 4.4e-3, batch = 0.58 D^0.571 = 4.1M tokens for N = 0.68B, D =
1T. The initial std (0.02) is not established either.

Cost: 1.0T tokens, 6.7e21 FLOPs, about 195 H100-days at 40% MFU.
Expected: no published loss.
Command: python -m experiments.pretrain --config=minicpm5_1b --workdir=runs/minicpm5_1b
"""

from configs import _common
from minicpm_jax import config
from minicpm_jax.models import zoo


def get_config(arg: str = "") -> config.TrainConfig:
  cfg = _common.recipe(
    "minicpm5_1b",
    zoo.minicpm5_1b(**_common.large()),
    peak_lr=4.4e-3,
    schedule=_common.minicpm4_wsd(decay_start=224_000, decay_steps=25_000),
    phases={"stable": _common.MINICPM4_STABLE, "decay": _common.MINICPM4_DECAY},
    rows=1008,
  )
  return _common.apply(cfg, arg)
