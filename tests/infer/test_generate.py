"""Decoding against full forwards without a cache, other batches of itself, and transformers."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from minicpm_jax import config
from minicpm_jax.infer import engine as engine_lib
from minicpm_jax.infer import generate
from minicpm_jax.models import convert, transformer

VOCAB = 61
CONFIGS = {
  "mup_tied": dict(scale_emb=12.0, scale_depth=1.4, dim_model_base=8),
  "llama_untied": dict(arch="llama", tie_embeddings=False, vocab_multiple=16),
  "moe": dict(moe=config.MoEConfig(num_experts=4, experts_per_token=2)),
  "mla": dict(
    arch="minicpm3",
    head_dim=12,
    num_kv_heads=4,
    mla=config.MLAConfig(
      q_lora_rank=12, kv_lora_rank=8, qk_nope_head_dim=8, qk_rope_head_dim=4, v_head_dim=8
    ),
  ),
}
PROMPTS = [[3, 1, 4, 1, 5, 9, 2, 6], [2], [7, 1, 8], list(range(30, 43))]
GREEDY = config.SamplingConfig(max_new_tokens=12)
DRAWN = config.SamplingConfig(temperature=1.3, top_k=40, top_p=0.95, max_new_tokens=12, seed=5)


@functools.cache
def make(name="mup_tied"):
  """A small random model whose logits are far from flat, unrolled."""
  fields = dict(
    vocab_size=VOCAB,
    model_dim=16,
    mlp_dim=32,
    num_layers=2,
    num_heads=4,
    num_kv_heads=2,
    head_dim=8,
    max_position=128,
    scan_layers=False,
  )
  cfg = config.ModelConfig(**(fields | CONFIGS[name]))
  model = transformer.Transformer(cfg)
  shapes, _ = transformer.abstract_params(model)
  rng = np.random.default_rng(7)
  fill = lambda x: jnp.asarray(rng.normal(size=x.shape) * 0.3 + (x.ndim == 1), x.dtype)  # noqa: E731
  return model, jax.tree.map(fill, shapes)


@pytest.fixture(scope="module")
def mup():
  return make()


def full_logits(model, params, tokens, width=40):
  """Logits of one sequence without any cache, at one width (causal: the tail is idle)."""
  tokens_1T = np.zeros((1, width), np.int32)
  tokens_1T[0, : len(tokens)] = tokens
  logits = _forward(model, params, jnp.asarray(tokens_1T))
  return np.asarray(logits[0, : len(tokens)], np.float64)


def _forward(model, params, tokens_1T):
  key = (model, tokens_1T.shape)
  if key not in _FORWARDS:
    _FORWARDS[key] = jax.jit(lambda params, tokens: model.apply({"params": params}, tokens).logits)
  return _FORWARDS[key](params, tokens_1T)


_FORWARDS = {}


@pytest.mark.smoke
@pytest.mark.parametrize("name", CONFIGS)
def test_greedy_with_cache_is_the_argmax_of_full_forwards(name):
  """Prompts of unequal length in one batch; each step of two rows against a forward of its own."""
  model, params = make(name)
  out = generate.generate(model, params, PROMPTS, GREEDY)
  assert out.finish_reason == ["length"] * 4
  for row in (1, 3):
    tokens = list(PROMPTS[row])
    for new, logprob in zip(out.tokens[row], out.logprobs[row], strict=True):
      logits_V = full_logits(model, params, tokens)[-1]
      assert new == int(np.argmax(logits_V))
      expected = logits_V[new] - logits_V.max() - np.log(np.exp(logits_V - logits_V.max()).sum())
      assert logprob == pytest.approx(expected, abs=1e-4)
      tokens.append(new)
    assert len(tokens) == len(PROMPTS[row]) + 12


@pytest.mark.smoke
@pytest.mark.parametrize("sampling", [GREEDY, DRAWN], ids=["greedy", "drawn"])
def test_unequal_prompts_in_a_batch_equal_each_alone(mup, sampling):
  model, params = mup
  together = generate.generate(model, params, PROMPTS, sampling)
  for i, prompt in enumerate(PROMPTS):
    alone = generate.generate(model, params, [prompt], sampling)
    assert alone.tokens[0] == together.tokens[i]
    np.testing.assert_allclose(alone.logprobs[0], together.logprobs[i], atol=1e-4)
  turned = generate.generate(model, params, PROMPTS[::-1], sampling)
  assert turned.tokens == together.tokens[::-1]


def test_logprobs_of_drawn_tokens_are_the_bare_model_s(mup):
  model, params = mup
  out = generate.generate(model, params, [PROMPTS[2]], DRAWN)
  tokens = PROMPTS[2] + out.tokens[0]
  logits_TV = full_logits(model, params, tokens)
  logprobs_TV = logits_TV - np.log(np.exp(logits_TV).sum(-1, keepdims=True))
  at = np.arange(len(PROMPTS[2]) - 1, len(tokens) - 1)
  expected = logprobs_TV[at, np.asarray(tokens)[at + 1]]
  np.testing.assert_allclose(out.logprobs[0], expected, atol=1e-4)


@pytest.mark.smoke
@pytest.mark.parametrize("rounds", [1, 3, 16])
def test_tokens_do_not_depend_on_rounds_per_dispatch(mup, rounds):
  model, params = mup
  expected = generate.generate(model, params, PROMPTS, DRAWN)
  chunks = list(generate.stream(model, params, PROMPTS, DRAWN, rounds_per_dispatch=rounds))
  tokens_BT = np.concatenate([c.tokens_BR for c in chunks], axis=1)
  assert tokens_BT.tolist() == expected.tokens
  assert [c.tokens_BR.shape[1] for c in chunks][:2] == [1, min(rounds, 11)]


def test_seeds_give_rows_their_own_noise(mup):
  model, params = mup
  prompts = [PROMPTS[0]] * 4
  out = generate.generate(model, params, prompts, DRAWN, seeds=[5, 6, 5, 7])
  assert out.tokens[0] == out.tokens[2] != out.tokens[1]
  alone = generate.generate(model, params, prompts[:1], dataclasses.replace(DRAWN, seed=6))
  assert alone.tokens[0] == out.tokens[1]


@pytest.mark.smoke
def test_a_row_ends_at_its_stop_id_and_the_others_go_on(mup):
  model, params = mup
  free = generate.generate(model, params, PROMPTS, DRAWN)
  stop = free.tokens[0][4]
  never = next(token for token in range(VOCAB) if all(token not in row for row in free.tokens))
  out = generate.generate(model, params, PROMPTS, DRAWN, stop_ids=[never, stop])
  for found, whole, reason in zip(out.tokens, free.tokens, out.finish_reason, strict=True):
    expected = whole[: whole.index(stop) + 1] if stop in whole else whole
    assert found == expected
    assert reason == ("stop" if stop in whole else "length")
  assert len(out.logprobs[0]) == len(out.tokens[0]) <= 5


def test_the_first_token_may_be_the_stop_id(mup):
  model, params = mup
  first = generate.generate(model, params, [PROMPTS[0]], GREEDY).tokens[0][0]
  out = generate.generate(model, params, [PROMPTS[0]], GREEDY, stop_ids=[first])
  assert (out.tokens, out.finish_reason) == ([[first]], ["stop"])


def test_a_stop_id_of_a_given_engine_is_a_stop(mup):
  (whole,) = generate.generate(*mup, PROMPTS[:1], GREEDY).tokens
  cfg = config.EngineConfig(capacity=64)
  engine = engine_lib.Engine(*mup, cfg, stop_ids=[whole[3]])
  out = generate.generate(*mup, PROMPTS[:1], GREEDY, engine=engine)
  assert out.tokens == [whole[: whole.index(whole[3]) + 1]] and out.finish_reason == ["stop"]


@pytest.mark.parametrize("num", [1, 2, 16, 17])
def test_max_new_tokens_is_met_exactly(mup, num):
  sampling = dataclasses.replace(DRAWN, max_new_tokens=17)  # 1 + 16: the answer of one dispatch
  whole = generate.generate(*mup, PROMPTS[:1], sampling)
  sampling = dataclasses.replace(DRAWN, max_new_tokens=num)
  out = generate.generate(*mup, PROMPTS[:1], sampling, capacity=32)
  assert out.tokens[0] == whole.tokens[0][:num]
  assert len(out.tokens[0]) == num


@pytest.mark.smoke
def test_capacity_and_padding_change_nothing(mup):
  model, params = mup
  expected = generate.generate(model, params, PROMPTS, DRAWN).tokens
  # 24 slots = 13 tokens of the longest prompt + 11 written later; the default is 32.
  assert generate.generate(model, params, PROMPTS, DRAWN, capacity=24).tokens == expected


@pytest.mark.parametrize(
  "prompts, kwargs, text",
  [
    ([], {}, "prompts: found none"),
    ([[1], []], {}, r"prompts\[1\]: found no token"),
    ([[1, VOCAB]], {}, rf"prompts\[0\]: found token {VOCAB}, expected 0..{VOCAB - 1}"),
    ([[1, -4]], {}, "found token -4"),
    ([[1] * 14], {"capacity": 24}, "found 24 cache slots, expected at least 25"),
    ([[1]], {"seeds": [1, 2]}, "seeds: found 2, expected one for each of 1"),
    ([[1]], {"rounds_per_dispatch": 17}, "rounds_per_dispatch: found 17, expected 1..16"),
  ],
)
def test_bad_input_is_refused(mup, prompts, kwargs, text):
  with pytest.raises(ValueError, match=text):
    list(generate.stream(*mup, prompts, DRAWN, **kwargs))


def test_non_finite_logits_are_refused(mup):
  model, params = mup
  broken = jax.tree.map(lambda x: x, params)
  broken["final_norm"] = {"scale": params["final_norm"]["scale"] * jnp.nan}
  with pytest.raises(ValueError, match="non-finite logits"):
    generate.generate(model, broken, [[1, 2]], GREEDY)


def test_decoding_form_on_cpu_is_unrolled_float32_and_gives_equal_tokens(mup):
  cfg, params = convert.stack_layers(mup[0].cfg, mup[1])
  params = jax.tree.map(lambda x: x.astype(jnp.bfloat16), params)
  model = transformer.Transformer(dataclasses.replace(cfg, dtype="bf16", param_dtype="bf16"))
  fast, fast_params = generate.for_decoding(model, params)
  assert not fast.cfg.scan_layers
  assert {x.dtype for x in jax.tree.leaves(fast_params)} == {jnp.dtype("float32")}
  one = fast_params["layers_0"]["mlp"]["gate_up"]["kernel"]
  for source in ((model, params), (fast, fast_params)):  # for more rows inputs come first
    many = generate.for_decoding(*source, num_rows=4)[1]["layers_0"]["mlp"]["gate_up"]
    np.testing.assert_array_equal(many["kernel"], one.values.T)
  scanned = transformer.Transformer(dataclasses.replace(fast.cfg, scan_layers=True))
  params32 = jax.tree.map(lambda x: x.astype(jnp.float32), params)
  slow = generate.generate(scanned, params32, PROMPTS, DRAWN)
  out = generate.generate(fast, fast_params, PROMPTS, DRAWN)
  assert out.tokens == slow.tokens
  np.testing.assert_allclose(out.logprobs, slow.logprobs, atol=1e-4)


def test_buckets_cover_and_waste_at_most_a_third():
  sizes = [generate.bucket(n) for n in range(1, 3000)]
  assert all(size >= n for n, size in enumerate(sizes, 1))
  assert all(size <= 1.5 * n for n, size in enumerate(sizes, 1) if n > 16)
  assert len(set(sizes)) == 16  # 16, 24, ... 3072
  assert sizes == sorted(sizes)


def test_the_sparse_switch_is_not_reached_by_padding(mup):
  """40 + 20 tokens would be padded to 72 slots, over dense_len 64 where sparse begins."""
  sparse = config.SparseAttentionConfig(
    kernel_size=8, kernel_stride=4, block_size=8, window_size=16, topk=2, dense_len=64
  )
  model = transformer.Transformer(dataclasses.replace(mup[0].cfg, sparse=sparse))
  prompt = [list(range(40))]
  sampling = config.SamplingConfig(max_new_tokens=20)
  found = generate.generate(model, mup[1], prompt, sampling).tokens[0]
  logits_TV = full_logits(*mup, prompt[0] + found, width=60)
  assert found == logits_TV[39:-1].argmax(-1).tolist()


def test_sparse_generation_is_the_argmax_of_full_forwards(mup):
  """Prompts of unequal length, padded on the left: each row has its own grid of blocks."""
  sparse = config.SparseAttentionConfig(
    kernel_size=8, kernel_stride=4, block_size=8, window_size=8, topk=3, dense_len=-1, lse="coarse"
  )
  model = transformer.Transformer(dataclasses.replace(mup[0].cfg, sparse=sparse))
  prompts = [list(range(40)), list(range(50, 17, -1))]
  sampling = config.SamplingConfig(max_new_tokens=12)
  tokens = generate.generate(model, mup[1], prompts, sampling).tokens
  for prompt, found in zip(prompts, tokens, strict=True):
    logits_TV = full_logits(model, mup[1], prompt + found, width=64)
    start = len(prompt) - 1
    assert found == logits_TV[start : start + 12].argmax(-1).tolist()


@pytest.mark.oracle
def test_greedy_equals_transformers_for_64_steps():
  torch = pytest.importorskip("torch")
  transformers = pytest.importorskip("transformers")
  hf_cfg = transformers.LlamaConfig(
    vocab_size=128,
    hidden_size=32,
    intermediate_size=64,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=2,
    max_position_embeddings=256,
    rms_norm_eps=1e-5,
    tie_word_embeddings=False,
    initializer_range=0.3,
    bos_token_id=None,
    eos_token_id=None,
  )
  torch.manual_seed(0)
  hf = transformers.LlamaForCausalLM(hf_cfg).eval()
  w = {k: v.detach().numpy() for k, v in hf.state_dict().items()}
  D, N, K, H = 32, 4, 2, 8

  def layer(i):
    p = f"model.layers.{i}."
    heads = dict(q=N, k=K, v=K)
    attn = {
      n: {"kernel": w[p + f"self_attn.{n}_proj.weight"].T.reshape(D, h, H)}
      for n, h in heads.items()
    }
    attn["o"] = {"kernel": w[p + "self_attn.o_proj.weight"].T.reshape(N, H, D)}
    mlp = {n: {"kernel": w[p + f"mlp.{n}_proj.weight"].T} for n in ("gate", "up", "down")}
    return {
      "attn": attn,
      "mlp": mlp,
      "attn_norm": {"scale": w[p + "input_layernorm.weight"]},
      "mlp_norm": {"scale": w[p + "post_attention_layernorm.weight"]},
    }

  params = {
    "embed": {"embedding": w["model.embed_tokens.weight"]},
    "layers_0": layer(0),
    "layers_1": layer(1),
    "final_norm": {"scale": w["model.norm.weight"]},
    "lm_head": {"kernel": w["lm_head.weight"].T},
  }
  cfg = config.ModelConfig(
    arch="llama",
    vocab_size=128,
    model_dim=D,
    mlp_dim=64,
    num_layers=2,
    num_heads=N,
    num_kv_heads=K,
    head_dim=H,
    max_position=256,
    tie_embeddings=False,
    scan_layers=False,
    bos_id=None,
    stop_ids=(),
  )
  prompts = [[5, 99, 7, 23], [1, 2, 3, 4, 5, 6, 7, 8, 9]]
  model = transformer.Transformer(cfg)
  params = jax.tree.map(jnp.asarray, params)
  out = generate.generate(model, params, prompts, config.SamplingConfig(max_new_tokens=64))
  for prompt, found in zip(prompts, out.tokens, strict=True):
    with torch.no_grad():
      ids = hf.generate(
        torch.tensor([prompt]),
        attention_mask=torch.ones(1, len(prompt), dtype=torch.long),
        max_new_tokens=64,
        do_sample=False,
        pad_token_id=0,
      )
    assert found == ids[0, len(prompt) :].tolist()
