"""MiniCPM4-0.5B: stable + anneal at 4K (MiniCPM4 sections 2.3 and 5.1).

From the paper: base lr 7e-3 under muP, context 4K, 1T tokens (how staged is not said: 0.9T + 0.1T
is ours), multi-token prediction beside the next token (lambda not given: 0.3). Warm-up 2000 steps
and the decay to 5% of the peak are MiniCPM-SALA's, which starts from this model; the batch is
MiniCPM's 3.93M tokens; the mixture's shares are ours. Plain RoPE here: LongRoPE comes with the
32K stage (`minicpm4_0p5b_long`).

Cost: 1.0T tokens, 3.8e21 FLOPs with the MTP head, about 110 H100-days at 40% MFU.
Expected: the released 0.5B; no loss is printed.
Command: python -m experiments.pretrain --config=minicpm4_0p5b --workdir=runs/minicpm4_0p5b
"""

from configs import _common
from minicpm_jax import config
from minicpm_jax.models import zoo


def get_config(arg: str = "") -> config.TrainConfig:
  model = zoo.minicpm4_0p5b(
    rope=config.RopeConfig(), max_position=4096, mtp=config.MTPConfig(), **_common.large()
  )
  cfg = _common.recipe(
    "minicpm4_0p5b",
    model,
    peak_lr=7e-3,
    schedule=_common.minicpm4_wsd(decay_start=229_000, decay_steps=25_400),
    phases={"stable": _common.MINICPM4_STABLE, "decay": _common.MINICPM4_DECAY},
  )
  return _common.apply(cfg, arg)
