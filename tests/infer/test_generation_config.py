"""generation_config.json of a folder: transformers' own reading of it is the reference."""

import dataclasses
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from experiments import _command, _infer, generate, serve
from minicpm_jax import ckpt, config
from minicpm_jax.ckpt import orbax_io
from minicpm_jax.infer import chat as chat_lib
from minicpm_jax.infer import sampling as sampling_lib
from minicpm_jax.models import transformer
from tests.ckpt import hf_folder

FILES = {
  "released": {"do_sample": True, "temperature": 0.8, "top_p": 0.8, "eos_token_id": [2, 73]},
  "sampled": {"do_sample": True},  # transformers' top-k of 50 then
  "all": {"do_sample": True, "top_k": 9, "min_p": 0.3, "repetition_penalty": 1.7, "top_p": None},
  "no top-k": {"do_sample": True, "top_k": 0, "temperature": 3.0},
  "greedy": {"temperature": 0.8, "top_k": 3, "repetition_penalty": 1.7},
  "empty": {},
}
TEMPLATE = "{% for m in messages %}{{ m['content'] }}{% endfor %}"


@pytest.fixture(scope="module")
def peer():
  """(A Llama of transformers, the id of its prompt, its raw logits for it)."""
  torch = pytest.importorskip("torch")
  transformers = pytest.importorskip("transformers")
  cfg = transformers.LlamaConfig(
    vocab_size=99,
    hidden_size=16,
    intermediate_size=16,
    num_hidden_layers=1,
    num_attention_heads=2,
    initializer_range=1.0,
  )
  torch.manual_seed(0)
  hf = transformers.LlamaForCausalLM(cfg).eval()
  prompt = torch.tensor([[1, 5, 7, 8, 9]])
  with torch.no_grad():
    return hf, prompt, hf(prompt).logits[0, -1].numpy()


@pytest.mark.oracle
@pytest.mark.parametrize("name", FILES)
def test_the_law_is_that_of_transformers_generate(peer, name):
  """The scores that `generate` draws its next token from, against our filtered probabilities."""
  hf, prompt, logits_V = peer
  transformers = pytest.importorskip("transformers")
  hf.generation_config = transformers.GenerationConfig.from_dict(FILES[name] | {"pad_token_id": 0})
  out = hf.generate(prompt, max_new_tokens=1, return_dict_in_generate=True, output_scores=True)
  scores_V = out.scores[0][0].double().numpy()
  expected_V = np.exp(scores_V - scores_V.max())
  expected_V /= expected_V.sum()
  if not FILES[name].get("do_sample"):
    expected_V = np.eye(99)[scores_V.argmax()]
  found = config.SamplingConfig.from_hf(json.dumps(FILES[name]))
  state = sampling_lib.sampling_state(found, [0])
  seen_BV = jnp.asarray(np.isin(np.arange(99), prompt.numpy())[None])
  punished_BV = sampling_lib.penalise(jnp.asarray(logits_V)[None], state.penalty_B, seen_BV)
  p_V = np.asarray(sampling_lib.distribution(punished_BV, state)[0])
  np.testing.assert_allclose(p_V, expected_V, rtol=1e-4, atol=1e-6)
  assert 1 <= (p_V > 0).sum() == (expected_V > 0).sum()


@pytest.mark.parametrize(
  "file, message",
  [
    ({"do_sample": 1}, "generation_config.json: do_sample: found 1, expected true or false"),
    (
      {"do_sample": True, "temperature": "hot"},
      "generation_config.json: .*temperature: found 'hot'",
    ),
    ({"do_sample": True, "top_k": -2}, "generation_config.json: .*top_k: found -2"),
    ({"repetition_penalty": 0}, "generation_config.json: .*repetition_penalty: found 0.0"),
  ],
)
def test_bad_values_are_named(file, message):
  with pytest.raises(ValueError, match=message):
    config.SamplingConfig.from_hf(file)


def test_lengths_are_the_callers():
  file = {"do_sample": True, "max_new_tokens": 3, "max_length": 7, "top_k": -1}
  found = config.SamplingConfig.from_hf(file, max_new_tokens=5, seed=4, temperature=0.5)
  expected = config.SamplingConfig(temperature=0.5, max_new_tokens=5, seed=4)
  assert found == expected
  assert config.SamplingConfig.from_hf({}) == config.SamplingConfig()


@pytest.fixture
def folder(tmp_path):
  hf_folder.write(tmp_path / "in", hf_folder.MINICPM, hf_folder.tensors(hf_folder.MINICPM))
  file = FILES["released"] | {"bos_token_id": 1, "pad_token_id": 2, "max_length": 4096}
  file |= {"transformers_version": "4.46.1", "suppress_tokens": [4], "cache_implementation": None}
  (tmp_path / "in" / "generation_config.json").write_text(json.dumps(file))
  return tmp_path / "in"


@pytest.mark.oracle
def test_the_file_goes_round_through_folders_and_runs(folder, tmp_path):
  transformers = pytest.importorskip("transformers")
  model, params, _ = ckpt.load_hf(folder)
  ckpt.save_hf(tmp_path / "out", model, params)
  orbax_io.import_params(tmp_path / "run", model.cfg, params)
  again, params, _ = ckpt.load_run(tmp_path / "run")
  ckpt.save_hf(tmp_path / "late", again, params)
  for name in ("out", "late"):
    texts = [(f / "generation_config.json").read_text() for f in (folder, tmp_path / name)]
    assert json.loads(texts[0]) == json.loads(texts[1])
    first, second = (
      transformers.GenerationConfig.from_pretrained(f) for f in (folder, tmp_path / name)
    )
    assert first.to_dict() == second.to_dict() and second.eos_token_id == [2, 73]


def test_other_stop_ids_are_written_over_those_of_the_file(folder, tmp_path):
  model, params, _ = ckpt.load_hf(folder)
  cfg = dataclasses.replace(model.cfg, stop_ids=(9,), bos_id=None)
  ckpt.save_hf(tmp_path / "out", transformer.Transformer(cfg), params)
  written = json.loads((tmp_path / "out" / "generation_config.json").read_text())
  assert (written["eos_token_id"], written["top_p"]) == (9, 0.8)


def test_a_chat_samples_as_the_checkpoint_says_unless_told(folder, byte_tokenizer):
  model, params, _ = ckpt.load_hf(folder)
  tok = byte_tokenizer(chat_template=TEMPLATE)
  chat = chat_lib.Chat(model, params, tok)
  assert chat.sampling == config.SamplingConfig(temperature=0.8, top_p=0.8, top_k=50)
  told = config.SamplingConfig(max_new_tokens=3)
  assert chat_lib.Chat(model, params, tok, sampling=told).sampling == told
  plain = transformer.Transformer(dataclasses.replace(model.cfg, generation=None))
  assert chat_lib.Chat(plain, params, tok).sampling == config.SamplingConfig()
  odd = dataclasses.replace(model.cfg, generation='{"do_sample": true, "top_p": 2}')
  with pytest.raises(ValueError, match="generation_config.json: .*top_p: found 2"):
    chat_lib.Chat(transformer.Transformer(odd), params, tok, donate=True)
  assert not any(x.is_deleted() for x in jax.tree.leaves(params))


@pytest.mark.parametrize(
  "command, flags, expected",
  [
    (generate, [], (0.0, 0, 1.0)),  # CPM.cu's default
    (serve, ["--generation_config"], (0.8, 50, 0.8)),
    (generate, ["--generation_config", "--temperature=0"], (0.0, 50, 0.8)),
    (generate, ["--generation_config", "--top_p=1", "--top_k=7"], (0.8, 7, 1.0)),
  ],
)
def test_flags_win_over_the_file_which_is_read_on_demand(command, flags, expected):
  values = _command.parse(command.VALUES, ["x", "--model=m", *flags], None)
  model = config.ModelConfig(
    vocab_size=8, model_dim=8, mlp_dim=8, num_layers=1, num_heads=1, num_kv_heads=1, head_dim=8,
    max_position=8, generation=json.dumps(FILES["released"]),
  )  # fmt: skip
  cfg = _infer.with_generation(values, _infer.read(values), model)
  assert (cfg.temperature, cfg.top_k, cfg.top_p) == expected
  assert _infer.sampling(cfg).temperature == expected[0]
  if cfg.generation_config:
    with pytest.raises(ValueError, match="--generation_config: found none in m, expected"):
      _infer.with_generation(values, cfg, dataclasses.replace(model, generation=None))


def test_a_preset_wins_over_the_file(tmp_path):
  (tmp_path / "mine.py").write_text(
    "from minicpm_jax import config\n"
    "def get_config(arg):\n"
    "  return config.InferConfig(model_path='m', generation_config=True, top_p=0.5)\n"
  )
  values = _command.parse(generate.VALUES, ["x", f"--config={tmp_path / 'mine.py'}"], None)
  generation = json.dumps(FILES["released"])
  model = config.ModelConfig(
    vocab_size=8, model_dim=8, mlp_dim=8, num_layers=1, num_heads=1, num_kv_heads=1, head_dim=8,
    max_position=8, generation=generation,
  )  # fmt: skip
  cfg = _infer.with_generation(values, _infer.read(values), model)
  assert (cfg.temperature, cfg.top_p) == (0.8, 0.5)
