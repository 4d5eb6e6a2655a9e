"""datatrove's pipeline for bench_ultraclean; run by an interpreter that has datatrove installed.

  python _datatrove_peer.py IN_FOLDER OUT_FOLDER     prints {"seconds": .., "kept": ..} of CPU time

The four English filters with their default settings on every *.jsonl of IN_FOLDER, one process.
It needs spacy beside datatrove[processing] and imports nothing of this repository.
"""

import json
import resource
import sys
import time


def main(source: str, target: str) -> None:
  from datatrove.data import Document
  from datatrove.pipeline import filters
  from datatrove.pipeline.readers import JsonlReader
  from datatrove.pipeline.writers import JsonlWriter

  steps = [
    filters.GopherQualityFilter(),
    filters.GopherRepetitionFilter(),
    filters.C4QualityFilter(),
    filters.FineWebQualityFilter(),
  ]
  for step in steps:  # the tokenizer is loaded before the clock starts
    step.filter(Document(text="Some words. " * 60, id="warm"))
  writer = JsonlWriter(target)
  start, wall = _cpu(), time.perf_counter()
  docs = JsonlReader(source, text_key="text", glob_pattern="*.jsonl")()
  for step in [*steps, writer]:
    docs = step(docs)
  kept = sum(1 for _ in docs)
  writer.close()
  report = {"seconds": _cpu() - start, "wall_seconds": time.perf_counter() - wall, "kept": kept}
  print(json.dumps(report))


def _cpu() -> float:
  usage = resource.getrusage(resource.RUSAGE_SELF)
  return usage.ru_utime + usage.ru_stime


if __name__ == "__main__":
  main(*sys.argv[1:])
