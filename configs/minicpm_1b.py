"""MiniCPM-1B (1.2B): two-stage WSD pretraining (MiniCPM sections 4.2, 5, 6.2, 6.3).

From the paper: base lr 0.01 under muP, 1.1T tokens, decay on a mixture with instruction data,
half-life 5000 steps of 3.93M tokens. The paper starts with 2M-token batches and doubles them
later; this recipe has 3.93M throughout (a batch change is a new run that branches, MiniCPM 6.2
says it acts like a learning-rate cut). Warm-up, weight decay, betas and clip are a public run
script's.

Cost: 1.10T tokens, 1.1e22 FLOPs (6N + causal attention), about 330 H100-days at 40% MFU.
Expected after SFT (MiniCPM Table 1, row B-3): C-Eval 49.1, MMLU 49.6, GSM8K 31.8, HumanEval 44.5.
Command: python -m experiments.pretrain --config=minicpm_1b --workdir=runs/minicpm_1b
"""

from configs import _common
from minicpm_jax import config
from minicpm_jax.models import zoo


def get_config(arg: str = "") -> config.TrainConfig:
  cfg = _common.recipe(
    "minicpm_1b",
    zoo.minicpm_1b(**_common.large()),
    peak_lr=0.01,
    schedule=_common.minicpm_wsd(),
    phases={"stable": _common.MINICPM_STABLE, "decay": _common.MINICPM_DECAY},
  )
  return _common.apply(cfg, arg)
