"""The command, as a user runs it: train a tokenizer, write shards, stop, go on, bad input."""

import json
import os
import subprocess
import sys

import pytest

pytest.importorskip("tokenizers")

from experiments import prepare_data
from minicpm_jax.data import iterator, shards, sources
from minicpm_jax.text import tokenizer as tokenizer_lib

WORDS = "der kleine Fuchs springt über einen faulen Hund und läuft davon".split()


def _corpus(path, count=200):
  with open(path, "w") as file:
    for i in range(count):
      text = " ".join(WORDS[(i * j) % len(WORDS)] for j in range(1, 9)) + f" {i}"
      file.write(json.dumps({"id": f"doc{i}", "text": text}, ensure_ascii=False) + "\n")


def _run(capsys, *args):
  prepare_data.VALUES.unparse_flags()
  for flag in prepare_data.VALUES.get_flags_for_module(prepare_data.__name__):
    flag.unparse()
  status = prepare_data.main(["prepare_data", *args])
  return status, capsys.readouterr()


@pytest.fixture
def prepared(tmp_path, capsys):
  _corpus(tmp_path / "x.jsonl")
  args = [
    f"--input={tmp_path / 'x.jsonl'}",
    f"--output={tmp_path / 'web'}",
    "--train_tokenizer_vocab=300",
    "--heldout_permille=100",
  ]
  status, output = _run(capsys, *args)
  assert status == 0, output.err
  return tmp_path, args, output.out


def test_shards_decode_to_the_text(prepared):
  folder, _, printed = prepared
  tokenizer = tokenizer_lib.load_tokenizer(folder / "web-tokenizer")
  texts = []
  for name in ("web", "web-heldout"):
    source = sources.ShardSource(name, folder / name)
    for i in range(len(source)):
      ids = source[i].tolist()
      assert ids[-1] == tokenizer.eos_id
      texts.append(tokenizer.decode(ids[:-1]))
    assert source.index.num_documents > 5
  with open(folder / "x.jsonl") as file:
    assert sorted(texts) == sorted(json.loads(line)["text"] for line in file)
  assert " documents, " in printed and "bytes a token" in printed
  assert sorted(os.listdir(folder)) == ["web", "web-heldout", "web-tokenizer", "x.jsonl"]


def test_second_run_keeps_everything(prepared, capsys):
  folder, args, _ = prepared
  before = {p: p.stat().st_mtime_ns for p in folder.rglob("*") if p.is_file()}
  status, output = _run(capsys, *args)
  assert status == 0
  assert "(kept)" in output.out
  assert before == {p: p.stat().st_mtime_ns for p in folder.rglob("*") if p.is_file()}


def test_it_feeds_the_iterator(prepared):
  from minicpm_jax import config

  folder, _, _ = prepared
  cfg = config.DataConfig(
    sources=(config.SourceConfig(name="web", path=str(folder / "web")),),
    phases=(config.PhaseConfig(weights=(("web", 1.0),)),),
    seq_len=32,
    batch_size=2,
    prefetch=0,
    num_threads=0,
  )
  it = iterator.make_iterator(cfg)
  assert next(it)["tokens"].shape == (2, 32)
  assert it.vocab_size == shards.read_index(folder / "web").config.vocab_size


@pytest.mark.parametrize(
  "args, message",
  [
    (["--input=x.jsonl", "--output=o"], "expected exactly one of them"),
    (["--output=o"], "--input: found none"),
    (["--input=nowhere", "--output=o", "--train_tokenizer_vocab=300"], "nowhere: no such file"),
    (["--input=bad.jsonl", "--output=o", "--train_tokenizer_vocab=300"], "bad.jsonl: line 2: not"),
    (["--input=e.jsonl", "--output=o", "--train_tokenizer_vocab=300"], "corpus is empty"),
    (["--input=x.jsonl", "--output=o", "--tokenizer=."], "found no tokenizer.json"),
    (["--input=x.jsonl", "--output=o", "--wrong=1"], "wrong"),
  ],
)
def test_bad_input_is_one_line_and_leaves_no_shards(tmp_path, capsys, monkeypatch, args, message):
  monkeypatch.chdir(tmp_path)
  _corpus("x.jsonl", 5)
  (tmp_path / "bad.jsonl").write_text('{"text": "a"}\n{\n')
  (tmp_path / "e.jsonl").write_text("")
  status, output = _run(capsys, *args)
  assert status == 1
  assert message in output.err and output.err.count("\n") == 1
  assert not (tmp_path / "o").exists() and not (tmp_path / "o.partial").exists()


@pytest.mark.slow  # two interpreters and two worker processes
def test_as_a_process_with_workers(tmp_path):
  _corpus(tmp_path / "x.jsonl", 2000)
  command = [sys.executable, "-m", "experiments.prepare_data", "--train_tokenizer_vocab=300"]
  command += [f"--input={tmp_path / 'x.jsonl'}", "--num_workers=2", "--shard_mb=1"]
  result = subprocess.run(
    [*command, f"--output={tmp_path / 'web'}"], capture_output=True, text=True, timeout=120
  )
  assert result.returncode == 0, result.stderr
  assert shards.verify(tmp_path / "web").num_documents == 2000
