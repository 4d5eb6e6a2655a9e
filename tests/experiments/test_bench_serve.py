"""The server benchmark on a tiny model: all requests are answered whole, rates are of the times."""

import jax
import pytest

from experiments import _bench_serve, _serve_load, bench_serve
from minicpm_jax import config
from minicpm_jax.infer import engine as engine_lib
from minicpm_jax.infer import generate
from minicpm_jax.models import transformer
from tests.infer.conftest import ByteTokenizer


def test_rates_and_quantiles_are_those_of_the_times():
  times = [(0.0, 0.5, 2.5), (0.0, 0.1, 1.1), (1.0, 1.3, 5.0)]
  answers = [
    _serve_load.Answer(sent=sent, first=first, end=end, tokens=11, cached=i)
    for i, (sent, first, end) in enumerate(times)
  ]
  row = _bench_serve.row("http", 2, answers)
  assert row["requests/s"] == pytest.approx(3 / 5) and row["tokens/s"] == pytest.approx(33 / 5)
  assert row["first token p50 ms"] == pytest.approx(300)
  assert row["first token p95 ms"] == pytest.approx(480)  # 0.9 of the way from 300 to 500
  assert row["ms a token p50"] == pytest.approx(200) and row["cached prompt tokens"] == 3


def test_server_and_engine_alone_answer_every_request_whole(tmp_path):
  pytest.importorskip("fastapi")
  pytest.importorskip("uvicorn")
  pytest.importorskip("matplotlib")
  cfg = config.ModelConfig(
    vocab_size=260,
    model_dim=16,
    mlp_dim=16,
    num_layers=1,
    num_heads=2,
    num_kv_heads=1,
    head_dim=8,
    max_position=64,
  )
  model = transformer.Transformer(cfg)
  parts = generate.for_decoding(model, transformer.init_params(model, jax.random.key(0)))
  sizes = config.EngineConfig(capacity=64, max_batch=2, chunk_size=16, min_span=64)
  engine, tok = engine_lib.Engine(*parts, sizes), ByteTokenizer()
  num = _bench_serve.num_prompts(2, [1, 3], 4)
  assert num == 4 + 2 * 4 + 2 * 6
  prompts = _bench_serve.prompts_of(tok, "the quick brown fox", num, 40)  # over min_prefix tokens
  assert all(len(prompt) == 40 for prompt in prompts) and len({tuple(p) for p in prompts}) == num
  with pytest.raises(ValueError, match="prompts: found 23, expected at least 24"):
    _bench_serve.measure(engine, tok, prompts[1:], [1, 3], 5, 4)
  rows = _bench_serve.measure(engine, tok, prompts, [1, 3], 5, 4)
  assert [row["side"] for row in rows] == ["http", "engine alone"] * 2
  assert [row["requests"] for row in rows] == [4, 4, 6, 6]
  for row in rows:
    assert row["tokens/s"] == pytest.approx(5 * row["requests/s"])
    assert 0 < row["first token p50 ms"] <= row["first token p95 ms"]
    assert row["cached prompt tokens"] == 0
  _bench_serve.draw(tmp_path / "a.png", rows, "title")
  assert (tmp_path / "a.png").read_bytes()[:4] == b"\x89PNG"
  with _bench_serve.serving(engine, tok, 2) as url:
    with pytest.raises(RuntimeError, match="status 400: .*found 70 tokens"):
      _serve_load.drive(url, [[1] * 70], 1, 5)


@pytest.mark.parametrize(
  "flag, text",
  [("--concurrency=1,x", "found ['1', 'x']"), ("--model=none.gguf", "no such file or folder")],
)
def test_bad_flags(flag, text, capsys, tmp_path):
  assert bench_serve.main(["bench_serve", flag, f"--output={tmp_path}", "--model=none.gguf"]) == 1
  assert text in capsys.readouterr().err and not list(tmp_path.iterdir())
