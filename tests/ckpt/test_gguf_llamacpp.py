"""GGUF files of save_gguf in llama.cpp itself (inference.md 20.1); skipped where it is absent."""

import logging

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from minicpm_jax.ckpt import gguf_io
from minicpm_jax.text import tokenizer
from tests.ckpt import test_gguf_write as cases

llama_cpp = pytest.importorskip("llama_cpp", reason="llama-cpp-python is not installed")

IDS = [1, 5, 9, 2, 30, 7, 7, 3, 21, 11, 0, 4]


@pytest.fixture(scope="module")
def tok():
  return tokenizer.train_bpe(["the quick brown fox jumps over the lazy dog " * 20], 320)


def runtime_logits(path, ids):
  """float32 [T, V] by llama.cpp with a float32 KV cache on one thread."""
  model = llama_cpp.Llama(
    str(path),
    n_ctx=256,
    n_threads=1,
    n_threads_batch=1,
    logits_all=True,
    verbose=False,
    type_k=0,
    type_v=0,
  )
  model.eval(ids)
  return np.asarray(model.scores[: len(ids)], np.float32)


def ours(model, params, ids):
  params = jax.tree.map(jnp.asarray, params)
  out = model.apply({"params": params}, jnp.asarray([ids], jnp.int32))
  return np.asarray(out.logits[0])


@pytest.mark.parametrize("name", ["minicpm", "untied", "llama", "experts"])
def test_float32_logits(tmp_path, name, tok):
  """Scales, permutation, tied and untied heads, experts: within 1e-4 of the logits' std."""
  model, params = cases.make(**(cases.MODELS[name] | {"vocab_size": tok.vocab_size}))
  path = tmp_path / "m.gguf"
  gguf_io.save_gguf(path, model, params, tok, kind="f32")
  expected = ours(model, params, IDS)
  found = runtime_logits(path, IDS)
  assert np.abs(found - expected).max() <= 1e-4 * expected.std()


@pytest.mark.parametrize(
  "kind, least", [("f16", 0.9999), ("q8_0", 0.999), ("tq2_0", 0.999), ("tq1_0", 0.999)]
)
def test_packed_files_run(tmp_path, kind, least, tok):
  """Cosine to the logits of the same (fused, for ternary) weights; activations become 8 bit."""
  model, params = cases.make(vocab_size=tok.vocab_size)
  if kind.startswith("tq"):
    params = cases.ternary(params)
  path = tmp_path / "m.gguf"
  gguf_io.save_gguf(path, model, params, tok, kind=kind)
  a, b = ours(model, params, IDS).ravel(), runtime_logits(path, IDS).ravel()
  cosine = float(a @ b / np.sqrt((a @ a) * (b @ b)))
  logging.info("%s: cosine %.6f", kind, cosine)
  assert cosine >= least
