"""The quickstart's model: MiniCPM4 in small, about 1M parameters, MTP on, for a laptop CPU.

WSD with 20% decay on a second mixture, as MiniCPM4 section 5.1 does at scale; width ratio 2 to
dim_model_base 64, so muP's rules are all at work. `experiments/quickstart.py` puts in its own
corpus, tokenizer size and lengths; alone, the config wants two prepared sources.

Cost: 2M tokens, 2e13 FLOPs, minutes on two CPU cores.
Expected: see the quickstart's table (held-out bits per byte next to an n-gram model and gzip).
Command: make quickstart, or python -m experiments.pretrain --config=nano --workdir=runs/nano
  --data=text:data/text:1/0.5 --data=good:data/good:0/0.5
"""

from configs import _common
from minicpm_jax import config
from minicpm_jax.models import zoo


def get_config(arg: str = "") -> config.TrainConfig:
  schedule = _common.wsd(decay_start=800, decay_steps=200, warmup_steps=50, min_ratio=0.05)
  cfg = config.TrainConfig(
    name="nano",
    model=zoo.nano(mtp=config.MTPConfig()),
    optim=config.OptimConfig(peak_lr=0.02, schedule=schedule),
    data=_common.data(
      {"stable": {"text": 1.0}, "decay": {"text": 0.5, "good": 0.5}}, 800, rows=8, seq_len=256
    ),
    num_steps=schedule.total_steps,
    checkpoint=config.CheckpointConfig(every_steps=200, keep_steps=(800,)),
  )
  return _common.apply(cfg, arg)
