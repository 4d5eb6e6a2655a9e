"""WARC files of HTTP responses with HTML: records, payload, main text.

The record parser is ours (ISO 28500; .warc and .warc.gz with one gzip member a record); the main
text of a page comes from trafilatura (extra `html`, data.md section 5). Other record types, other
content types and answers that are not 200 are left out and counted.
"""

import collections
import dataclasses
import gzip
import hashlib
import io
import os
import re
import zlib
from collections.abc import Callable, Iterator

from minicpm_jax.core import extras
from minicpm_jax.data import documents
from minicpm_jax.data.documents import Doc

MAX_RECORD_BYTES = 64 << 20
OnError = Callable[[documents.CorpusError], None]  # None in its place: raise
_HTML_TYPES = ("text/html", "application/xhtml+xml")
_META_CHARSET = re.compile(rb"""<meta[^>]{0,200}?charset\s*=\s*["']?\s*([\w.:-]+)""", re.I)


@dataclasses.dataclass(frozen=True)
class Record:
  """One WARC record; `headers` have lower-case names."""

  headers: dict[str, str]
  content: bytes

  @property
  def kind(self) -> str:
    return self.headers.get("warc-type", "").lower()


def read_warc(
  path: str | os.PathLike,
  *,
  extract: Callable[[str], str | None] | None = None,
  on_error: OnError | None = None,
  counts: collections.Counter | None = None,
) -> Iterator[Doc]:
  """The pages of a WARC file as documents with meta "url" and "date".

  `extract` takes HTML and returns the main text or None (default: `extract_text`). `counts`, when
  given, receives the number of records by what became of them.
  """
  extract = extract or extract_text
  counts = collections.Counter() if counts is None else counts
  seen: collections.Counter = collections.Counter()
  for number, record in enumerate(read_records(path, on_error=on_error)):
    if record.kind != "response":
      counts["not_response"] += 1
      continue
    where = f"{path}: record {number}"
    try:
      status, headers, body = http_response(record.content, where)
      if status != 200:
        counts["not_200"] += 1
        continue
      if headers.get("content-type", "").split(";")[0].strip().lower() not in _HTML_TYPES:
        counts["not_html"] += 1
        continue
      text = extract(decode_html(body, headers.get("content-type", "")))
    except documents.CorpusError as error:
      if on_error is None:
        raise
      on_error(error)
      counts["damaged"] += 1
      continue
    if not text:
      counts["no_text"] += 1
      continue
    counts["pages"] += 1
    url = record.headers.get("warc-target-uri", "").strip("<>")
    key = record.headers.get("warc-record-id", "").strip("<>") or f"{url}\0{number}"
    seen[key] += 1  # a record id that occurs twice in a file still gives two ids
    if seen[key] > 1:
      key = f"{key}\0{seen[key]}"
    yield Doc(
      id=hashlib.sha1(key.encode()).hexdigest(),
      text=text.encode("utf-8", "replace").decode(),
      source=str(path),
      meta={"url": url, "date": record.headers.get("warc-date", "")},
    )


def extract_text(html: str) -> str | None:
  """The main text of a page by trafilatura, without comments; None where it finds none."""
  trafilatura = extras.require_extra("trafilatura", extra="html")
  return trafilatura.extract(html, include_comments=False, include_tables=True, deduplicate=False)


def read_records(path: str | os.PathLike, *, on_error: OnError | None = None) -> Iterator[Record]:
  """All records in file order; a damaged file ends with CorpusError (or `on_error`)."""
  number = 0
  try:
    with open(path, "rb") as raw:
      is_gzip = raw.read(2) == b"\x1f\x8b"
      raw.seek(0)
      stream = gzip.GzipFile(fileobj=raw) if is_gzip else raw
      while (record := _read_record(stream, f"{path}: record {number}")) is not None:
        yield record
        number += 1
  except documents.CorpusError as error:
    if on_error is None:
      raise
    on_error(error)
  except (OSError, EOFError, zlib.error) as error:
    found = documents.CorpusError(f"{path}: after record {number - 1}: cannot be read ({error})")
    if on_error is None:
      raise found from None
    on_error(found)


def _read_record(stream: io.BufferedIOBase, where: str) -> Record | None:
  line = stream.readline(1 << 16)
  while line in (b"\r\n", b"\n"):
    line = stream.readline(1 << 16)
  if not line:
    return None
  if not line.startswith(b"WARC/"):
    raise documents.CorpusError(f"{where}: found {line[:20]!r}, expected a line 'WARC/1.x'")
  headers = {}
  while (line := stream.readline(1 << 16)) not in (b"\r\n", b"\n"):
    if not line:
      raise documents.CorpusError(f"{where}: the file ends inside the record's header")
    name, _, value = line.decode("utf-8", "replace").partition(":")
    headers[name.strip().lower()] = value.strip()
  length = headers.get("content-length", "")
  if not length.isdigit() or int(length) > MAX_RECORD_BYTES:
    raise documents.CorpusError(
      f"{where}: Content-Length: found {length!r}, expected 0..{MAX_RECORD_BYTES}"
    )
  content = stream.read(int(length))
  if len(content) != int(length):
    raise documents.CorpusError(f"{where}: found {len(content)} bytes, expected {length}")
  return Record(headers, content)


def http_response(content: bytes, where: str = "response") -> tuple[int, dict[str, str], bytes]:
  """(status, headers with lower-case names, body with transfer and content encodings undone)."""
  head, separator, body = content.partition(b"\r\n\r\n")
  if not separator:
    head, separator, body = content.partition(b"\n\n")
  lines = head.decode("latin-1").splitlines()
  status = lines[0].split(" ")[1:2] if lines else []
  if not separator or not status or not status[0].isdigit():
    raise documents.CorpusError(f"{where}: found {content[:30]!r}, expected an HTTP response")
  pairs = (line.partition(":") for line in lines[1:])
  headers = {name.strip().lower(): value.strip() for name, _, value in pairs}
  try:
    if headers.get("transfer-encoding", "").lower() == "chunked":
      body = _unchunk(body)
    encoding = headers.get("content-encoding", "").lower()
    if encoding in ("gzip", "x-gzip") and body[:2] == b"\x1f\x8b":
      body = _inflate(body, 31)
    elif encoding == "deflate":
      body = _inflate(body, 15 if body[:1] == b"\x78" else -15)
  except (zlib.error, ValueError) as error:
    raise documents.CorpusError(f"{where}: body: cannot be decoded ({error})") from None
  return int(status[0]), headers, body


def _inflate(body: bytes, wbits: int) -> bytes:
  out = zlib.decompressobj(wbits).decompress(body, MAX_RECORD_BYTES + 1)
  if len(out) > MAX_RECORD_BYTES:
    raise ValueError(f"more than {MAX_RECORD_BYTES} bytes")
  return out


def _unchunk(body: bytes) -> bytes:
  """The body of a chunked transfer; crawlers that undid it but kept the header are understood."""
  parts, at = [], 0
  while True:
    end = body.find(b"\r\n", at)
    size = body[at:end].split(b";")[0].strip() if end >= 0 else b""
    if not re.fullmatch(rb"[0-9a-fA-F]{1,8}", size):
      return body if not parts else b"".join(parts)
    length = int(size, 16)
    if length == 0:
      return b"".join(parts)
    parts.append(body[end + 2 : end + 2 + length])
    at = end + 2 + length + 2


def decode_html(body: bytes, content_type: str = "") -> str:
  """Text of a page: the charset of the header, else of a <meta>, else UTF-8, else cp1252."""
  header = re.search(r"charset\s*=\s*[\"']?\s*([\w.:-]+)", content_type, re.I)
  meta = _META_CHARSET.search(body[:4096])
  names = [header[1] if header else "", meta[1].decode("ascii", "replace") if meta else ""]
  for name in [*filter(None, names), "utf-8"]:
    try:
      return body.decode(name)
    except (LookupError, UnicodeDecodeError, ValueError):
      continue
  known = next((n for n in names if n and _is_codec(n)), "cp1252")
  return body.decode(known, "replace")


def _is_codec(name: str) -> bool:
  try:
    return isinstance(b"".decode(name), str)
  except (LookupError, ValueError, TypeError):
    return False
