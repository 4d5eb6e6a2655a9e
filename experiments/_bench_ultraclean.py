"""What bench_ultraclean measures; CPU seconds of one core unless a name says wall."""

import json
import pathlib
import random
import re
import resource
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any

from minicpm_jax.data import (
  classifier,
  dedup,
  executor,
  filters,
  repetition,
  scoring,
  tolerant,
  ultraclean,
)
from minicpm_jax.data import spark as spark_lib
from minicpm_jax.data.documents import Doc

GOOD = ("textbook", "wiki")  # in the name of a file: positives of the classifier
_PEER = pathlib.Path(__file__).with_name("_datatrove_peer.py")


def read(folder: str, lang: str) -> list[Doc]:
  """Documents of FOLDER/LANG_*.jsonl.gz."""
  paths = sorted(pathlib.Path(folder).glob(f"{lang}_*.jsonl*"))
  items = (item for path in paths for item in tolerant.Reader()(path))
  return [item for item in items if isinstance(item, Doc)]


def cpu_seconds(work: Callable[[], Any], repeats: int) -> float:
  """The least CPU time of some runs: other load on the machine only adds."""
  times = []
  for _ in range(repeats):
    start = time.process_time()
    work()
    times.append(time.process_time() - start)
  return min(times)


def score(docs: Sequence[Doc], segmenter: ultraclean.Segmenter, repeats: int) -> dict:
  """The score stage (normalise, predict, decide) against raw fastText on the finished lines."""
  rows = []
  for doc in docs:
    is_good = any(word in pathlib.Path(doc.source).name for word in GOOD)
    rows += classifier.rows([doc], is_good, segmenter)
  model = classifier.train(rows, classifier.preset("small"), segmenter)
  with tempfile.TemporaryDirectory() as folder:
    path = pathlib.Path(folder) / "model.bin"
    model.save(path)
    stage = scoring.score_stage({"": path}, {"": segmenter}, threshold=0.5)
    lines = [line for _, line in rows]
    raw = cpu_seconds(lambda: [model.model.predict(line) for line in lines], repeats)
    lists = cpu_seconds(lambda: model.model.predict(lines), repeats)
    ours = cpu_seconds(lambda: list(stage(docs)), repeats)
    normalise = cpu_seconds(
      lambda: [ultraclean.normalise(d.text, segmenter) for d in docs], repeats
    )
  return {
    "segmenter": segmenter.identity,
    "documents": len(docs),
    "characters": sum(len(d.text) for d in docs),
    "stage_documents_per_s": len(docs) / ours,
    "raw_fasttext_documents_per_s": len(lines) / raw,
    "raw_fasttext_one_list_documents_per_s": len(lines) / lists,
    "normalise_documents_per_s": len(docs) / normalise,
    "time_over_raw": ours / raw,
  }


def filter_speed(docs: Sequence[Doc], peer_python: str | None, repeats: int) -> dict:
  """Four English filters, files in and files out: our executor (one process) and datatrove."""
  stages = (
    filters.GopherQuality(count_symbols=True),
    repetition.GopherRepetition(),
    filters.C4Quality(),
    filters.FineWebQuality(),
  )
  result = {"documents": len(docs)}
  with tempfile.TemporaryDirectory() as folder:
    root = pathlib.Path(folder)
    (root / "in").mkdir()
    with open(root / "in" / "docs.jsonl", "w", encoding="utf-8") as file:
      file.writelines(json.dumps({"id": d.id, "text": d.text}) + "\n" for d in docs)
    counter = iter(range(repeats))
    ours = cpu_seconds(
      lambda: executor.run([root / "in"], stages, root / f"out{next(counter)}", num_workers=0),
      repeats,
    )
    result |= {
      "executor_documents_per_s": len(docs) / ours,
      "kept": sum(1 for _ in executor.read_kept(root / "out0")),
    }
    command = [peer_python or sys.executable, str(_PEER), str(root / "in"), str(root / "peer")]
    done = subprocess.run(command, capture_output=True, text=True)
  if done.returncode:
    reason = (done.stderr.strip().splitlines() or [f"exit code {done.returncode}"])[-1]
    return result | {"datatrove": f"not run: {reason}"}
  peer = json.loads(done.stdout.splitlines()[-1])
  return result | {
    "datatrove_documents_per_s": len(docs) / peer["seconds"],
    "datatrove_kept": peer["kept"],
    "times_datatrove": peer["seconds"] / ours,
  }


def spark(master: str, folder: str, copies: int) -> dict:
  """Wall seconds of the published filters as a Spark job; call in a process of its own.

  The corpus is read `copies` times over (under other names); the second job of the session counts.
  """
  start = time.perf_counter()
  session = spark_lib.session(master)
  session.sparkContext.setLogLevel("ERROR")
  started = time.perf_counter() - start
  walls = []
  with tempfile.TemporaryDirectory() as root:
    (pathlib.Path(root) / "in").mkdir()
    for path in pathlib.Path(folder).resolve().glob("*.jsonl.gz"):
      for i in range(copies):
        (pathlib.Path(root) / "in" / f"{i}-{path.name}").symlink_to(path)
    for _ in range(2):
      start = time.perf_counter()
      counts = spark_lib.run(session, [f"{root}/in"], [filters.published()], f"{root}/out")
      walls.append(time.perf_counter() - start)
  session.stop()
  num_read = counts["kept"] + sum(counts["dropped"].values())
  return {"master": master, "session_s": started, "wall_s": walls[-1], "documents": num_read}


def synthetic(folder: str, count: int, share: float = 0.1) -> Iterator[Doc]:
  """`count` documents of random real sentences; `share` are near copies of an earlier one."""
  draw = random.Random(0)
  texts = (d.text for lang in ("en", "zh") for d in read(folder, lang))
  pool = [s for t in texts for s in re.split(r"(?<=[.!?。！？])\s*", t) if 20 < len(s) < 400]
  recent = []
  for i in range(count):
    if recent and draw.random() < share:
      of, text = draw.choice(recent)
      yield Doc(id=f"copy{i}of{of}", text=f"{text} {draw.choice(pool)[:20]}")
      continue
    text = " ".join(draw.choices(pool, k=draw.randrange(10, 40)))
    recent = [*recent[-999:], (i, text)]
    yield Doc(id=str(i), text=text)


def minhash(folder: str, count: int) -> dict:
  """CPU, wall and peak memory of MinHash; call in a process of its own."""
  generated = cpu_seconds(lambda: sum(len(d.text) for d in synthetic(folder, count)), 1)
  before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
  start, cpu = time.perf_counter(), time.process_time()
  removed = list(dedup.minhash(synthetic(folder, count)))
  copies = {d.id for d in synthetic(folder, count) if d.id.startswith("copy")}
  clusters = {r.id for r in removed} | {r.detail for r in removed}
  return {
    "documents": count,
    "planted_copies": len(copies),
    "copies_found": len(copies & clusters),
    "removed": len(removed),
    "wall_s": time.perf_counter() - start,
    "cpu_s": time.process_time() - cpu - 2 * generated,
    "peak_memory_mb": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024,
    "memory_before_mb": before / 1024,
  }


def rensa_signatures(docs: Sequence[Doc], repeats: int) -> dict:
  """Our signatures against rensa's, 112 hash functions over the same word 5-grams."""
  cfg = dedup.MinHash()
  ours = cpu_seconds(lambda: [dedup.signature(d.text, cfg) for d in docs], repeats)
  try:
    import rensa
  except ImportError:
    return {"numpy_documents_per_s": len(docs) / ours, "rensa": "not installed"}

  def theirs():
    for doc in docs:
      words = re.findall(r"\w+", doc.text.lower())
      sketch = rensa.RMinHash(num_perm=112, seed=0)
      sketch.update([" ".join(words[i : i + 5]) for i in range(max(1, len(words) - 4))])
      sketch.digest()

  peer = cpu_seconds(theirs, repeats)
  return {"numpy_documents_per_s": len(docs) / ours, "rensa_documents_per_s": len(docs) / peer}
