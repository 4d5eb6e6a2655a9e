"""SmolLM2-135M-Instruct out of the cache folder against the reference outputs of its README."""

import dataclasses

import jax
import numpy as np
import pytest

from minicpm_jax import config
from minicpm_jax.core import fetch
from minicpm_jax.infer import chat as chat_lib
from minicpm_jax.infer import generate
from minicpm_jax.text import chat as chat_text

SYSTEM = "You are a helpful AI assistant named SmolLM, trained by Hugging Face"
QUESTION = "What is the capital of France? Answer in one sentence."
ANSWER = "The capital of France is Paris."
TOP_LOGPROBS = [-0.6014, -2.0829, -3.3161, -3.4189, -3.4273]  # of the first answer token
MESSAGES = [{"role": "system", "content": SYSTEM}, {"role": "user", "content": QUESTION}]


@pytest.fixture(scope="module")
def real():
  from minicpm_jax import ckpt

  pytest.importorskip("gguf")
  path = fetch.cached()
  if path is None:
    pytest.skip(f"SmolLM2-135M-Instruct is not in {fetch.cache_dir()}: run `{fetch.COMMAND}`")
  return ckpt.load_gguf(path)  # scanned layers: they compile faster than they could be unrolled


def test_greedy_answer_and_first_logprobs(real):
  model, params, tok = real
  prompt = chat_text.encode_chat(MESSAGES, tok)
  assert len(prompt) == 42
  sampling = config.SamplingConfig(max_new_tokens=12)
  stops = chat_lib.stop_ids(model.cfg, tok)
  out = generate.generate(model, params, [prompt], sampling, stop_ids=stops)
  assert tok.decode(out.tokens[0]) == ANSWER
  assert out.tokens[0][-1] == tok.special_tokens["<|im_end|>"]
  assert out.finish_reason == ["stop"]
  assert out.logprobs[0][0] == pytest.approx(TOP_LOGPROBS[0], abs=2e-4)


def test_the_five_best_first_tokens(real):
  model, params, tok = real
  prompt = np.asarray([chat_text.encode_chat(MESSAGES, tok)])
  logits_V = jax.jit(lambda p, t: model.apply({"params": p}, t).logits[0, -1])(params, prompt)
  best = np.sort(np.asarray(jax.nn.log_softmax(logits_V)))[::-1][:5]
  np.testing.assert_allclose(best, TOP_LOGPROBS, atol=2e-4)


def test_a_filled_batch_gives_the_same_answer_and_sampling_is_repeatable(real):
  model, params, tok = real
  prompts = [
    chat_text.encode_chat(MESSAGES, tok),
    chat_text.encode_chat([{"role": "user", "content": "Count to three."}], tok),
  ]
  sampling = config.SamplingConfig(max_new_tokens=12)
  stops = chat_lib.stop_ids(model.cfg, tok)
  out = generate.generate(model, params, prompts, sampling, stop_ids=stops)
  assert tok.decode(out.tokens[0]) == ANSWER
  drawn = dataclasses.replace(sampling, temperature=0.8, top_p=0.95, seed=1)
  first, second = (
    generate.generate(model, params, prompts, drawn, stop_ids=stops) for _ in range(2)
  )
  assert first.tokens == second.tokens


@pytest.mark.slow
@pytest.mark.oracle
def test_greedy_equals_transformers(real, tmp_path):
  """48 tokens of free text; transformers reads our export of the same weights."""
  torch = pytest.importorskip("torch")
  transformers = pytest.importorskip("transformers")
  from minicpm_jax import ckpt

  model, params, tok = real
  ckpt.save_hf(tmp_path, model, params, tok)
  hf = transformers.AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float32)
  prompt = tok.encode("The three states of matter are")
  with torch.no_grad():
    ids = hf.generate(torch.tensor([prompt]), max_new_tokens=48, do_sample=False)
  expected = ids[0, len(prompt) :].tolist()
  out = generate.generate(model, params, [prompt], config.SamplingConfig(max_new_tokens=48))
  assert out.tokens[0][: len(expected)] == expected
