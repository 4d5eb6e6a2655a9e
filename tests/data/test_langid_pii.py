"""Language id on real text, PII masks against addresses and numbers made by rule."""

import ipaddress

import hypothesis
import hypothesis.strategies as st
import pytest

from minicpm_jax.data import documents, langid, pii


def _docs(*texts, lang=""):
  return [documents.Doc(id=str(i), text=t, lang=lang) for i, t in enumerate(texts)]


def test_languages_of_real_text(shared_dir):
  pytest.importorskip("py3langid")
  folder = shared_dir / "data/mini/pretrain"
  for name, lang in (("en_wiki_squad", "en"), ("zh_wiki_cmrc", "zh")):
    docs = list(documents.read([folder / f"{name}.jsonl.gz"]))
    out = list(langid.LanguageFilter()(docs))
    right = [o for o in out if isinstance(o, documents.Doc) and o.lang == lang]
    assert len(right) >= 0.97 * len(docs)


def test_other_and_uncertain_languages_are_dropped():
  pytest.importorskip("py3langid")
  german = "Die Würde des Menschen ist unantastbar. Sie zu achten ist Verpflichtung aller Gewalt."
  stage = langid.LanguageFilter()
  other, unsure = stage(_docs(german, "1 2 3"))
  assert other.reason == "other_language" and other.detail.startswith("de 0.9")
  assert isinstance(unsure, documents.Dropped)
  (kept,) = langid.LanguageFilter(languages=())(_docs(german))
  assert kept.lang == "de"
  (kept,) = langid.LanguageFilter(languages=("de",), trust_given=True)(_docs("?", lang="de"))
  assert kept.lang == "de"


@pytest.mark.smoke
@pytest.mark.parametrize(
  "text, masked",
  [
    ("mail jane.doe+x@mail.example-site.co.uk now", "mail email@example.com now"),
    ("邮箱:li@qq.com。", "邮箱:email@example.com。"),
    ("a@b, @name, user@localhost", None),
    ("host 8.8.8.8:53", "host 192.0.2.1:53"),
    ("private 192.168.0.1, 10.0.0.7, 127.0.0.1", None),
    ("version 1.2.3.4.5 and 300.1.1.1", None),
    ("call +1 (415) 555-2671 today", "call <phone> today"),
    ("手机13812345678，", "手机<phone>，"),
    ("tel 138-1234-5678.", "tel <phone>."),
    ("order 113812345678 and 12812345678", None),
    ("price +12", None),
    ("身份证11010519491231002X。", "身份证<id-number>。"),  # the example of GB 11643
    ("number 110105194912310021", None),  # wrong check digit
    ("example.com: email@example.com", None),
  ],
)
def test_masks(text, masked):
  found, counts = pii.mask(text)
  assert found == (masked or text)
  assert sum(counts.values()) == (0 if masked is None else 1)


def test_kinds_and_counts():
  text = "a@b.org 9.9.9.9 c@d.org"
  (doc,) = pii.MaskPII(kinds=("email",))(_docs(text))
  assert doc.text == "email@example.com 9.9.9.9 email@example.com"
  assert doc.meta == {"pii": {"email": 2}}
  clean = _docs("nothing here")
  assert list(pii.MaskPII()(clean)) == clean


@hypothesis.settings(max_examples=25, deadline=None, derandomize=True)
@hypothesis.given(st.integers(0, 2**32 - 1), st.text(alphabet="ab1.@+- \n中", max_size=30))
def test_every_public_address_is_masked_and_masking_is_idempotent(number, noise):
  address = ipaddress.IPv4Address(number)
  text, counts = pii.mask(f"{noise} {address} ")
  if address.is_global:
    assert str(address) not in text and counts["ip"] >= 1
  assert pii.mask(text)[0] == text


@hypothesis.settings(max_examples=25, deadline=None, derandomize=True)
@hypothesis.given(st.dates(), st.integers(0, 999), st.integers(110000, 659000))
def test_identity_numbers_with_their_check_digit(date, serial, region):
  """The check digit makes sum(2**i * digit_i) = 1 mod 11, counted from the right (ISO 7064)."""
  date = date.replace(year=1900 + date.year % 120)
  body = f"{region}{date:%Y%m%d}{serial:03d}"
  for check in "0123456789X":
    digits = [10 if c == "X" else int(c) for c in reversed(body + check)]
    is_valid = sum(2**i * d for i, d in enumerate(digits)) % 11 == 1
    text = pii.mask(f"号码{body}{check}。", kinds=("cn_id",))[0]
    assert text == ("号码<id-number>。" if is_valid else f"号码{body}{check}。")
