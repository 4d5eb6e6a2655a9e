"""MiniCPM4-8B: 7T stable + 1T anneal at 4K (MiniCPM4 sections 2.3 and 5.1).

From the paper: base lr 7e-3 under muP, context 4K, 7T stable + 1T anneal (the introduction says
1.3T), multi-token prediction beside the next token (lambda not given: 0.3). Warm-up 2000 steps
and the decay to 5% of the peak are MiniCPM-SALA's, which starts from this model; the batch is
MiniCPM's 3.93M tokens; the mixture's shares are ours. Plain RoPE here: LongRoPE comes with the
32K stage (`minicpm4_8b_long`).

Cost: 8.0T tokens, 4.3e23 FLOPs with the MTP head, about 12,600 H100-days at 40% MFU.
Expected: the released 8B; no loss is printed.
Command: python -m experiments.pretrain --config=minicpm4_8b --workdir=runs/minicpm4_8b
"""

from configs import _common
from minicpm_jax import config
from minicpm_jax.models import zoo


def get_config(arg: str = "") -> config.TrainConfig:
  model = zoo.minicpm4_8b(
    rope=config.RopeConfig(), max_position=4096, mtp=config.MTPConfig(), **_common.large()
  )
  cfg = _common.recipe(
    "minicpm4_8b",
    model,
    peak_lr=7e-3,
    schedule=_common.minicpm4_wsd(decay_start=1_780_000, decay_steps=254_000),
    phases={"stable": _common.MINICPM4_STABLE, "decay": _common.MINICPM4_DECAY},
  )
  return _common.apply(cfg, arg)
