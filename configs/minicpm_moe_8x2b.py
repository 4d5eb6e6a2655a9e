"""MiniCPM-MoE-8x2B (13.6B, 4.0B active): sparse upcycling of MiniCPM-2B (MiniCPM section 7.3).

From the paper: every FFN of a stable checkpoint becomes 8 equal experts, router ~ N(0, 0.1^2),
top 2, balance loss x 0.01, WSD, 130K steps of 4M tokens of continued pretraining + decay, same
data. The split into stable and decay steps is ours. Make the starting weights once with
`models.convert.upcycle` and `ckpt.save_hf`; before the first step they equal the dense model.

Cost: 511B tokens, 1.4e22 FLOPs (active parameters), about 420 H100-days at 40% MFU.
Expected: at step 0 the logits of the dense model; no published loss.
Command: python -m experiments.pretrain --config=minicpm_moe_8x2b --workdir=runs/moe
  --set init_from=upcycled/ --set mesh.ep=8
"""

from configs import _common
from minicpm_jax import config
from minicpm_jax.models import zoo


def get_config(arg: str = "") -> config.TrainConfig:
  cfg = _common.recipe(
    "minicpm_moe_8x2b",
    zoo.minicpm_moe_8x2b(**_common.large()),
    peak_lr=0.01,
    schedule=_common.wsd(decay_start=117_000, decay_steps=13_000, shape="exp_half_life"),
    phases={"stable": _common.MINICPM_STABLE, "decay": _common.MINICPM_DECAY},
  )
  return _common.apply(cfg, arg)
