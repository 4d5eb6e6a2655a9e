"""MiniCPM-2B (2.4B): two-stage WSD pretraining (MiniCPM sections 4.2, 5, 6.2, 6.3).

From the paper: base lr 0.01 under muP (0.0011 for matrices), batch 3.93M tokens throughout, about
1T tokens stable, 110B of decay with half-life 5000 steps on a mixture with instruction data. The
paper's SFT starts from an *earlier* decay checkpoint than the last. Warm-up, weight decay, betas
and clip are a public run script's.

Cost: 1.10T tokens, 2.0e22 FLOPs (6N + causal attention), about 600 H100-days at 40% MFU.
Expected after SFT (MiniCPM Table 1, row A-2): C-Eval 52.6, CMMLU 51.1, MMLU 50.9, GSM8K 42.3.
Command: python -m experiments.pretrain --config=minicpm_2b --workdir=runs/minicpm_2b
"""

from configs import _common
from minicpm_jax import config
from minicpm_jax.models import zoo


def get_config(arg: str = "") -> config.TrainConfig:
  cfg = _common.recipe(
    "minicpm_2b",
    zoo.minicpm_2b(**_common.large()),
    peak_lr=0.01,
    schedule=_common.minicpm_wsd(),
    phases={"stable": _common.MINICPM_STABLE, "decay": _common.MINICPM_DECAY},
  )
  return _common.apply(cfg, arg)
