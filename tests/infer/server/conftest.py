"""A scripted engine and a real tiny model behind a loopback server."""

import contextlib
import threading

import pytest

from minicpm_jax import config
from minicpm_jax.infer import engine
from minicpm_jax.infer.server import service
from tests.infer.server import scripted


@contextlib.contextmanager
def run_server(chat_service):
  """Serves on a free loopback port; yields the base URL."""
  from minicpm_jax.infer.server import app

  server = app.make_server(chat_service)
  thread = threading.Thread(target=server.run, daemon=True)
  thread.start()
  while not server.started:
    assert thread.is_alive(), "the server did not start"
    thread.join(0.01)
  try:
    port = server.servers[0].sockets[0].getsockname()[1]
    yield f"http://127.0.0.1:{port}"
  finally:
    server.should_exit = True
    thread.join()


@pytest.fixture
def serve_scripted(byte_tokenizer):
  """serve_scripted(script) -> (base URL, engine, service); stopped at the end."""
  pytest.importorskip("fastapi")
  pytest.importorskip("uvicorn")
  with contextlib.ExitStack() as stack:

    def start(script, *, max_batch=2, **fields):
      steps = (lambda _: scripted.bytewise(script)) if isinstance(script, str) else script
      fake = scripted.ScriptedEngine(steps, max_batch=max_batch, capacity=2000)
      cfg = config.ServerConfig(**{"port": 0, "shutdown_seconds": 2.0} | fields)
      tok = byte_tokenizer(chat_template=scripted.TEMPLATE)
      chat = service.ChatService(fake, tok, name="tiny", cfg=cfg)
      return stack.enter_context(run_server(chat)), fake, chat

    yield start


@pytest.fixture(scope="module")
def real_server(tiny_engine_parts):
  """(base URL, service): the tiny model, four rows."""
  pytest.importorskip("fastapi")
  pytest.importorskip("uvicorn")
  from tests.infer.conftest import ByteTokenizer

  decoder = engine.Engine(
    *tiny_engine_parts,
    config.EngineConfig(capacity=512, max_batch=4, chunk_size=64, min_span=512),
    stop_ids=(257, 259),
  )
  cfg = config.ServerConfig(port=0, max_queue=2000, shutdown_seconds=5.0)
  tok = ByteTokenizer(chat_template=scripted.TEMPLATE)
  chat = service.ChatService(decoder, tok, name="tiny", cfg=cfg)
  with run_server(chat) as url:
    yield url, chat


@pytest.fixture
def make(byte_tokenizer):
  """make(script or text, ...) -> (started service, engine); all are closed at the end."""
  made = []

  def start(script, *, template=scripted.TEMPLATE, max_batch=2, capacity=600, **fields):
    steps = (lambda _: scripted.bytewise(script)) if isinstance(script, str) else script
    engine = scripted.ScriptedEngine(steps, max_batch=max_batch, capacity=capacity)
    cfg = config.ServerConfig(**{"shutdown_seconds": 5.0} | fields)
    tok = byte_tokenizer(chat_template=template)
    made.append(service.ChatService(engine, tok, name="tiny", cfg=cfg).start())
    return made[-1], engine

  yield start
  for item in made:
    item.close(0.0)
