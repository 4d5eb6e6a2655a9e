"""SmolLM2-135M-Instruct out of the cache folder: the reference values of its README."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from minicpm_jax.ckpt import gguf_io
from minicpm_jax.core import fetch, trees
from minicpm_jax.text import chat, tokenizer

gguf = pytest.importorskip("gguf")
pytest.importorskip("tokenizers")

from tests.ckpt import gguf_files  # noqa: E402
from tests.ckpt.gguf_files import STRINGS  # noqa: E402


@pytest.fixture(scope="module")
def smollm():
  path = fetch.cached()
  if path is None:
    pytest.skip(f"the 135M model is not in {fetch.cache_dir()}: run `{fetch.COMMAND}`")
  return gguf_io.load_gguf(path, scan_layers=False)


PROMPT = [
  {
    "role": "system",
    "content": "You are a helpful AI assistant named SmolLM, trained by Hugging Face",
  },
  {"role": "user", "content": "What is the capital of France? Answer in one sentence."},
]


def padded_logits(model):
  """One compiled forward of 64 tokens; rows are padded on the right, which causality hides."""
  forward = jax.jit(lambda params, x: model.apply({"params": params}, x).logits[0])

  def run(params, ids):
    row = np.zeros((1, 64), np.int32)
    row[0, : len(ids)] = ids
    return np.asarray(forward(params, row))[len(ids) - 1]

  return run


def test_real_model_log_probabilities_and_greedy_text(smollm):
  """The values of shared/models/smollm2-135m-instruct/README.md."""
  model, params, tok = smollm
  ids = chat.encode_chat(PROMPT, tok)
  assert len(ids) == 42
  run = padded_logits(model)
  first = run(params, ids).astype(np.float64)
  logprobs = np.sort(first - np.log(np.exp(first - first.max()).sum()) - first.max())[::-1]
  np.testing.assert_allclose(logprobs[:5], [-0.6014, -2.0829, -3.3161, -3.4189, -3.4273], atol=1e-4)
  answer = []
  while len(answer) < 20 and (not answer or answer[-1] not in tok.stop_ids):
    answer.append(int(np.argmax(run(params, ids + answer))))
  text = tok.decode(answer, skip_special=False)
  assert text == "The capital of France is Paris.<|im_end|>"


def test_real_model_config_and_tokenizer(smollm, shared_dir):
  model, params, tok = smollm
  assert trees.num_params(params) == 134_515_008
  assert model.cfg.arch == "llama" and model.cfg.rope.theta == 1e5
  assert (tok.eos_id, tok.pad_id, tok.stop_ids, tok.add_bos) == (2, 2, (2, 0), False)
  folder = shared_dir / "models/smollm2-135m-instruct"
  released = tokenizer.load_tokenizer(folder)
  assert tok.chat_template == (folder / "chat_template.jinja").read_text()
  ours, theirs = (json.loads(t.backend.to_str()) for t in (tok, released))
  assert ours["model"] == theirs["model"]
  assert ours["added_tokens"] == theirs["added_tokens"]
  specs = (folder.parents[1] / "specs").glob("*.md")
  for text in [*STRINGS, *(path.read_text()[:20000] for path in specs)]:
    assert tok.encode(text) == released.encode(text)


@pytest.mark.slow
@pytest.mark.oracle
def test_real_model_logits_are_those_of_transformers(smollm):
  """The file's tensors, renamed and un-permuted here, in transformers' Llama."""
  torch = pytest.importorskip("torch")
  transformers = pytest.importorskip("transformers")
  model, params, tok = smollm
  cfg = model.cfg
  config = transformers.LlamaConfig(
    vocab_size=cfg.vocab_size,
    hidden_size=cfg.model_dim,
    intermediate_size=cfg.mlp_dim,
    num_hidden_layers=cfg.num_layers,
    num_attention_heads=9,
    num_key_value_heads=3,
    rms_norm_eps=1e-5,
    rope_parameters={"rope_type": "default", "rope_theta": 1e5},
    tie_word_embeddings=True,
  )
  theirs = transformers.LlamaForCausalLM(config).eval()
  stored = {t.name: t for t in gguf.GGUFReader(fetch.cached()).tensors}
  state = theirs.state_dict()
  for name, value in state.items():
    if name == "lm_head.weight":
      continue
    tensor = stored[gguf_files.gguf_name(name)]
    w = gguf.dequantize(tensor.data, tensor.tensor_type)
    heads = {"q_proj": 9, "k_proj": 3}.get(name.split(".")[-2])
    if heads:
      pairs = w.reshape(heads, 32, 2, 576)
      w = np.concatenate([pairs[:, :, 0], pairs[:, :, 1]], axis=1).reshape(w.shape)
    value.copy_(torch.from_numpy(w.copy()))
  ids = tok.encode("The three laws of robotics are 1. A robot may not injure a human being")
  with torch.no_grad():
    expected = theirs(torch.tensor([ids])).logits[0].numpy()
  found = np.asarray(model.apply({"params": params}, jnp.asarray([ids])).logits[0])
  np.testing.assert_allclose(found, expected, atol=1e-3, rtol=0)
