"""The command on folders that this test writes: every kind of model, chat, and clear refusals."""

import dataclasses
import re

import jax
import pytest

from experiments import _models
from experiments import generate as command
from minicpm_jax import ckpt, config
from minicpm_jax.ckpt import orbax_io
from minicpm_jax.core import fetch
from minicpm_jax.models import transformer
from minicpm_jax.text import tokenizer

TEXTS = [
  "the quick brown fox jumps over the lazy dog " * 20,
  "def add(a, b):\n  return a + b\n" * 20,
]


@pytest.fixture(scope="module")
def written(tmp_path_factory):
  """(HF folder, run folder): one small model, its tokenizer with the ChatML template."""
  pytest.importorskip("tokenizers")
  tok = tokenizer.train_bpe(TEXTS, 300)  # brings the ChatML template
  cfg = config.ModelConfig(
    vocab_size=tok.vocab_size,
    model_dim=16,
    mlp_dim=32,
    num_layers=2,
    num_heads=2,
    num_kv_heads=1,
    head_dim=8,
    max_position=64,
    scale_emb=12.0,
    scale_depth=1.4,
    dim_model_base=8,
    stop_ids=tok.stop_ids,
  )
  model = transformer.Transformer(cfg)
  params = transformer.init_params(model, jax.random.key(0))
  root = tmp_path_factory.mktemp("models")
  ckpt.save_hf(root / "hf", model, params, tok)
  orbax_io.import_params(root / "run", cfg, params, tok)
  return root / "hf", root / "run"


def run(*flags):
  return command.main(["generate", *flags])


def test_hf_folder_and_run_give_the_same_text(written, capfd):
  texts = []
  for spec in (written[0], written[1], f"{written[1]}@0"):
    flags = ["--raw", "--prompt=the quick", "--max_new_tokens=8", "--temperature=1", "--seed=4"]
    assert run(f"--model={spec}", *flags) == 0
    out, err = capfd.readouterr()
    texts.append(out)
    assert re.search(r"prefill length: +4 tokens", err) and re.search(r"decode length: +8 to", err)
  assert texts[0].startswith("the quick")
  assert len(texts[0]) > len("the quick\n")
  assert texts[0] == texts[1] == texts[2]


def test_a_prompt_goes_through_the_template_and_chat_answers_alike(written, capfd, monkeypatch):
  flags = [f"--model={written[0]}", "--max_new_tokens=8"]
  assert run(*flags, "--prompt=hello") == 0
  answer, err = capfd.readouterr()
  turns = iter(["hello", "", "/reset", "hello"])

  def typed(_):
    try:
      return next(turns)
    except StopIteration:
      raise EOFError from None

  monkeypatch.setattr("builtins.input", typed)
  assert run(*flags, "--chat") == 0
  out, chat_err = capfd.readouterr()
  assert out == answer * 2 + "\n"
  lengths = re.findall(r"prefill length: +(\d+) tokens", err + chat_err)
  assert len(lengths) == 3 and len(set(lengths)) == 1


def test_an_overlong_turn_ends_the_answer_and_not_the_chat(written, capfd, monkeypatch):
  turns = iter(["word " * 200, "hi"])

  def typed(_):
    try:
      return next(turns)
    except StopIteration:
      raise KeyboardInterrupt from None

  monkeypatch.setattr("builtins.input", typed)
  assert run(f"--model={written[0]}", "--chat", "--max_new_tokens=8") == 0
  _, err = capfd.readouterr()
  lines = err.splitlines()
  assert re.search(r"prompt: found \d+ tokens, expected at most 63", lines[0])
  assert lines[1].startswith("prefill length:")


@pytest.mark.parametrize(
  "flags, text",
  [
    ([], "--model: found none"),
    (["--model=x", "--chat", "--prompt=a"], "--chat: found several, expected one of them"),
    (["--model=x", "--prompt_file=y", "--prompt=a"], "--chat: found several, expected one of them"),
    (["--model=x", "--draft_kind=odd"], "draft_kind"),
    (["--model=x", "--memory_limit=2"], "memory_limit"),
    (["--model=x", "--draft_kind=mtp", "--spec_tree_size=65"], "spec_tree_size: found 65"),
    (["--model=x", "--json_schema=a", "--grammar_file=b"], "expected at most one of them"),
    (["--config=odd"], "--config: found 'odd', expected one of minicpm4_8b"),
    (["--config=minicpm4_8b:noodle"], "minicpm4_8b: found 'noodle', expected nosparse"),
    (["--model=x", "--chat", "--raw"], "--raw: found with --chat"),
    (["--model=x", "--prompt=a", "b"], "arguments: found 'b'"),
    (["--model=x", "--promt=a"], "promt"),
    (["--model=/no/such", "--prompt=a"], "found no such file or folder, expected an HF folder"),
    (["--model=x", "--prompt=a", "--top_p=0"], "sampling.top_p"),
  ],
)
def test_bad_flags(flags, text, capfd):
  assert run(*flags) == 1
  out, err = capfd.readouterr()
  assert err.startswith("generate: ")
  assert text in err
  assert not out


def test_other_folders_and_files_are_named(tmp_path):
  with pytest.raises(ValueError, match="found a folder with nothing in it"):
    _models.load(str(tmp_path))
  (tmp_path / "weights.bin").write_bytes(b"x")
  with pytest.raises(ValueError, match="found a folder with weights.bin, expected an HF folder"):
    _models.load(str(tmp_path))
  with pytest.raises(ValueError, match="found a file of another kind"):
    _models.load(str(tmp_path / "weights.bin"))
  (tmp_path / "broken.gguf").write_bytes(b"GGUX")
  with pytest.raises(ValueError, match="broken.gguf"):
    _models.load(str(tmp_path / "broken.gguf"))


def test_a_folder_without_a_tokenizer_is_refused(written, tmp_path):
  for name in ("config.json", "model.safetensors"):
    (tmp_path / name).symlink_to(written[0] / name)
  with pytest.raises(ValueError, match="found no tokenizer"):
    _models.load(str(tmp_path))


def test_loaded_models_have_the_form_for_decoding(written):
  for spec in written:
    model, params, _ = _models.load(str(spec))
    assert not model.cfg.scan_layers
    assert "layers_1" in params
    assert model.cfg == dataclasses.replace(model.cfg, dtype="f32", param_dtype="f32")


@pytest.mark.slow
def test_the_real_gguf_answers(capfd):
  pytest.importorskip("gguf")
  path = fetch.cached()
  if path is None:
    pytest.skip(f"SmolLM2-135M-Instruct is not in {fetch.cache_dir()}: run `{fetch.COMMAND}`")
  system = "You are a helpful AI assistant named SmolLM, trained by Hugging Face"
  question = "What is the capital of France? Answer in one sentence."
  assert run(f"--model={path}", f"--system={system}", f"--prompt={question}") == 0
  assert capfd.readouterr().out == "The capital of France is Paris.\n"
