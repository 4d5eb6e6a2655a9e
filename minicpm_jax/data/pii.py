"""Masks personal data that has a fixed form: e-mail and IP addresses, phone and identity numbers.

Regular expressions with a check where the form has one, so names and postal addresses stay. The
masks are constants (addresses reserved for documentation), so masking twice changes nothing.
"""

import dataclasses
import ipaddress
import re
from collections.abc import Callable, Iterable, Iterator
from typing import ClassVar, Literal

from minicpm_jax.config import validate
from minicpm_jax.data.documents import Doc, Dropped

Kind = Literal["email", "ip", "phone", "cn_id"]

MASKS: dict[str, str] = {
  "email": "email@example.com",
  "ip": "192.0.2.1",  # RFC 5737
  "phone": "<phone>",
  "cn_id": "<id-number>",
}
_PATTERNS = {
  "email": re.compile(
    r"(?<![\w.+-])[A-Za-z0-9_%+-]+(?:\.[A-Za-z0-9_%+-]+)*@(?:[A-Za-z0-9-]+\.)+[A-Za-z]{2,24}(?![\w-])",
    re.ASCII,
  ),
  "ip": re.compile(r"(?<![\w.])(?:\d{1,3}\.){3}\d{1,3}(?!\w|\.\d)", re.ASCII),
  # An international number (+ and 8 to 15 digits), or a Chinese mobile number.
  "phone": re.compile(
    r"(?<![\w+.-])(?:\+\d{1,3}(?:[ -]?\(?\d{1,4}\)?){2,5}|(?:86[ -]?)?1[3-9]\d[ -]?\d{4}[ -]?\d{4})"
    r"(?![\w]|-\d|\.\d)",
    re.ASCII,
  ),
  "cn_id": re.compile(r"(?<!\w)[1-9]\d{5}(?:19|20)\d{9}[\dXx](?!\w)", re.ASCII),
}
_ORDER = ("email", "ip", "cn_id", "phone")
_ID_WEIGHTS = (7, 9, 10, 5, 8, 4, 2, 1, 6, 3, 7, 9, 10, 5, 8, 4, 2)
_LETTERS_NEEDED = {"email": "@", "ip": ".", "phone": "", "cn_id": ""}


def mask(text: str, kinds: Iterable[Kind] = _ORDER) -> tuple[str, dict[str, int]]:
  """The text with every find replaced by its mask, and the number of finds by kind."""
  wanted, found = set(kinds), {}
  for kind in _ORDER:
    if kind not in wanted or _LETTERS_NEEDED[kind] not in text:
      continue
    check, count = _CHECKS[kind], 0

    def replace(match: re.Match, kind=kind, check=check) -> str:
      nonlocal count
      if not check(match.group()):
        return match.group()
      count += 1
      return MASKS[kind]

    text = _PATTERNS[kind].sub(replace, text)
    if count:
      found[kind] = count
  return text, found


@dataclasses.dataclass(frozen=True, kw_only=True)
class MaskPII:
  """Masks the text; the number of finds goes to meta["pii"]. Drops nothing."""

  name: ClassVar[str] = "pii"
  kinds: tuple[Kind, ...] = _ORDER

  def __post_init__(self):
    validate.require_hints(self, "pii.")

  def __call__(self, docs: Iterable[Doc]) -> Iterator[Doc | Dropped]:
    for doc in docs:
      text, found = mask(doc.text, self.kinds)
      yield dataclasses.replace(doc, text=text, meta={**doc.meta, "pii": found}) if found else doc


def _is_personal_email(text: str) -> bool:
  return not text.lower().endswith(("@example.com", "@example.org", "@example.net"))


def _is_public_ip(text: str) -> bool:
  try:
    return ipaddress.ip_address(text).is_global
  except ValueError:
    return False  # an octet over 255 or with a leading zero: a version number, not an address


def _is_phone(text: str) -> bool:
  return 8 <= sum(map(str.isdigit, text)) <= 15


def _is_cn_id(text: str) -> bool:
  """The check digit of GB 11643 and a possible month and day."""
  total = sum(w * int(d) for w, d in zip(_ID_WEIGHTS, text, strict=False))
  is_date = 1 <= int(text[10:12]) <= 12 and 1 <= int(text[12:14]) <= 31
  return is_date and "10X98765432"[total % 11] == text[-1].upper()


_CHECKS: dict[str, Callable[[str], bool]] = {
  "email": _is_personal_email,
  "ip": _is_public_ip,
  "phone": _is_phone,
  "cn_id": _is_cn_id,
}
