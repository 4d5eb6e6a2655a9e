"""Speed of the data pipeline: benchmarks/results/bench_ultraclean.json.

  python -m experiments.bench_ultraclean --corpus=../shared/data/pretrain
  python -m experiments.bench_ultraclean --parts=minhash --minhash_documents=100000

Parts: `score` (score stage against raw fastText on the same lines), `filters` (our executor and
datatrove, same filters, same files; --datatrove_python names an interpreter that has
datatrove[processing] and spacy), `signatures` (MinHash against rensa), `minhash` (memory and
time), `spark` (local[2] against local[1]). Documents a second are of CPU time of one core.
"""

import json
import multiprocessing
import os
import pathlib
import platform
import sys
import time

from absl import flags

from experiments import _bench_ultraclean as bench
from experiments import _command
from minicpm_jax.core import files
from minicpm_jax.data import ultraclean
from minicpm_jax.text import tokenizer as tokenizer_lib

_PARTS = ("score", "filters", "signatures", "minhash", "spark")
_RESULTS = pathlib.Path(__file__).resolve().parents[1] / "benchmarks" / "results"

VALUES = flags.FlagValues()
flags.DEFINE_multi_enum("parts", list(_PARTS), list(_PARTS), "What to measure.", flag_values=VALUES)
flags.DEFINE_string(
  "corpus", "../shared/data/pretrain", "Folder of en_*.jsonl.gz, zh_*.jsonl.gz.", flag_values=VALUES
)
flags.DEFINE_string(
  "tokenizer", None, "Folder of a tokenizer, for the score part.", flag_values=VALUES
)
flags.DEFINE_string(
  "datatrove_python", None, "Interpreter with datatrove (default: this one).", flag_values=VALUES
)
flags.DEFINE_integer(
  "minhash_documents", 100_000, "Documents of the minhash part.", flag_values=VALUES
)
flags.DEFINE_integer(
  "spark_copies", 10, "Times the corpus is read by the spark part.", flag_values=VALUES
)
flags.DEFINE_integer("repeats", 3, "Runs of a measurement; the fastest counts.", flag_values=VALUES)
flags.DEFINE_string(
  "out", str(_RESULTS / "bench_ultraclean.json"), "File of the results.", flag_values=VALUES
)


def _alone(function, *args):
  """The result of a call in a fresh process: memory and JVM of its own."""
  with multiprocessing.get_context("spawn").Pool(1) as pool:
    return pool.apply(function, args)


def _score(values) -> list[dict]:
  segmenters = {"en": ultraclean.WhitespaceSegmenter(), "zh": ultraclean.CharacterSegmenter()}
  rows = []
  for lang, segmenter in segmenters.items():
    docs = bench.read(values.corpus, lang)
    rows.append({"lang": lang, **bench.score(docs, segmenter, values.repeats)})
    if values.tokenizer:
      tokenizer = tokenizer_lib.load_tokenizer(values.tokenizer)
      by_tokens = ultraclean.TokenizerSegmenter(tokenizer)
      rows.append({"lang": lang, **bench.score(docs, by_tokens, values.repeats)})
  return rows


def _spark(values) -> dict:
  runs = []
  for cores in (1, 2):
    runs.append(_alone(bench.spark, f"local[{cores}]", values.corpus, values.spark_copies))
  return {"runs": runs, "speedup": runs[0]["wall_s"] / runs[1]["wall_s"]}


def _run() -> None:
  path = pathlib.Path(VALUES.out)
  result = json.loads(path.read_text()) if path.exists() else {}
  for part in VALUES.parts:
    print(f"{part} ...", flush=True)
    start = time.perf_counter()
    if part == "score":
      found = _score(VALUES)
    elif part == "filters":
      docs = bench.read(VALUES.corpus, "en")
      found = bench.filter_speed(docs, VALUES.datatrove_python, VALUES.repeats)
    elif part == "signatures":
      found = bench.rensa_signatures(bench.read(VALUES.corpus, "en"), VALUES.repeats)
    elif part == "minhash":
      found = _alone(bench.minhash, VALUES.corpus, VALUES.minhash_documents)
    else:
      found = _spark(VALUES)
    result[part] = found
    result.setdefault("environment", {})[part] = {
      "python": platform.python_version(),
      "cores": os.cpu_count(),
      "load_1min": os.getloadavg()[0],
      "date": time.strftime("%Y-%m-%d %H:%M"),
    }
    print(json.dumps(found, indent=1), f"({time.perf_counter() - start:.0f} s)", flush=True)
    files.write_json(path, result)
  print(path)


def main(argv: list[str] | None = None) -> int:
  """Status 0, or 1 and one line on stderr for bad input."""
  return _command.run(_run, VALUES, argv)


if __name__ == "__main__":
  sys.exit(main())
