"""BitCPM4-1B, first stage: full precision, flat after the warm-up (MiniCPM4 section 3.3).

Base rate 1e-2; the quantised stage (`bitcpm4_1b_qat`) starts from the end of this one, so nothing
is decayed here. 525B tokens are 60% of 875B: the paper's 350B tokens of quantisation-aware training
are then the 40% that its sweep asks for. The length of this stage is ours.

Cost: 525B tokens, 5.3e21 FLOPs, about 155 H100-days at 40% MFU.
Expected: a dense model to quantise; the paper prints no loss for it.
Command: python -m experiments.pretrain --config=bitcpm4_1b --workdir=runs/bitcpm4_1b
"""

from configs import _common
from minicpm_jax import config
from minicpm_jax.models import zoo


def get_config(arg: str = "") -> config.TrainConfig:
  model = zoo.bitcpm4_1b(rope=config.RopeConfig(), max_position=4096, **_common.large())
  return _common.apply(_common.bitcpm4_dense("bitcpm4_1b", model), arg)
