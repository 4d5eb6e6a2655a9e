"""import_hf and export_hf: HF folder -> run folder -> HF folder keeps every bit."""

import dataclasses
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from experiments import export_hf, import_hf
from minicpm_jax import ckpt, config
from minicpm_jax.ckpt import orbax_io
from minicpm_jax.models import transformer
from minicpm_jax.text import tokenizer
from tests.ckpt import hf_folder
from tests.models import common


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
  hf = hf_folder.MINICPM | {"torch_dtype": "bfloat16", "vocab_size": 300, "eos_token_id": [2, 7]}
  path = tmp_path_factory.mktemp("model")
  return hf_folder.write(path, hf, hf_folder.tensors(hf))


@pytest.fixture(scope="module")
def run(folder, tmp_path_factory):
  tokenizer.train_bpe(["def f(x):\n  return x\n"] * 9, 280).save(folder)
  path = tmp_path_factory.mktemp("runs") / "base"
  assert import_hf.main(["", f"--model={folder}", f"--workdir={path}"]) == 0
  return path


def test_there_and_back_is_bit_equal(folder, run, tmp_path, capsys):
  out = tmp_path / "out"
  assert export_hf.main(["", f"--workdir={run}", f"--output={out}", "--shard_gb=2e-5"]) == 0
  assert "parameters in bf16, minicpm" in capsys.readouterr().out
  old, new = hf_folder.read(folder), hf_folder.read(out)
  assert set(old) == set(new) and all(hf_folder.same_bits(old[n], new[n]) for n in old)
  assert (out / "model.safetensors.index.json").exists()
  written = json.loads((out / "config.json").read_text())
  assert written["eos_token_id"] == [2, 7] and written["torch_dtype"] == "bfloat16"
  _, _, tok = ckpt.load_hf(out)
  assert tok.decode(tok.encode("return x")) == "return x"


def test_llama_export_computes_the_same(folder, run, tmp_path):
  out = tmp_path / "llama"
  flags = [f"--workdir={run}", f"--output={out}", "--llama", "--dtype=f32"]
  assert export_hf.main(["", *flags]) == 0
  tokens_BT = jnp.asarray(np.random.default_rng(0).integers(0, 300, (2, 8)), jnp.int32)
  logits = []
  for path in (folder, out):
    model, params, _ = ckpt.load_hf(path, dtype="f32")
    logits.append(np.asarray(jax.jit(model.apply)({"params": params}, tokens_BT).logits))
  assert model.cfg.arch == "llama" and not model.cfg.tie_embeddings
  np.testing.assert_allclose(logits[0], logits[1], atol=1e-4)


def test_a_run_of_latent_weights_becomes_the_llama_that_it_computes(tmp_path):
  model, params = common.build(common.config("minicpm4_0p5b", num_layers=1))
  quant = config.QuantConfig(scheme="int4", group_size=16)
  latent = transformer.Transformer(dataclasses.replace(model.cfg, quant=quant))
  orbax_io.import_params(tmp_path / "run", latent.cfg, params)
  flags = [f"--workdir={tmp_path / 'run'}", f"--output={tmp_path / 'out'}", "--llama"]
  assert export_hf.main(["", *flags]) == 0
  model, folded, _ = ckpt.load_hf(tmp_path / "out", dtype="f32")
  assert model.cfg.arch == "llama" and model.cfg.quant is None
  wanted, found = (
    np.asarray(common.apply(*one, common.tokens((1, 9))).logits)
    for one in ((latent, params), (model, folded))
  )
  np.testing.assert_allclose(found, wanted, atol=1e-5 * np.std(wanted))


def test_bad_input_is_one_line(folder, run, tmp_path, capsys):
  assert import_hf.main(["", f"--model={folder}", f"--workdir={run}"]) == 1
  assert "found a run there already" in capsys.readouterr().err
  new = tmp_path / "new"
  assert import_hf.main(["", f"--model={tmp_path / 'none'}", f"--workdir={new}"]) == 1
  assert export_hf.main(["", f"--workdir={tmp_path}", f"--output={new}"]) == 1
  assert export_hf.main(["", f"--workdir={run}@7", f"--output={new}"]) == 1
  assert export_hf.main(["", f"--output={new}"]) == 1
  text = capsys.readouterr().err
  assert "no such folder" in text and "config.py" in text and "expected 7" in text
  assert len(text.splitlines()) == 4 and not new.exists()
