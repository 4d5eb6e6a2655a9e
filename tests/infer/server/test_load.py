"""A thousand short requests at once against a tiny model: none is lost, memory stays flat."""

import asyncio
import resource

import pytest

from minicpm_jax import config
from minicpm_jax.infer import engine
from minicpm_jax.infer.server import metrics, service
from tests.infer.server import scripted

NUM = 1000


def body(i):
  return {"messages": [{"role": "user", "content": f"q{i % 100}"}], "max_tokens": 1 + i % 3}


def check(answers, num=NUM):
  assert len(answers) == num
  for i, answer in enumerate(answers):
    assert answer["usage"]["completion_tokens"] == 1 + i % 3
    assert answer["choices"][0]["finish_reason"] in ("length", "stop")


def test_a_thousand_at_once_through_the_service(tiny_engine_parts, byte_tokenizer):
  sizes = config.EngineConfig(capacity=64, max_batch=16, chunk_size=32, min_span=128)
  decoder = engine.Engine(*tiny_engine_parts, sizes, stop_ids=(257, 259))
  tok = byte_tokenizer(chat_template=scripted.TEMPLATE)
  cfg = config.ServerConfig(max_queue=NUM, shutdown_seconds=5.0)
  with service.ChatService(decoder, tok, name="tiny", cfg=cfg) as chat:
    used = []
    for num in (NUM // 8, NUM):
      answers = [chat.submit("chat", body(i)) for i in range(num)]
      check([answer.whole() for answer in answers], num)
      used.append(metrics.memory_usage()["process"])
    report = chat.report()
  assert report["requests_completed"] == NUM + NUM // 8 and report["requests_failed"] == 0
  assert report["requests_waiting"] == report["requests_running"] == 0
  assert used[1] - used[0] < 40 * 2**20, used  # the first ones have warmed everything up


@pytest.mark.slow
def test_a_thousand_at_once_over_http(real_server):
  httpx = pytest.importorskip("httpx")
  url, chat = real_server
  soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
  if hard != resource.RLIM_INFINITY and hard < 3 * NUM:
    pytest.skip(f"only {hard} open files are allowed, {3 * NUM} are needed")
  resource.setrlimit(resource.RLIMIT_NOFILE, (max(soft, 3 * NUM), hard))

  async def ask(client, i):
    response = await client.post(url + "/v1/chat/completions", json=body(i))
    assert response.status_code == 200, response.text
    return response.json()

  async def everybody():
    limits = httpx.Limits(max_connections=None, max_keepalive_connections=0)
    async with httpx.AsyncClient(timeout=None, limits=limits) as client:
      return await asyncio.gather(*(ask(client, i) for i in range(NUM)))

  used = []
  for _ in range(3):
    check(asyncio.run(everybody()))
    used.append(metrics.memory_usage()["process"])
  assert chat.report()["requests_failed"] == 0 and chat.num_running == chat.num_waiting == 0
  assert used[2] - used[1] < 60 * 2**20, used
  assert httpx.get(url + "/health").json()["status"] == "ok"
