"""An OpenAI-compatible server of a model on disk, with a chat page at /.

  python -m experiments.serve --model=DIR_OR_GGUF                  # http://127.0.0.1:8000
  python -m experiments.serve --model=DIR --port=9000 --max_batch=8 --draft_kind=ngram

POST /v1/chat/completions and /v1/completions, GET /v1/models, /health, /metrics. The flags are
CPM.cu's (config/cpmcu.py) and --max_queue, --max_body_bytes; those of sampling hold where a request
says nothing (--generation_config: else what the folder's generation_config.json says; without it
greedy, as CPM.cu); --model is short for --model_path. It
listens on the loopback address unless --host says otherwise: there is no authentication. Before, it
compiles what requests of --warmup_tokens tokens need (--nowarmup: as they come), also those under a
schema or grammar where they can be served (--nowarmup_constrained: the first one waits).
Ctrl-C or SIGTERM lets answers under way end. Needs `pip install 'minicpm_jax[serve]'`
(`[constrained]` for response_format, grammars and required tool calls).
"""

import dataclasses
import pathlib
import sys
import time

from absl import flags

from experiments import _command, _infer
from minicpm_jax import config
from minicpm_jax.config import cpmcu
from minicpm_jax.core import compilation_cache, host_memory
from minicpm_jax.infer import chat as chat_lib
from minicpm_jax.infer.server import app, service

VALUES = flags.FlagValues()
_infer.define(VALUES, cpmcu.GENERATE_ONLY)
flags.DEFINE_alias("model", "model_path", flag_values=VALUES)
_DEFAULT = config.ServerConfig()
flags.DEFINE_integer("max_queue", _DEFAULT.max_queue, "Waiting requests.", flag_values=VALUES)
flags.DEFINE_integer("max_body_bytes", _DEFAULT.max_body_bytes, "Of a body.", flag_values=VALUES)
flags.DEFINE_string("model_name", None, "Name in answers (the path's).", flag_values=VALUES)


def make(values: flags.FlagValues) -> service.ChatService:
  """The service that the flags describe, not started."""
  cfg = _infer.read(values)
  if cfg.json_schema or cfg.grammar_file:
    raise ValueError("--json_schema, --grammar_file: requests say them (response_format, grammar)")
  server = config.ServerConfig(
    host=cfg.host,
    port=cfg.port,
    max_queue=values.max_queue,
    max_body_bytes=values.max_body_bytes,
  )
  loaded = _infer.load(cfg, max_batch=cfg.max_batch)
  cfg = _infer.with_generation(values, cfg, loaded.engine.model.cfg)
  server = dataclasses.replace(server, sampling=_infer.sampling(cfg))
  try:
    template = chat_lib.template_for(loaded.engine.model.cfg, loaded.tok)
  except ValueError:  # a base model: text completions work, chat says what is missing
    template = None
  name = values.model_name or pathlib.Path(cfg.model_path).name
  chat = service.ChatService(
    loaded.engine, loaded.tok, name=name, cfg=server, template=template, stop_ids=loaded.stop_ids
  )
  if cfg.warmup:
    began = time.perf_counter()
    is_constrained = cfg.warmup_constrained
    if is_constrained is None:
      is_constrained = (error := chat.grammar_error()) is None
      if error is not None:
        print(f"warm-up: without grammars ({error})", file=sys.stderr)
    num = chat.warm_up(cfg.warmup_tokens or None, is_constrained=is_constrained)
    print(f"warm-up: {num} programs in {time.perf_counter() - began:.1f} s", file=sys.stderr)
  return chat


def _run() -> None:
  flagged = _infer.read(VALUES)
  app.check(flagged.host, flagged.port)
  with compilation_cache.use(flagged.compilation_cache):
    chat = make(VALUES)
    cfg, capacity = chat.cfg, chat.models()["data"][0]["max_model_len"]
    print(f"{chat.name}: {capacity} tokens a row, http://{cfg.host}:{cfg.port}", file=sys.stderr)
    app.make_server(chat).run()


def main(argv: list[str] | None = None) -> int:
  """Status 0, or 1 and one line on stderr for bad input."""
  return _command.run(_run, VALUES, argv)


if __name__ == "__main__":
  host_memory.keep()
  sys.exit(main())
