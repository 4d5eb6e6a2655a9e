"""MiniCPM3-4B: latent attention, 62 layers (models.md 2.5 and 5).

No training report is in our sources. The recipe carries MiniCPM-2B's over (same muP constants:
12, 1.4, 256): base lr 0.01, 3.93M tokens a step, 1.1T tokens, half-life 5000 steps. At 4K the
released LongRoPE factors are those of the 32K stage; plain RoPE is trained here.

Cost: 1.10T tokens, 3.2e22 FLOPs, about 950 H100-days at 40% MFU.
Expected: no published loss.
Command: python -m experiments.pretrain --config=minicpm3_4b --workdir=runs/minicpm3_4b
"""

from configs import _common
from minicpm_jax import config
from minicpm_jax.models import zoo


def get_config(arg: str = "") -> config.TrainConfig:
  cfg = _common.recipe(
    "minicpm3_4b",
    zoo.minicpm3_4b(rope=config.RopeConfig(), max_position=4096, **_common.large()),
    peak_lr=0.01,
    schedule=_common.minicpm_wsd(),
    phases={"stable": _common.MINICPM_STABLE, "decay": _common.MINICPM_DECAY},
  )
  return _common.apply(cfg, arg)
