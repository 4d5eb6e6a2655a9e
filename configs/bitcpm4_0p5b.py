"""BitCPM4-0.5B: the stage before ternary training (MiniCPM4 section 3.3).

Dense training of the shape only: ternary quantisation-aware training is not built yet, so this is
the first, high-precision stage (MiniCPM4 section 3.3: base lr 1e-2, then QAT re-warmed to 5e-3
for at least 40% of the tokens, 350B tokens in all). Here 210B tokens, flat after the warm-up: QAT
is meant to branch from the end, so nothing is decayed.

Cost: 210B tokens, 6.7e20 FLOPs, about 20 H100-days at 40% MFU.
Expected: a dense model to quantise; the paper prints no loss for it.
Command: python -m experiments.pretrain --config=bitcpm4_0p5b --workdir=runs/bitcpm4_0p5b
"""

from configs import _common
from minicpm_jax import config
from minicpm_jax.models import zoo


def get_config(arg: str = "") -> config.TrainConfig:
  model = zoo.bitcpm4_0p5b(rope=config.RopeConfig(), max_position=4096, **_common.large())
  cfg = _common.recipe(
    "bitcpm4_0p5b",
    model,
    peak_lr=0.01,
    schedule=_common.wsd(decay_start=53_400, decay_steps=0, warmup_steps=2000),
    phases={"stable": _common.MINICPM4_STABLE},
  )
  return _common.apply(cfg, arg)
