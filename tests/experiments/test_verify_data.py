"""`experiments.verify_data`: a verdict from the shell, and bad flags."""

import json

import pytest

from experiments import verify_data
from minicpm_jax import config
from minicpm_jax.data import python_corpus, shards
from minicpm_jax.text import tokenizer
from minicpm_jax.train import loop


@pytest.mark.slow
def test_verdict_from_the_shell(tmp_path, capsys):
  """Stable on source code; the candidate is the reference, held-out reference decides."""
  good = list(python_corpus.documents_of("reference", max_bytes=200_000))
  code = list(python_corpus.documents_of("source", max_bytes=200_000))
  tok = tokenizer.train_bpe((d.text for d in good[:20] + code[:5]), 400)
  for name, docs in (("code", code), ("good", good[10:])):
    shards.prepare(docs, tmp_path / name, name=name, tokenizer=tok)
  (tmp_path / "held.jsonl").write_text(
    "".join(json.dumps({"id": d.id, "text": d.text[:500]}) + "\n" for d in good[:10])
  )
  cfg = config.TrainConfig(
    model=config.ModelConfig(
      name="t",
      vocab_size=tok.vocab_size,
      model_dim=32,
      mlp_dim=64,
      num_layers=2,
      num_heads=4,
      num_kv_heads=2,
      head_dim=8,
      max_position=64,
      dim_model_base=16,
    ),
    optim=config.OptimConfig(schedule=config.ScheduleConfig(warmup_steps=1, stable_steps=20)),
    data=config.DataConfig(
      sources=(config.SourceConfig(name="code", path=str(tmp_path / "code")),),
      phases=(config.PhaseConfig(weights=(("code", 1.0),)),),
      seq_len=64,
      batch_size=8,
    ),
    num_steps=20,
  )
  loop.train(cfg, tmp_path / "run", tok=tok)
  argv = ["verify_data", f"--checkpoint={tmp_path / 'run'}@20", f"--workdir={tmp_path / 'out'}"]
  argv += [f"--candidate=good:{tmp_path / 'good'}", f"--text=reference:{tmp_path / 'held.jsonl'}"]
  assert verify_data.main([*argv, "--share=0.5", "--stage2_steps=30"]) == 0
  assert capsys.readouterr().out.strip().splitlines()[-1].startswith("accept: +")
  report = json.loads((tmp_path / "out" / "verification-good.json").read_text())
  assert report["decision"] == "accept" and report["wins"] == report["num_seeds"] == 1
  assert (tmp_path / "out" / "verification-good.png").read_bytes()[:4] == b"\x89PNG"


@pytest.mark.parametrize(
  "argv, message",
  [
    ([], "--checkpoint: found none"),
    (["--checkpoint=a@1", "--workdir=w"], "--candidate: found None, expected NAME:PATH"),
    (["--checkpoint=a@1", "--workdir=w", "--candidate=x:y"], "--tokenizer: found none in a"),
    (["--checkpoint=a@1", "--workdir=w", "--decide_by=luck"], "decide_by"),
  ],
)
def test_bad_flags(argv, message, capsys):
  assert verify_data.main(["verify_data", *argv]) == 1
  error = capsys.readouterr().err
  assert message in error and error.startswith("verify_data: ")
