"""`experiments.quantize` from a folder to GPTQ and GGUF, with its report; bad input in one line."""

import dataclasses
import json

import numpy as np
import pytest

from experiments import _quantize, bench_quantize, quantize
from minicpm_jax import ckpt, config
from minicpm_jax.ckpt import orbax_io
from minicpm_jax.core import trees
from minicpm_jax.models import zoo
from minicpm_jax.text import tokenizer
from tests.models import common


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
  pytest.importorskip("tokenizers")
  path = tmp_path_factory.mktemp("model")
  (path / "text.txt").write_text("some text to learn merges from, and to calibrate with. " * 40)
  tok = tokenizer.train_bpe([(path / "text.txt").read_text()], 270)
  model, params = common.build(common.config("minicpm4_0p5b", num_layers=1, vocab_size=270))
  ckpt.save_hf(path / "hf", model, params, tok)
  return path


def run(folder, *more):
  shared = [f"--model={folder / 'hf'}", "--group_size=16", "--sequences=4", "--length=16"]
  return quantize.main(["quantize", *shared, *more])


def test_a_folder_becomes_gptq_and_gguf(folder, capsys):
  text = f"--text={folder / 'text.txt'}"
  out = folder / "out"
  assert run(folder, f"--output={out}", "--method=p-gptq", "--rotate", text) == 0
  report = json.loads((folder / "out.report.json").read_text())
  assert report["is_rotated"] and report["calibration"]["tokens"] == 64
  assert [r["name"] for r in report["projections"]][:4] == ["attn/q", "attn/k", "attn/v", "attn/o"]
  assert all(0 < r["error"] < 0.5 for r in report["projections"])
  assert set(report["hours_for_minicpm4_8b"]) == {"forward", "hessian", "solve"}
  assert "MiniCPM4-8B with 1024 x 2048 tokens" in capsys.readouterr().out
  model, params, tok = ckpt.load_hf(out, dtype="f32")
  plain, floats, _ = ckpt.load_hf(folder / "hf")
  tokens = common.tokens((1, 12))
  found = np.asarray(common.apply(model, params, tokens).logits)
  wanted = np.asarray(common.apply(plain, floats, tokens).logits)
  assert np.linalg.norm(found - wanted) < 0.6 * np.linalg.norm(wanted)  # unrelated: 1.4
  assert tok.encode("some text") and not model.cfg.tie_embeddings
  assert run(folder, f"--output={folder / 'b'}", "--method=rtn", "--prefix", text) == 0
  report = json.loads((folder / "b.report.json").read_text())
  assert report["prefixed_tokens"] == [] and not (folder / "b.prefix").exists()  # no outliers here
  pytest.importorskip("gguf")
  assert run(folder, f"--output={folder}/m.gguf", "--method=rtn", "--kind=q8_0") == 0
  back = ckpt.load_gguf(folder / "m.gguf")[1]
  assert back["embed"]["embedding"].shape == (270, 32)


@pytest.mark.parametrize(
  "more, match",
  [
    ((), "--output: found none"),
    (("--output=x", "--method=gptq"), "--text: gptq needs calibration text"),
    (("--output=x", "--method=rtn", "--group_size=48"), "group_size: found 48"),
    (("--output=x", "--method=gptq", "--text=nothing.txt"), "nothing.txt: no such file"),
    (("--output=x.gguf", "--method=rtn", "--kind=q5"), "--kind: found 'q5'"),
    (("--output=x.gguf", "--method=rtn", "--kind=tq2_0"), "--kind: found tq2_0"),
    (("--output=x.gguf", "--method=ternary", "--kind=q4_0"), "--kind: found q4_0"),
    (("--output=x", "--method=ternary"), "expected a .gguf name"),
    (("--output=x", "--method=rtn", "--format=marlin"), "--format=marlin: found group_size 16"),
    (("--output=x", "--method=gptq", "--text=text.txt", "--sequences=0"), "--sequences: found 0"),
    (("--output=x", "--method=gptq", "--text=text.txt", "--length=0"), "--length: found 0"),
  ],
)
def test_bad_input(folder, tmp_path, monkeypatch, capsys, more, match):
  monkeypatch.chdir(tmp_path)
  more = [x.replace("=text.txt", f"={folder / 'text.txt'}") for x in more]
  for name in ("output", "text", "method", "kind", "format"):
    quantize.VALUES[name].unparse()
  assert run(folder, *more) == 1
  error = capsys.readouterr().err
  assert error.startswith("quantize: ") and match in error and not list(tmp_path.iterdir())


@pytest.mark.parametrize(
  "name, more, match",
  [
    ("minicpm4_0p5b", ("--format=marlin", "--output=x"), "32 inputs and 32 outputs, expected mul"),
    ("minicpm_moe_8x2b", ("--format=marlin", "--output=x"), "found experts or latent attention"),
    (
      "minicpm3_4b",
      ("--output=x.gguf",),
      "model.arch: found 'minicpm3', expected llama or minicpm",
    ),
  ],
)
def test_what_has_no_file_form_is_refused_first(tmp_path, monkeypatch, capsys, name, more, match):
  monkeypatch.setattr(quantize.quantize, "quantize_model", None)
  monkeypatch.chdir(tmp_path)
  model, params = common.build(common.config(name, num_layers=1))
  monkeypatch.setattr(quantize._models, "load_floats", lambda path: (model, params, None))
  for flag in ("output", "method", "format", "group_size"):
    quantize.VALUES[flag].unparse()
  assert quantize.main(["q", "--model=m", "--method=rtn", "--group_size=-1", *more]) == 1
  assert match in capsys.readouterr().err


def test_blocks_of_a_file_leave_the_router_as_it_is():
  """It is F32 in every GGUF file; experts are rounded."""
  params = common.build(common.config("minicpm_moe_8x2b", num_layers=1))[1]
  before, after = params["layers"]["moe"], _quantize.through_gguf(params, "q4_0")["layers"]["moe"]
  np.testing.assert_array_equal(after["router"]["kernel"], before["router"]["kernel"])
  assert 0 < np.abs(after["up"]["kernel"] - before["up"]["kernel"]).max() < 0.1


def test_work_counts_operations():
  """One token through one layer and its Hessians, counted by hand for the 8B shape."""
  cfg = zoo.ZOO["minicpm4_8b"]()
  work = _quantize.work(cfg, 1)
  qkv, o, mlp = 4096 * (32 + 4) * 128, 4096 * 4096, 4096 * 16384
  assert work["forward"] == 2 * 32 * (qkv + o + 3 * mlp) == 2 * 7583567872 - 2 * (65 * 4096)
  inputs = 3 * 4096**2 + 16384**2
  assert work["hessian"] == 2 * 32 * (0 + qkv + (qkv + o) + (qkv + o + 2 * mlp) + inputs)


def test_a_perplexity_that_is_not_finite_is_read_back(tmp_path):
  """JSON has null for it; the next value is added and drawn."""
  _quantize.write_perplexity(tmp_path, {"perplexity": {"rtn": [float("inf"), 2.0]}, "seconds": {}})
  found = _quantize.read_perplexity(tmp_path, {})
  assert np.isnan(found["perplexity"]["rtn"][0]) and found["perplexity"]["rtn"][1] == 2
  _quantize.write_perplexity(tmp_path, found)


def test_a_run_of_ternary_training_is_measured_by_its_codes(folder, tmp_path, capsys):
  """Codes by the rule as printed: sign and zero of w / mean|w|, a scale an output channel."""
  model, params, tok = ckpt.load_hf(folder / "hf", dtype="f32")
  cfg = dataclasses.replace(model.cfg, quant=config.QuantConfig(scheme="ternary"))
  orbax_io.import_params(tmp_path / "run", cfg, params, tok)
  args = ["x", f"--model={folder / 'hf'}", f"--text={folder / 'text.txt'}", "--length=16"]
  args += [f"--heldout={folder / 'text.txt'}", "--group_size=16", "--eval_sequences=4"]
  args += ["--kinds=", "--methods=", f"--output={tmp_path}"]
  assert bench_quantize.main([*args, f"--trained=t:{tmp_path / 'run'}"]) == 0
  found = json.loads((tmp_path / "quantize_ppl.json").read_text())["perplexity"]

  def ternary(path, w):
    if not path.endswith("kernel"):
      return w
    outputs = 2 if path.split("/")[-2] in ("q", "k", "v") else 1
    inputs = 2 if "attn/o" in path else 1
    axes = tuple(range(w.ndim - outputs - inputs, w.ndim - outputs))
    scale = np.mean(np.abs(w), axis=axes, keepdims=True)
    return scale * np.clip(np.round(w / scale), -1, 1)

  rows = _quantize.windows(_quantize.token_stream([folder / "text.txt"], tok), 4, 16, None)
  wanted = _quantize.perplexity(model, trees.map_with_path(ternary, params), rows)
  assert found["t"] == [pytest.approx(wanted, rel=1e-4)] and wanted != found["f32"][0]
  assert bench_quantize.main([*args, "--trained=t"]) == 1
  assert "--trained: found 't', expected NAME:RUN" in capsys.readouterr().err
