"""CPM.cu's MiniCPM4-8B demonstration (examples/minicpm4) as a preset of generate and serve.

Arguments switch parts off, all are on by default as there: "nosparse", "noquant", "noeagle",
"noeagle_quant", "noyarn". Folders are relative: put the released checkpoints beside each other, or
give --model_path and --draft_model_path. Whether weights are quantised is read from their
config.json, not from these names.

Expected: text; the paper reports 128K contexts on one consumer GPU (MiniCPM4 figure 1).
Command: python -m experiments.generate --config=minicpm4_8b --prompt_file=long.txt
"""

from minicpm_jax import config

PARTS = ("sparse", "quant", "eagle", "eagle_quant", "yarn")


def get_config(arg: str = "") -> config.InferConfig:
  off = [part for part in arg.split(",") if part]
  for part in off:
    if part.removeprefix("no") not in PARTS or not part.startswith("no"):
      raise ValueError(f"minicpm4_8b: found {part!r}, expected no" + ", no".join(PARTS))
  has = {part: f"no{part}" not in off for part in PARTS}
  draft = "MiniCPM4-8B-Eagle-FRSpec" + ("-QAT-cpmcu" if has["eagle_quant"] else "")
  return config.InferConfig(
    model_path="MiniCPM4-8B" + ("-marlin-cpmcu" if has["quant"] else ""),
    draft_model_path=draft if has["eagle"] else None,
    frspec_path=draft if has["eagle"] else None,
    model_type="minicpm4" if has["sparse"] else "minicpm",
    minicpm4_yarn=has["yarn"],
  )
