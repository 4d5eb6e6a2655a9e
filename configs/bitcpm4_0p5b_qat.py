"""BitCPM4-0.5B, second stage: ternary quantisation-aware training (MiniCPM4 section 3.3).

From the weights of `bitcpm4_0p5b` with fresh Adam moments, the rate re-warmed to 5e-3 (BitCPM-CANN
later found 1e-2 better: --set optim.peak_lr=0.01), 350B tokens, the last half of them the decay.
One scale an output channel; --set model.quant.group_size=64 for groups. What the paper does not
print is ours: moments, length of the warm-up, shape of the decay.

Cost: 350B tokens, 1.1e21 FLOPs, about 33 H100-days at 40% MFU (the quantiser adds a few percent).
Expected: MMLU 49.88, average over eight benchmarks 39.84 (MiniCPM4 table 3).
Command: python -m experiments.pretrain --config=bitcpm4_0p5b_qat --workdir=runs/bitcpm4_0p5b_qat
"""

from configs import _common
from minicpm_jax import config
from minicpm_jax.models import zoo


def get_config(arg: str = "") -> config.TrainConfig:
  model = zoo.bitcpm4_0p5b(rope=config.RopeConfig(), max_position=4096, **_common.large())
  return _common.apply(_common.bitcpm4_qat("bitcpm4_0p5b_qat", "bitcpm4_0p5b", model), arg)
