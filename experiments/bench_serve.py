"""The server under load: requests/s, tokens/s and time to the first token over loopback HTTP.

  python -m experiments.bench_serve                          (the 135M model of fetch_model)
  python -m experiments.bench_serve --model=RUN --concurrency=1,16 --max_batch=16 --draft=DIR

Closed loop: each of the clients (threads of another process) streams one answer after the other
from /v1/completions, greedily, all of --new_tokens. Beside it "engine alone": such requests at the
same concurrency put into the same engine without HTTP, text or threads, in the same run: as many,
as long, but every prompt is sent once, so that the prompt cache holds none. Compilation is in no
number.
Writes OUTPUT/bench_serve_NAME.json and .png. Needs `pip install 'minicpm_jax[serve,plot]'`.
"""

import pathlib
import sys

from absl import flags

from experiments import _command

VALUES = flags.FlagValues()
_MODEL = flags.DEFINE_string(
  "model", None, "HF folder, run folder or .gguf; default: the 135M model.", flag_values=VALUES
)
_NAME = flags.DEFINE_string(
  "name", None, "In file names; default: the model's.", flag_values=VALUES
)
_CLIENTS = flags.DEFINE_list("concurrency", ["1", "4", "16", "64"], "Clients.", flag_values=VALUES)
_BATCH = flags.DEFINE_integer(
  "max_batch", 4, "Rows of the engine.", lower_bound=1, flag_values=VALUES
)
_ROUNDS = flags.DEFINE_integer(
  "rounds_per_dispatch", 1, "Tokens between two answers to the host.", flag_values=VALUES
)
_SHRINKS = flags.DEFINE_bool("shrinks", True, "Rounds of live rows alone.", flag_values=VALUES)
_DRAFT = flags.DEFINE_string(
  "draft", None, "Folder of an EAGLE draft, trees 2/10/12.", flag_values=VALUES
)
_PROMPT = flags.DEFINE_integer(
  "prompt_tokens", 64, "Of a prompt.", lower_bound=1, flag_values=VALUES
)
_NEW = flags.DEFINE_integer("new_tokens", 32, "Of an answer.", lower_bound=2, flag_values=VALUES)
_LEAST = flags.DEFINE_integer(
  "min_requests", 8, "At each concurrency (else two a client).", lower_bound=1, flag_values=VALUES
)
_OUTPUT = flags.DEFINE_string(
  "output", None, "Folder; default: benchmarks/results.", flag_values=VALUES
)


def main(argv: list[str] | None = None) -> int:
  """Status 0, or 1 and one line on stderr for bad input."""
  return _command.run(_run, VALUES, argv)


def _run() -> None:
  from experiments import _bench_decode, _bench_serve, _models, _results
  from minicpm_jax import ckpt, config
  from minicpm_jax.infer import engine as engine_lib
  from minicpm_jax.infer.drafters import base, eagle

  clients = _CLIENTS.value
  if not clients or not all(text.isdigit() and int(text) for text in clients):
    raise ValueError(f"--concurrency: found {clients}, expected numbers of clients")
  clients = [int(text) for text in clients]
  path = _models.path_of(_MODEL.value)
  num_nodes = eagle.EagleDrafter.num_nodes if _DRAFT.value else 1
  model, params, tok = _models.load(str(path), _BATCH.value * num_nodes)
  drafter, draft_params = base.NoDrafter(), ()
  if _DRAFT.value:
    draft = ckpt.load_draft(_DRAFT.value, model.cfg)
    drafter, draft_params = eagle.make(draft, model, params)
  num = _bench_serve.num_prompts(_BATCH.value, clients, _LEAST.value)
  prompts = _bench_serve.prompts_of(tok, _bench_decode.PROSE, num, _PROMPT.value)
  cfg = config.EngineConfig(
    capacity=_PROMPT.value + _NEW.value + num_nodes,
    max_batch=_BATCH.value,
    rounds_per_dispatch=_ROUNDS.value,
    shrinks=_SHRINKS.value,
  )
  more = dict(drafter=drafter, draft_params=draft_params)
  engine = engine_lib.Engine(model, params, cfg, **more)  # no stop ids: answers are equally long
  rows = _bench_serve.measure(engine, tok, prompts, clients, _NEW.value, _LEAST.value)
  name = _NAME.value or pathlib.Path(path).name.split(".")[0]
  folder = _results.folder(_OUTPUT.value)
  out = folder / f"bench_serve_{name}.json"
  more = dict(model=pathlib.Path(path).name, max_batch=cfg.max_batch, prompt_tokens=_PROMPT.value)
  more |= dict(new_tokens=_NEW.value, rounds_per_dispatch=cfg.rounds_per_dispatch)
  more |= dict(shrinks=cfg.shrinks, nodes=num_nodes)
  _results.write(out, rows, compile_seconds=engine.compile_seconds, **more)
  device = "{device}, {num_cpus} CPUs".format(**_results.environment())
  title = f"{name}: {cfg.max_batch} rows, {_PROMPT.value} + {_NEW.value} tokens ({device})"
  _bench_serve.draw(out.with_suffix(".png"), rows, title)


if __name__ == "__main__":
  sys.exit(main())
