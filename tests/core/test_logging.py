"""JSONL survives a crash and a resume; plain lines without a TTY, rich on one."""

import contextlib
import io
import json
import os
import resource
import struct

import pytest

from minicpm_jax.core import logging


def steps(workdir):
  return [row["step"] for row in logging.read_metrics(workdir)]


def test_a_resumed_run_drops_what_was_logged_after_its_checkpoint(tmp_path):
  with logging.MetricWriter(tmp_path) as writer:
    for step in range(5):
      writer.write(step, {"loss": 5.0 - step})
  with logging.MetricWriter(tmp_path, resume_step=2) as writer:
    writer.write(3, {"loss": 9.0})
  assert steps(tmp_path) == [0, 1, 2, 3]
  assert logging.read_metrics(tmp_path)[-1] == {"step": 3, "loss": 9.0}
  with logging.MetricWriter(tmp_path):
    pass
  assert steps(tmp_path) == []
  assert list((tmp_path / "tensorboard").glob("events.*"))
  assert not list(tmp_path.glob(".tmp-*"))


def test_torn_last_line_is_dropped_but_a_bad_middle_line_is_reported(tmp_path):
  path = tmp_path / logging.JSONL
  path.write_text('{"step": 1, "loss": 2.0}\n{"step": 2, "lo')
  with logging.MetricWriter(tmp_path, resume_step=5) as writer:
    writer.write(6, {"loss": 1.0})
  assert steps(tmp_path) == [1, 6]
  path.write_text('{"step": 1}\nrubbish\n{"step": 2}\n')
  with pytest.raises(ValueError, match="line 2.*rubbish"):
    logging.read_metrics(tmp_path)


def test_numbers_that_are_not_finite_stay_valid_json(tmp_path):
  with logging.MetricWriter(tmp_path) as writer:
    writer.write(1, {"loss": float("nan"), "norm": float("inf")})
  line = (tmp_path / logging.JSONL).read_text()
  assert json.loads(line, parse_constant=pytest.fail) == {"step": 1, "loss": None, "norm": None}


def test_only_the_main_process_writes(tmp_path, monkeypatch):
  monkeypatch.setattr("minicpm_jax.core.mesh.is_main_process", lambda: False)
  out = io.StringIO()
  with logging.MetricWriter(tmp_path) as writer, logging.progress(4, stream=out) as bar:
    writer.write(1, {"loss": 1.0})
    bar.update(1, {"loss": 1.0})
    bar.message("hello")
  assert list(tmp_path.iterdir()) == [] and out.getvalue() == ""


def test_plain_lines_without_a_terminal():
  out = io.StringIO()
  with logging.progress(100, start=50, stream=out) as bar:
    bar.update(51)
    bar.update(60, {"loss": 3.14159, "lr": 0.0001234, "tok/s": 12345.6})
    bar.message("saved [60]")
  lines = out.getvalue().splitlines()
  assert lines[0].startswith("step 60/100  loss 3.142  lr 0.000123  tok/s 12,346  eta 0:00:0")
  assert lines[1:] == ["saved [60]"]


def test_a_terminal_gets_a_bar():
  class Terminal(io.StringIO):
    def isatty(self):
      return True

  out = Terminal()
  with logging.progress(4, stream=out) as bar:
    bar.update(4, {"loss": 1.5})
    bar.message("saved [4]")
  assert "4/4" in out.getvalue() and "loss 1.5" in out.getvalue() and "saved [4]" in out.getvalue()


def test_a_full_disk_is_an_error_and_never_a_wait(tmp_path):
  """Files may not grow beyond 64 KiB: what a full disk does to the two files of a run."""
  before = resource.getrlimit(resource.RLIMIT_FSIZE)
  writer = logging.MetricWriter(tmp_path)
  resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 16, before[1]))
  try:
    with pytest.raises(OSError, match="too large"):
      for step in range(10_000):
        writer.write(step, {"loss": 1.0, "learning_rate": 0.5})
    with contextlib.suppress(OSError):  # what is left in a buffer does not fit either
      writer.close()
  finally:
    resource.setrlimit(resource.RLIMIT_FSIZE, before)
  assert step > 100 and logging.read_metrics(tmp_path)[0]["loss"] == 1.0


def test_events_are_what_tensorboardx_writes(tmp_path):
  """The values of the file, read record by record: length, two checksums, an Event."""
  from tensorboardX.proto import event_pb2

  with logging.MetricWriter(tmp_path, resume_step=6) as writer:
    writer.write(7, {"eval/a/loss": 1.5, "loss": 2.0})
  (path,) = (tmp_path / "tensorboard").glob("events.out.tfevents.*")
  data, events = path.read_bytes(), []
  while data:
    (size,) = struct.unpack("Q", data[:8])
    events.append(event_pb2.Event.FromString(data[12 : 12 + size]))
    data = data[16 + size :]
  assert events[0].file_version == "brain.Event:2"
  assert (events[1].step, events[1].session_log.status) == (7, event_pb2.SessionLog.START)
  values = [(e.step, v.tag, v.simple_value) for e in events[2:] for v in e.summary.value]
  assert values == [(7, "eval/a/loss", 1.5), (7, "loss", 2.0)]


def test_a_run_whose_reader_has_gone_goes_on():
  """`| tee log`: Ctrl-C ends tee first, and the run has to save."""
  reader, writer = os.pipe()
  os.close(reader)
  stream = open(writer, "w", encoding="utf-8")
  with pytest.raises(BrokenPipeError):
    print("x", file=stream, flush=True)
  with logging.progress(3, stream=stream) as bar:
    bar.update(1, {"loss": 1.0})
    bar.update(2, {"loss": 1.0})
    bar.message("saved")
  with contextlib.suppress(BrokenPipeError):
    stream.close()
