"""MiniCPM-2B-128k, first stage: 4K -> 32K with ABF (MiniCPM section 7.2).

From the paper: start at the last *stable* checkpoint of MiniCPM-2B, untie the head from the
embedding (the logits do not change), theta 1e4 -> 1e6, WSD, 44% long and 56% short data. Learning
rate and token counts are not given: 20B tokens at the stable 0.01 with a decay of 10% are ours.

Cost: 20B tokens, 6.9e20 FLOPs, about 20 H100-days at 40% MFU.
Expected (no published number): loss on short rows back to the start's, lower beyond 4096.
Command: python -m experiments.continue_long --config=minicpm_2b_32k --workdir=runs/minicpm_2b_32k
  --set init_from=runs/minicpm_2b@252000
"""

from configs import _common
from minicpm_jax import config
from minicpm_jax.models import zoo


def get_config(arg: str = "") -> config.TrainConfig:
  model = zoo.minicpm_2b_128k(
    name="minicpm_2b_32k",
    rope=config.RopeConfig(theta=1e6),
    max_position=32768,
    **_common.large(),
  )
  cfg = _common.recipe(
    "minicpm_2b_32k",
    model,
    peak_lr=0.01,
    schedule=_common.wsd(decay_start=4500, decay_steps=500),
    phases={"stable": _common.MINICPM_LONG, "decay": _common.MINICPM_LONG},
    rows=120,
    seq_len=32768,
  )
  return _common.apply(cfg, arg)
