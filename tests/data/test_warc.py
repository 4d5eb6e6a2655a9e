"""WARC files: real ones, and small ones written here byte by byte."""

import collections
import gzip
import zlib

import pytest

from minicpm_jax.data import documents, tolerant, warc

PAGE = "<html><body><p>Grüße: {} </p></body></html>"


def record(http: bytes, kind="response", uri="http://a/", rid="<urn:uuid:1>") -> bytes:
  head = f"WARC/1.0\r\nWARC-Type: {kind}\r\nWARC-Target-URI: {uri}\r\nWARC-Record-ID: {rid}\r\n"
  head += f"WARC-Date: 2024-01-01T00:00:00Z\r\nContent-Length: {len(http)}\r\n\r\n"
  return head.encode() + http + b"\r\n\r\n"


def http(body: bytes, *headers: str, status="200 OK", kind="text/html") -> bytes:
  lines = [f"HTTP/1.1 {status}", f"Content-Type: {kind}", *headers]
  return "\r\n".join(lines).encode() + b"\r\n\r\n" + body


def write(path, *records):
  path.write_bytes(b"".join(gzip.compress(r) if path.suffix == ".gz" else r for r in records))
  return path


BODY = PAGE.format("x").encode()
CHUNKED = (
  b"5\r\n" + BODY[:5] + b"\r\n" + b"%x;ext\r\n" % len(BODY[5:]) + BODY[5:] + b"\r\n0\r\n\r\n"
)


@pytest.mark.smoke
@pytest.mark.parametrize("name", ["a.warc", "a.warc.gz"])
@pytest.mark.parametrize(
  "answer",
  [
    http(BODY),
    http(CHUNKED, "Transfer-Encoding: chunked"),
    http(BODY, "Transfer-Encoding: chunked"),  # undone by the crawler, header left
    http(gzip.compress(BODY), "Content-Encoding: gzip"),
    http(zlib.compress(BODY), "Content-Encoding: deflate"),
    http(PAGE.format("x").encode("latin-1"), kind="text/html; charset=ISO-8859-1"),
    http(b'<meta charset="latin1">' + PAGE.format("x").encode("latin-1")),
    http(PAGE.format("x").encode("cp1252")),  # no charset named, no UTF-8
    http(BODY, kind="text/html; charset=klingon"),
  ],
)
def test_bodies_are_decoded(tmp_path, name, answer):
  def extract(html):
    return html.split("<p>")[1].split("</p>")[0].strip()

  (doc,) = warc.read_warc(write(tmp_path / name, record(answer)), extract=extract)
  assert doc.text == "Grüße: x"
  assert doc.meta == {"url": "http://a/", "date": "2024-01-01T00:00:00Z"}


@pytest.mark.smoke
def test_what_is_left_out_is_counted(tmp_path):
  path = write(
    tmp_path / "a.warc",
    record(b"software: x", kind="warcinfo"),
    record(http(BODY, status="404 Not Found")),
    record(http(b"\xff\xd8", kind="image/jpeg")),
    record(http(BODY)),
    record(http(b"")),
    record(http(BODY)),  # the same record id again
  )
  counts = collections.Counter()
  docs = list(warc.read_warc(path, extract=lambda html: html or None, counts=counts))
  assert counts == {"not_response": 1, "not_200": 1, "not_html": 1, "pages": 2, "no_text": 1}
  assert len({doc.id for doc in docs}) == 2
  again = list(warc.read_warc(path, extract=lambda html: html or None))
  assert docs == again


def test_damage_is_named_and_the_rest_is_read(tmp_path):
  good = record(http(BODY))
  path = write(tmp_path / "a.warc", good, record(b"not http"), good)
  with pytest.raises(documents.CorpusError, match=r"a\.warc: record 1: .*HTTP response"):
    list(warc.read_warc(path, extract=str))
  errors = []
  assert len(list(warc.read_warc(path, extract=str, on_error=errors.append))) == 2
  assert len(errors) == 1
  for data, message in (
    (good + good[:60], "the file ends inside the record's header"),
    (good + good[:-40], "found 52 bytes, expected 88"),
    (good + b"junk\r\n", "expected a line 'WARC/1.x'"),
  ):
    path.write_bytes(data)
    with pytest.raises(documents.CorpusError, match=message):
      list(warc.read_warc(path, extract=str))
  path = tmp_path / "b.warc.gz"
  path.write_bytes(gzip.compress(good) + gzip.compress(good)[:-20])
  with pytest.raises(documents.CorpusError, match=r"b\.warc\.gz: .*cannot be read"):
    list(warc.read_warc(path, extract=str))


def test_tolerant_reading_goes_on_after_a_damaged_page(tmp_path):
  pytest.importorskip("trafilatura")
  body = PAGE.format("a text that is long enough to be the main text of a page. " * 20).encode()
  pages = [record(http(body), uri=f"http://{i}/", rid=f"<urn:uuid:{i}>") for i in range(2)]
  path = write(tmp_path / "a.warc", pages[0], record(b"not http"), pages[1], b"junk\r\n")
  items = list(tolerant.Reader()(path))
  assert [type(item) for item in items] == [documents.Doc] + [documents.Dropped] + [
    documents.Doc
  ] + [documents.Dropped]
  assert [item.meta["url"] for item in items[::2]] == ["http://0/", "http://1/"]
  assert all(item.reason == "unreadable" for item in items[1::2])
  assert "record 1" in items[1].detail and "expected a line 'WARC/1.x'" in items[3].detail


def test_real_pages(shared_dir):
  pytest.importorskip("trafilatura")
  counts = collections.Counter()
  folder = shared_dir / "data" / "warc"
  for name in ("sample-0000.warc.gz", "sample-0001.warc.gz"):
    docs = list(warc.read_warc(folder / name, counts=counts))
    assert all("<div" not in doc.text and doc.meta["url"].startswith("http") for doc in docs)
  assert counts["pages"] == 22 + 15  # the README's number of HTML responses
  read = list(documents.read([folder]))
  assert len(read) == 37 and any("Creative Commons" in doc.text for doc in read)
  tolerated = list(tolerant.Reader()(folder / "sample-0001.warc.gz"))
  assert [doc.id for doc in tolerated] == [doc.id for doc in docs]
