"""CPM.cu's flag table, the presets, and what the flags do to a model; the server command."""

import dataclasses
import importlib.util
import json
import pathlib
import re
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from absl import flags

from experiments import _command, _infer, generate, serve
from minicpm_jax import ckpt, config
from minicpm_jax.ckpt import draft_io
from minicpm_jax.core import trees
from minicpm_jax.infer import frspec
from minicpm_jax.infer.drafters import chain, ngram
from minicpm_jax.infer.server import schemas
from minicpm_jax.models import bita as bita_lib
from minicpm_jax.models import draft as draft_lib
from minicpm_jax.models import transformer, zoo
from minicpm_jax.text import tokenizer

# inference.md section 18, as CPM.cu's common/args.py has it: name in dash form, default.
BOTH = {
  "model-path": None,
  "draft-model-path": None,
  "frspec-path": None,
  "model-type": "auto",
  "minicpm4-yarn": False,
  "cuda-graph": True,
  "memory-limit": 0.9,
  "chunk-length": 2048,
  "plain-output": False,
  "use-eagle3": False,
  "spec-window-size": 1024,
  "spec-num-iter": 2,
  "spec-topk-per-iter": 10,
  "spec-tree-size": 12,
  "frspec-vocab-size": 32768,
  "sink-window-size": 1,
  "block-window-size": 8,
  "sparse-topk-k": 64,
  "sparse-switch": 0,
  "use-compress-lse": True,
  "temperature": 0.0,
}
CLI = {
  "prompt-file": None,
  "prompt-text": "Who are you",
  "use-chat-template": True,
  "use-stream": True,
  "num-generate": 1024,
  "random-seed": None,
  "ignore-eos": False,
}
SERVER = {"host": "127.0.0.1", "port": 8000}  # the host is ours: loopback
ADDED = (
  "top-k top-p min-p repetition-penalty draft-kind draft-logit-scale rounds-per-dispatch max-batch "
  "json-schema grammar-file backend dtype generation-config"
).split()


def parse(command, *argv):
  return _command.parse(command.VALUES, ["x", *argv], None)


@pytest.mark.parametrize(
  "command, own, others",
  [(generate, CLI, SERVER), (serve, SERVER, CLI)],
  ids=["cli", "server"],
)
def test_names_and_defaults_are_those_of_the_table(command, own, others):
  values = parse(command)
  for name, default in (BOTH | own).items():
    flag = values[name.replace("-", "_")]
    assert flag.default == default and type(flag.default) is type(default), name
    assert getattr(config.InferConfig(), name.replace("-", "_")) == default
  for name in ADDED:
    assert name.replace("-", "_") in values
  for name in others:
    assert name.replace("-", "_") not in values
  kinds = ["eagle", "eagle3", "mtp", "chain", "hier", "bita", "ngram", "none"]
  assert values["draft_kind"].parser.enum_values == kinds
  assert values["model_type"].parser.enum_values == ["auto", "llama", "minicpm", "minicpm4"]
  assert values["dtype"].parser.enum_values == ["auto", "float16", "bfloat16", "float32"]


def test_aliases_and_presets():
  values = parse(generate, "--model=x", "--prompt=hi", "--nouse_chat_template", "--top_k=3")
  cfg = _infer.read(values)
  assert (cfg.model_path, cfg.prompt_text, cfg.use_chat_template, cfg.top_k) == (
    "x",
    "hi",
    False,
    3,
  )
  cfg = _infer.read(parse(generate, "--config=minicpm4_8b", "--spec_tree_size=24"))
  assert cfg.model_path == "MiniCPM4-8B-marlin-cpmcu" and cfg.minicpm4_yarn
  assert cfg.draft_model_path == cfg.frspec_path == "MiniCPM4-8B-Eagle-FRSpec-QAT-cpmcu"
  assert cfg.model_type == "minicpm4" and cfg.spec_tree_size == 24
  off = "--config=minicpm4_8b:nosparse,noquant,noeagle,noyarn"
  cfg = _infer.read(parse(serve, off, "--model=y"))
  assert (cfg.model_path, cfg.draft_model_path, cfg.model_type) == ("y", None, "minicpm")
  assert not cfg.minicpm4_yarn


@pytest.mark.parametrize(
  "fields, kind",
  [
    ({}, "none"),
    ({"draft_model_path": "d"}, "eagle"),
    ({"draft_model_path": "d", "use_eagle3": True}, "eagle3"),
    ({"draft_kind": "ngram"}, "ngram"),
  ],
)
def test_the_kind_of_draft_follows_from_the_flags(fields, kind):
  assert _infer.draft_kind(config.InferConfig(**fields)) == kind


def test_flags_change_the_shape_that_is_run():
  sparse = config.SparseAttentionConfig(window_size=2048, topk=16)
  shape = dataclasses.replace(zoo.minicpm4_8b(), sparse=sparse)
  model = transformer.Transformer(shape)
  changed = _infer._as_asked(config.InferConfig(minicpm4_yarn=True), model, {})[0].cfg
  assert (changed.sparse.init_blocks, changed.sparse.window_size) == (1, 8 * 64)
  assert (changed.sparse.topk, changed.sparse.dense_len, changed.sparse.lse) == (64, 0, "coarse")
  assert changed.max_position == 131072 and changed.rope.factor == 1.0
  assert not np.allclose(changed.rope.long_factor, shape.rope.long_factor)
  dense = _infer._as_asked(config.InferConfig(model_type="minicpm"), model, {})[0].cfg
  assert dense.sparse is None and dense.rope == shape.rope
  for fields, message in (
    ({"model_type": "llama"}, "the checkpoint is a minicpm"),
    ({"dtype": "bfloat16"}, "expected float32 or auto on a CPU"),
  ):
    with pytest.raises(ValueError, match=message):
      _infer._as_asked(config.InferConfig(**fields), model, {})
  plain = transformer.Transformer(dataclasses.replace(shape, sparse=None, rope=config.RopeConfig()))
  with pytest.raises(ValueError, match="no sparse_config"):
    _infer._as_asked(config.InferConfig(model_type="minicpm4"), plain, {})
  with pytest.raises(ValueError, match="minicpm4_yarn: found other factors"):
    _infer._as_asked(config.InferConfig(minicpm4_yarn=True), plain, {})


def test_the_context_is_what_the_memory_holds(monkeypatch):
  shape = dataclasses.replace(zoo.nano(), scan_layers=False, dtype="f32")
  params = {"w": np.zeros(250_000, np.float32)}
  per_token = 2 * shape.num_layers * shape.num_kv_heads * shape.head_dim * 4
  monkeypatch.setattr(_infer, "memory_bytes", lambda _: 10**6 + 2 * 300 * per_token)
  cfg = config.InferConfig(memory_limit=1.0)
  assert _infer.context_length(cfg, shape, params, 2) == min(300, shape.max_position)
  assert _infer.context_length(dataclasses.replace(cfg, max_context=100), shape, params, 2) == 100
  with pytest.raises(ValueError, match="memory_limit: found room for"):
    _infer.context_length(dataclasses.replace(cfg, memory_limit=0.1), shape, params, 2)
  # A draft model with as wide a cache: its weights and its share of every token go off.
  small = dataclasses.replace(shape, num_layers=1)
  own = 2 * small.num_kv_heads * small.head_dim * 4
  draft = (
    chain.ChainDrafter(transformer.Transformer(small)),
    {"w": np.zeros(300 * own // 2, "f4")},
  )
  found = _infer.context_length(cfg, shape, params, 2, draft=draft)
  assert found == (300 * per_token - 300 * own) // (per_token + own) < 300
  shared = (draft[0], {"w": params["w"]})  # the target's own array is there once
  found = _infer.context_length(cfg, shape, params, 2, draft=shared)
  assert found == 300 * per_token // (per_token + own)


def test_loaded_weights_are_counted_once():
  if not pathlib.Path("/proc/meminfo").is_file() or jax.default_backend() != "cpu":
    pytest.skip("the memory of a Linux host")
  assert _infer.memory_bytes(2**50) > 2**50 and _infer.memory_bytes(0) < 2**50


# --- With a model -----------------------------------------------------------------------------


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
  pytest.importorskip("tokenizers")
  tok = tokenizer.train_bpe(["the quick brown fox jumps over the lazy dog " * 20], 300)
  cfg = config.ModelConfig(
    vocab_size=tok.vocab_size,
    model_dim=16,
    mlp_dim=32,
    num_layers=1,
    num_heads=2,
    num_kv_heads=1,
    head_dim=8,
    max_position=256,
    stop_ids=tok.stop_ids,
  )
  model = transformer.Transformer(cfg)
  params = transformer.init_params(model, jax.random.key(0))
  path = tmp_path_factory.mktemp("model") / "hf"
  ckpt.save_hf(path, model, params, tok)
  return path


def test_speculative_text_is_the_plain_text_and_a_schema_holds(folder, tmp_path, capfd):
  common = [f"--model={folder}", "--prompt=the the the", "--raw", "--num_generate=24"]
  texts, lengths = [], []
  for more in ([], ["--draft_kind=ngram"], ["--nouse_stream"]):
    assert generate.main(["g", *common, *more]) == 0
    out, err = capfd.readouterr()
    texts.append(out)
    lengths.append(float(re.search(r"mean accept length: +([\d.]+)", err)[1]))
    assert re.search(r"decode length: +24 tokens", err)
  assert texts[0] == texts[1] == texts[2] and lengths[0] == 1.0 and lengths[1] >= 1.0
  pytest.importorskip("llguidance")
  schema = {"type": "object", "properties": {"a": {"type": "boolean"}}, "required": ["a"]}
  (tmp_path / "s.json").write_text(json.dumps(schema | {"additionalProperties": False}))
  prompt = tmp_path / "p.txt"
  prompt.write_text("the")
  flags_ = [f"--json_schema={tmp_path / 's.json'}", f"--prompt_file={prompt}", "--seed=1"]
  command = ["g", f"--model={folder}", *flags_, "--temperature=1", "--num_generate=150"]
  assert generate.main(command) == 0
  assert set(json.loads(capfd.readouterr().out)) == {"a"}


@pytest.mark.parametrize("kind", ["eagle", pytest.param("eagle3", marks=pytest.mark.slow)])
def test_drafts_on_disk_give_the_plain_text(folder, tmp_path, capfd, kind):
  model, params, _ = ckpt.load_hf(folder)
  target, own = model.cfg, {"feature_layers": (0, 0, 0)} if kind == "eagle3" else {}
  cfg = draft_lib.for_target(target, kind, draft_logit_scale=0.75, **own)
  rng = np.random.default_rng(0)
  weights = trees.map_with_path(
    lambda path, x: jnp.asarray(rng.normal(size=x.shape) * 0.1 + path.endswith("scale"), x.dtype),
    draft_lib.abstract_params(cfg)[0],
  )
  draft_io.save_draft(tmp_path / "draft", draft_lib.Draft(cfg, weights, None), target)
  asked = config.InferConfig(draft_model_path=str(tmp_path / "draft"), use_eagle3=kind == "eagle3")
  for scale, expected in ((None, 0.75), (1.0, 1.0)):
    asked = dataclasses.replace(asked, draft_logit_scale=scale)
    assert _infer._draft(asked, model, params)[0].cfg.draft_logit_scale == expected
  common = ["g", f"--model={folder}", "--prompt=the the", "--raw", "--num_generate=12"]
  assert generate.main(common) == 0
  plain = capfd.readouterr().out
  flags_ = [f"--draft_model_path={tmp_path / 'draft'}", "--spec_topk_per_iter=4"]
  flags_ += ["--spec_tree_size=8", "--spec_window_size=0"]
  if kind == "eagle3":
    assert generate.main([*common, *flags_]) == 1
    assert "found a draft of kind eagle3, expected eagle" in capfd.readouterr().err
    flags_ += ["--use_eagle3"]
  else:
    frspec.save_index(tmp_path / "fr", np.arange(5, 45))
    flags_ += [f"--frspec_path={tmp_path / 'fr'}", "--frspec_vocab_size=40"]
  assert generate.main([*common, *flags_]) == 0
  assert capfd.readouterr().out == plain


@pytest.mark.slow
def test_a_second_start_finds_all_its_programs_compiled(folder, tmp_path):
  """Two processes: the second stores nothing, so it compiled nothing that the first had not; both
  say their compile time beside the rates."""
  command = [sys.executable, "-m", "experiments.generate", f"--model={folder}", "--raw"]
  command += [
    "--prompt=the the",
    "--num_generate=8",
    f"--compilation_cache={tmp_path / 'programs'}",
  ]
  stored, texts = [], []
  for _ in range(2):
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    assert re.search(r"compile time: +[\d.]+ s \(in no rate\)", done.stderr)
    names = {p.name for p in (tmp_path / "programs").iterdir() if p.name.endswith("-cache")}
    stored.append(names)
    texts.append(done.stdout)
  assert len(stored[0]) >= 3 and stored[0] == stored[1] and texts[0] == texts[1]


def test_bita_and_hierarchical_drafts_on_disk_give_the_plain_text(folder, tmp_path, capfd):
  """The small model of the hierarchy is the target itself: every chain is taken whole."""
  target = ckpt.load_hf(folder)[0].cfg
  ckpt.save_bita(
    tmp_path / "bita",
    bita_lib.Bita(
      bita_lib.for_target(target, num_prompts=2),
      bita_lib.init_params(bita_lib.for_target(target, num_prompts=2), target, jax.random.key(0)),
    ),
  )
  draft = draft_lib.for_target(target, "minicpm")
  weights = draft_lib.init_params(draft, jax.random.key(1))
  draft_io.save_draft(tmp_path / "draft", draft_lib.Draft(draft, weights, None), target)
  common = ["g", f"--model={folder}", "--prompt=the the", "--raw", "--num_generate=16"]
  assert generate.main(common) == 0
  plain = capfd.readouterr().out
  hier = ["--draft_kind=hier", f"--draft_model_path={folder}", "--hier_min_length=3"]
  sizes = ["--spec_topk_per_iter=3", "--spec_tree_size=6"]
  for more in (
    [f"--draft_model_path={tmp_path / 'bita'}", "--bita_width=4"],
    hier,
    [*hier, f"--hier_draft_path={tmp_path / 'draft'}", *sizes],
  ):
    assert generate.main([*common, *more]) == 0
    out, err = capfd.readouterr()
    assert out == plain
    if more[0] == hier[0]:
      assert float(re.search(r"mean accept length: +([\d.]+)", err)[1]) > 3
  inner = [*hier, f"--hier_draft_path={tmp_path / 'draft'}", *sizes, "--use_eagle3"]
  assert generate.main([*common, *inner]) == 1  # the flag is of the inner draft
  assert "found a draft of kind minicpm, expected eagle3" in capfd.readouterr().err


@pytest.mark.parametrize(
  "flags_, message",
  [
    (["--draft_kind=chain"], "draft_model_path: found none, expected a draft"),
    (["--draft_kind=ngram", "--draft_model_path=x"], "which has no draft model"),
    (["--draft_kind=bita"], "draft_model_path: found none, expected a draft"),
    (["--draft_kind=hier"], "draft_model_path: found none, expected a draft"),
    (
      ["--draft_kind=bita", "--draft_model_path=/no"],
      "found no such folder, expected BiTA weights",
    ),
    (["--draft_model_path=/no"], "/no"),
    (["--use_eagle3"], "use_eagle3: found with none drafts"),
    (
      ["--use_eagle3", "--draft_kind=hier", "--draft_model_path=/no"],
      "use_eagle3: found with hier drafts",
    ),
    (["--frspec_path=x"], "--frspec_path: found with none drafts, expected EAGLE or MTP"),
    (["--frspec_path=x", "--draft_kind=ngram"], "--frspec_path: found with ngram drafts"),
    (
      ["--frspec_path=x", "--use_eagle3", "--draft_model_path=/no"],
      "--frspec_path: found with eagle3 drafts",
    ),
    (["--draft_logit_scale=2"], "--draft_logit_scale: found with none drafts"),
    (["--block_window_size=-1"], "block_window_size: found -1, expected >= 0"),
  ],
)
def test_drafts_that_cannot_be_had(folder, capfd, monkeypatch, flags_, message):
  monkeypatch.delattr(ckpt, "draft_io", raising=False)  # a fresh process has not imported it
  assert generate.main(["g", f"--model={folder}", "--prompt=a", *flags_]) == 1
  assert message in capfd.readouterr().err


def test_a_model_that_cannot_have_grammars_is_served_without(folder, capfd, monkeypatch):
  """A tokenizer with more tokens than the model: only requests under a grammar are refused."""
  pytest.importorskip("fastapi")
  pytest.importorskip("llguidance")
  load = _infer.load

  def with_a_token_more(cfg, **more):
    loaded = load(cfg, **more)
    loaded.tok.vocab_size = loaded.engine.model.cfg.vocab_size + 1
    return loaded

  monkeypatch.setattr(_infer, "load", with_a_token_more)
  given = (f"--model={folder}", "--max_batch=1", "--max_context=64", "--port=0")
  with serve.make(parse(serve, *given)) as chat:
    assert "warm-up: without grammars (vocab_size: found" in capfd.readouterr().err
    body = {"prompt": "hi", "max_tokens": 3}
    assert chat.completion(body)["usage"]["completion_tokens"] == 3
    with pytest.raises(schemas.ApiError, match="vocab_size: found"):
      chat.completion(body | {"response_format": {"type": "json_object"}})
  with pytest.raises(ValueError, match="vocab_size: found"):
    serve.make(parse(serve, *given, "--warmup_constrained"))


def test_the_serve_command_builds_the_service_of_its_flags(folder, capfd):
  pytest.importorskip("fastapi")
  flags_ = ["--max_batch=2", "--max_context=128", "--draft_kind=ngram", "--max_queue=5"]
  with serve.make(parse(serve, f"--model={folder}", *flags_, "--port=0")) as chat:
    assert chat.name == "hf" and chat.cfg.max_queue == 5 and chat.cfg.host == "127.0.0.1"
    assert chat.models()["data"][0]["max_model_len"] == 128 and chat.report()["rows"] == 2
    assert isinstance(chat._engine.drafter, ngram.NGramDrafter) and chat._engine.cfg.shrinks
    assert re.search(r"warm-up: \d+ programs in [\d.]+ s", capfd.readouterr().err)
    body = {"messages": [{"role": "user", "content": "hi"}], "max_tokens": 6}
    assert chat.chat(body)["usage"]["completion_tokens"] == 6
    if importlib.util.find_spec("llguidance") is not None:  # then grammars are warm too
      answer = chat.chat(body | {"grammar": {"choice": ["a", "b"]}})
      assert answer["choices"][0]["message"]["content"] in ("a", "b")
    assert chat.report()["compile_seconds"] == 0
  assert serve.main(["s", "--model=/no/such", "--port=0"]) == 1
  assert "found no such file or folder" in capfd.readouterr().err
  assert serve.main(["s", f"--model={folder}", "--port=0", "--json_schema=x"]) == 1
  assert "requests say them" in capfd.readouterr().err
  with pytest.raises(flags.Error):
    parse(serve, "--prompt=x")


def test_decoding_commands_start_without_what_only_training_needs():
  """Of a process of its own: nothing heavy is imported for --help, or for a folder's weights."""
  heavy = ["orbax", "grain", "optax", "torch", "transformers", "tensorflow", "matplotlib"]
  text = "import sys, experiments.generate, experiments.serve; print(*sys.modules)"
  done = subprocess.run([sys.executable, "-c", text], capture_output=True, text=True, check=True)
  assert "minicpm_jax.infer.engine" in done.stdout.split()
  assert not set(heavy) & set(done.stdout.split())
