"""MiniCPM-S-1B: MiniCPM-1B's shape with FATReLU at 0.03 (models.md 2.5).

The released weights were sparsified progressively from MiniCPM-1B; neither that schedule nor its
regulariser is in our sources and neither is built. This recipe continues MiniCPM-1B weights with
the activation switched, on the decay mixture: 100B tokens and the learning rate are ours.

Cost: 100B tokens, 1.0e21 FLOPs, about 30 H100-days at 40% MFU.
Expected: no published loss for this short form.
Command: python -m experiments.pretrain --config=minicpm_s_1b --workdir=runs/minicpm_s_1b
  --set init_from=runs/minicpm_1b@252000
"""

from configs import _common
from minicpm_jax import config
from minicpm_jax.models import zoo


def get_config(arg: str = "") -> config.TrainConfig:
  cfg = _common.recipe(
    "minicpm_s_1b",
    zoo.minicpm_s_1b(**_common.large()),
    peak_lr=0.01,
    schedule=_common.wsd(decay_start=20_000, decay_steps=5_400, shape="exp_half_life"),
    phases={"stable": _common.MINICPM_STABLE, "decay": _common.MINICPM_DECAY},
  )
  return _common.apply(cfg, arg)
