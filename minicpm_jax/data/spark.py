"""The stages of `executor` on Apache Spark (MiniCPM4 section 2.2.1 ran its corpora on Spark).

`run` reads whole files in the Python workers with the same reader, so damaged input and ids are as
in `executor.run`, then spreads documents over partitions and applies the stages with
`mapInPandas`. It needs Java 17 and the extra `spark`, works with `local[*]` and under
`spark-submit`, and keeps the same documents as the local executor: stages look at one document at
a time, so partitions do not matter. Near duplicates come from `minhash`, a groupBy of band hashes.
"""

import atexit
import dataclasses
import functools
import hashlib
import json
import os
import pathlib
import shutil
import sys
import tempfile
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np

from minicpm_jax.core import extras, files
from minicpm_jax.data import (
  classifier,
  decontaminate,
  dedup,
  documents,
  executor,
  scoring,
  tolerant,
)
from minicpm_jax.data.documents import Doc, Dropped

# Columns between steps: a document, or a drop with `stage` set ("" for a document).
_SCHEMA = (
  "id string, text string, source string, lang string, meta string, score double, "
  "stage string, reason string, detail string"
)
_FIELDS = [part.split()[0] for part in _SCHEMA.split(", ")]
_SIGNED = "source string, id string, score double, size long, signature binary, bands array<long>"


def session(master: str | None = None, *, app_name: str = "minicpm_jax", **settings: Any) -> Any:
  """A SparkSession with the settings the stages need; `master` None is for `spark-submit`.

  `settings` are Spark options with "_" for ".": `spark_executor_memory="8g"`.
  """
  sql = extras.require_extra("pyspark.sql", extra="spark")
  extras.require_extra("pandas", extra="spark")
  builder = sql.SparkSession.builder.appName(app_name)
  if master:
    builder = builder.master(master)
  if (master or "").startswith("local"):
    os.environ.setdefault("PYSPARK_PYTHON", sys.executable)  # else "python3" of the PATH
  defaults = {
    "spark.python.worker.reuse": "true",  # a stage's model is loaded once a worker
    "spark.sql.execution.arrow.maxRecordsPerBatch": "1000",
    "spark.ui.enabled": "false",
    "spark.ui.showConsoleProgress": "false",
    "spark.sql.shuffle.partitions": "16",
  }
  for key, value in {**defaults, **{k.replace("_", "."): v for k, v in settings.items()}}.items():
    builder = builder.config(key, value)
  return builder.getOrCreate()


def read(spark: Any, inputs: Sequence[Any], *, reader: Any = None, num_partitions: int = 0) -> Any:
  """DataFrame of the documents and drops of files that every worker can open.

  One file is read by one task; `num_partitions` (0: four a core) spreads the documents after that.
  """
  reader = reader or tolerant.Reader()
  paths = [(str(path), name) for path, name in dict(documents.name_files(inputs)).items()]
  frame = spark.createDataFrame(paths, "path string, name string").repartition(len(paths))

  count = num_partitions or 4 * spark.sparkContext.defaultParallelism
  return frame.mapInPandas(functools.partial(_load, reader), _SCHEMA).repartition(count)


def apply(frame: Any, stages: Sequence[executor.Stage]) -> Any:
  """The DataFrame with the stages applied to its documents; drops pass through."""
  return frame.mapInPandas(functools.partial(_work, tuple(stages)), _SCHEMA)


def ship(spark: Any, stages: Sequence[executor.Stage]) -> list[executor.Stage]:
  """The stages with their files (models, lists, evaluation sets) sent to every worker.

  Spark knows a file by its bare name and refuses two of one name, so each goes under a link with a
  name of its own, in a folder that lives as long as this process.
  """
  folder, shipped = None, []
  for stage in stages:
    names = {}
    for path in _files(stage):
      folder = folder or pathlib.Path(tempfile.mkdtemp(prefix="minicpm_jax-spark-"))
      status = os.stat(path)
      made_of = f"{os.path.abspath(path)} {status.st_size} {status.st_mtime_ns}"
      tag = hashlib.sha1(made_of.encode()).hexdigest()[:12]
      names[path] = f"{tag}-{pathlib.Path(path).name}"
      files = {path: folder / names[path]}
      if isinstance(stage, scoring.ScoreStage):
        files[str(classifier.sidecar_path(path))] = classifier.sidecar_path(files[path])
      for source, target in files.items():
        _link(source, target)
        spark.sparkContext.addFile(str(target))
    shipped.append(_Shipped(stage, tuple(names.items())) if names else stage)
  if folder:
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
  return shipped


def _link(source: str, target: pathlib.Path) -> None:
  if not target.exists():
    try:
      os.link(source, target)
    except OSError:  # another file system
      shutil.copyfile(source, target)


@dataclasses.dataclass(frozen=True)
class _Shipped:
  """A stage whose files lie where Spark put them: (path in the stage, name there) pairs."""

  stage: Any
  names: tuple[tuple[str, str], ...]

  @property
  def name(self) -> str:
    return self.stage.name

  def __call__(self, docs: Iterable[Doc]) -> Iterator[Doc | Dropped]:
    key = repr(self)
    if key not in _LOCATED:
      get = extras.require_extra("pyspark", extra="spark").SparkFiles.get
      _LOCATED[key] = _located(self.stage, {path: get(name) for path, name in self.names})
    return _LOCATED[key](docs)


_LOCATED: dict[str, Any] = {}  # stages that read files, one copy a Python worker


def _files(stage: Any) -> list[str]:
  if isinstance(stage, scoring.ScoreStage):
    return [model.path for model in stage.models]
  if isinstance(stage, dedup.DropListed):
    return [stage.path]
  return list(stage.paths) if isinstance(stage, decontaminate.Decontaminate) else []


def _located(stage: Any, places: Mapping[str, str]) -> Any:
  """The stage with each of its paths replaced."""
  if isinstance(stage, scoring.ScoreStage):
    models = tuple(dataclasses.replace(m, path=places[m.path]) for m in stage.models)
    return dataclasses.replace(stage, models=models)
  if isinstance(stage, dedup.DropListed):
    return dataclasses.replace(stage, path=places[stage.path])
  return dataclasses.replace(stage, paths=tuple(places[path] for path in stage.paths))


def write(frame: Any, out_folder: str) -> dict:
  """Writes kept/ (Parquet by language) and drops/ (JSON lines); returns the counts.

  Spark writes under temporary names and renames at the end of the job.
  """
  functions = extras.require_extra("pyspark.sql.functions", extra="spark")
  frame = frame.persist()
  kept = frame.filter("stage = ''")
  lang = functions.when(kept["lang"] == "", "und").otherwise(kept["lang"])
  kept = kept.select("id", "text", "source", "meta", "score", lang.alias("lang"))
  kept.write.mode("overwrite").partitionBy("lang").parquet(f"{out_folder}/kept")
  drops = frame.filter("stage != ''")
  columns = drops.select("id", "source", "stage", "reason", "detail")
  columns.write.mode("overwrite").json(f"{out_folder}/drops")
  groups = frame.groupBy("stage", "reason").count().collect()
  frame.unpersist()
  counts = {(row["stage"], row["reason"]): row["count"] for row in groups}
  return {
    "kept": counts.pop(("", ""), 0),
    "dropped": {f"{stage}/{reason}": n for (stage, reason), n in sorted(counts.items())},
  }


def run(
  spark: Any,
  inputs: Sequence[Any],
  stages: Sequence[executor.Stage],
  out_folder: Any,
  *,
  reader: Any = None,
  num_partitions: int = 0,
) -> dict:
  """`ship`, `read`, `apply`, `write`; the counts go to OUT/report.json on the driver too."""
  frame = read(spark, inputs, reader=reader, num_partitions=num_partitions)
  counts = write(apply(frame, ship(spark, stages)), str(out_folder))
  files.write_json(pathlib.Path(out_folder) / "report.json", counts)
  return counts


def minhash(frame: Any, cfg: dedup.MinHash | None = None) -> list[dedup.Removal]:
  """Near duplicates among the documents of a DataFrame: the removals of `dedup.minhash`.

  Signatures and band hashes are made in the workers, candidates by one groupBy of (band, hash);
  only candidate documents (signature, score, length) come to the driver. Order, where score and
  length are equal, is by (source, id) instead of by input order.
  """
  cfg = cfg or dedup.MinHash()
  functions = extras.require_extra("pyspark.sql.functions", extra="spark")
  signed = frame.mapInPandas(functools.partial(_sign, cfg), _SIGNED).persist()
  exploded = signed.select("source", "id", functions.posexplode("bands").alias("band", "hash"))
  crowded = exploded.groupBy("band", "hash").count().filter("count > 1").select("band", "hash")
  members = exploded.join(crowded, ["band", "hash"]).select("source", "id").distinct()
  rows = signed.join(members, ["source", "id"]).drop("bands").collect()
  signed.unpersist()
  if not rows:
    return []
  rows = sorted(rows, key=lambda row: (row["source"], row["id"]))
  signatures = np.stack([np.frombuffer(bytes(row["signature"]), np.uint32) for row in rows])
  quality = [(_score(row["score"]), row["size"]) for row in rows]
  keys = [(row["source"], row["id"]) for row in rows]
  return list(dedup.removals(keys, quality, dedup.clusters(signatures, cfg)))


# The steps that run in Python workers: (settings, batches of pandas frames) -> frames.


def _load(reader: executor.Reader, batches: Iterator[Any]) -> Iterator[Any]:
  for batch in batches:
    for path, name in zip(batch["path"], batch["name"], strict=True):
      items = executor.named(reader, name)(path)
      yield from _frames(_row(item, "read", path) for item in items)


def _work(stages: tuple, batches: Iterator[Any]) -> Iterator[Any]:
  for batch in batches:
    yield from _frames(_apply_rows(batch.to_dict("records"), stages))


def _sign(cfg: dedup.MinHash, batches: Iterator[Any]) -> Iterator[Any]:
  pandas = extras.require_extra("pandas", extra="spark")
  for batch in batches:
    rows = [_signed(row, cfg) for row in batch.to_dict("records") if row["stage"] == ""]
    yield pandas.DataFrame(rows, columns=[part.split()[0] for part in _SIGNED.split(", ")])


def _signed(row: dict, cfg: dedup.MinHash) -> tuple:
  values = dedup.signature(row["text"], cfg)
  is_empty = bool((values == dedup.EMPTY).all())
  bands = [] if is_empty else dedup.band_hashes(values[None], cfg)[0].view(np.int64).tolist()
  return row["source"], row["id"], row["score"], len(row["text"]), values.tobytes(), bands


def _score(value: float | None) -> float:
  return float("-inf") if value is None or np.isnan(value) else value


def _apply_rows(rows: list[dict], stages: tuple) -> Iterator[tuple]:
  """Earlier drops as they are, then the documents through `executor.apply`.

  Ids are unique in a file only, so rows that share one go through in turns.
  """
  yield from (tuple(row[f] for f in _FIELDS) for row in rows if row["stage"])
  rows = [row for row in rows if not row["stage"]]
  while rows:
    turn = {}
    again = [row for row in rows if turn.setdefault(row["id"], row) is not row]
    dropped = []

    def on_drop(stage: str, item: Dropped, excerpt: str, turn=turn, dropped=dropped) -> None:
      dropped.append(_row(item, stage, turn[item.id]["source"]))

    for doc in executor.apply(map(_doc, turn.values()), stages, on_drop, {}):
      yield _row(doc, "", doc.source)
    yield from dropped
    rows = again


def _doc(row: dict) -> Doc:
  score = _score(row["score"])
  fields = {f: row[f] for f in ("id", "text", "source", "lang")}
  return Doc(
    **fields, meta=json.loads(row["meta"]), score=None if score == float("-inf") else score
  )


def _row(item: Doc | Dropped, stage: str, source: str) -> tuple:
  if isinstance(item, Dropped):
    return item.id, "", source, "", "{}", None, stage, item.reason, item.detail
  row = tolerant.to_row(item)
  return (*(row[f] for f in _FIELDS[:6]), "", "", "")


def _frames(rows: Iterator[tuple]) -> Iterator[Any]:
  """pandas frames of bounded size."""
  pandas = extras.require_extra("pandas", extra="spark")
  block, size = [], 0
  for row in rows:
    block.append(row)
    size += len(row[1])
    if len(block) == 1000 or size > 8 * 2**20:
      yield pandas.DataFrame(block, columns=_FIELDS)
      block, size = [], 0
  if block:
    yield pandas.DataFrame(block, columns=_FIELDS)
