"""MiniCPM-2B-128k, second stage: 32K -> 128K with NTK-aware scaling (MiniCPM section 7.2).

From the paper: NTK-aware scaling beyond 32K (released: dynamic, factor 4, window 65536), a
curriculum, 44% long and 56% short data, synthetic long QA added. Learning rate, tokens and the
curriculum's steps are not given: 10B tokens at 0.01, decaying over the last tenth, are ours.

Cost: 10B tokens, 9.3e20 FLOPs, about 27 H100-days at 40% MFU.
Expected: passkey retrieval up to 128K (MiniCPM section 7.2).
Command: python -m experiments.continue_long --config=minicpm_2b_128k --workdir=runs/minicpm_2b_128k
  --set init_from=runs/minicpm_2b_32k@4500 --set mesh.cp=8
"""

from configs import _common
from minicpm_jax import config
from minicpm_jax.models import zoo


def get_config(arg: str = "") -> config.TrainConfig:
  cfg = _common.recipe(
    "minicpm_2b_128k",
    zoo.minicpm_2b_128k(**_common.large()),
    peak_lr=0.01,
    schedule=_common.wsd(decay_start=2250, decay_steps=250),
    phases={"stable": _common.MINICPM_LONG, "decay": _common.MINICPM_LONG},
    rows=32,
    seq_len=131072,
  )
  return _common.apply(cfg, arg)
