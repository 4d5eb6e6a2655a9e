"""The chat page in headless Chromium, driven over WebDriver (plain HTTP to chromedriver)."""

import base64
import os
import pathlib
import shutil
import socket
import subprocess
import time

import pytest

httpx = pytest.importorskip("httpx")
FLAGS = """--headless --no-sandbox --disable-gpu --disable-quic --no-first-run
--disable-background-networking --disable-component-update --disable-sync
--window-size=900,700""".split()
ELEMENT = "element-6066-11e4-a52e-4f735466cecf"  # the key of WebDriver's element ids
ENTER = "\ue007"


class Browser:
  """The little of WebDriver that the test needs."""

  def __init__(self, driver_url, binary, profile):
    options = {"binary": binary, "args": [*FLAGS, f"--user-data-dir={profile}"]}
    body = {"capabilities": {"alwaysMatch": {"goog:chromeOptions": options}}}
    self._url = driver_url
    self._session = self._post("/session", body)["sessionId"]

  def _post(self, path, body):
    response = httpx.post(self._url + path, json=body, timeout=60)
    value = response.json()["value"]
    assert response.status_code == 200, value
    return value

  def _command(self, path, body):
    return self._post(f"/session/{self._session}{path}", body)

  def open(self, url):
    self._command("/url", {"url": url})

  def script(self, text):
    return self._command("/execute/sync", {"script": text, "args": []})

  def _find(self, css):
    return self._command("/element", {"using": "css selector", "value": css})[ELEMENT]

  def type(self, css, text):
    self._command(f"/element/{self._find(css)}/value", {"text": text})

  def click(self, css):
    self._command(f"/element/{self._find(css)}/click", {})

  def texts(self, css):
    return self.script(f"return [...document.querySelectorAll('{css}')].map(e => e.textContent)")

  def wait(self, condition):
    """Until the expression is true in the page."""
    for _ in range(1500):
      if self.script(f"return Boolean({condition})"):
        return
      time.sleep(0.02)
    raise AssertionError(f"never came true: {condition}; {self.texts('.turn')}")

  def screenshot(self):
    url = f"{self._url}/session/{self._session}/screenshot"
    return base64.b64decode(httpx.get(url, timeout=60).json()["value"])

  def close(self):
    httpx.delete(f"{self._url}/session/{self._session}", timeout=60)


@pytest.fixture
def browser(tmp_path):
  binary = shutil.which("chromium") or shutil.which("chromium-browser")
  driver = shutil.which("chromedriver")
  if binary is None or driver is None:
    missing = "chromium" if binary is None else "chromedriver"
    pytest.skip(f"no {missing}: apt-get install chromium chromium-driver")
  with socket.socket() as free:
    free.bind(("127.0.0.1", 0))
    port = free.getsockname()[1]
  process = subprocess.Popen(
    [driver, f"--port={port}"], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
  )
  url = f"http://127.0.0.1:{port}"
  try:
    for _ in range(500):
      try:
        if httpx.get(url + "/status").json()["value"]["ready"]:
          break
      except httpx.TransportError:
        time.sleep(0.02)
    page = Browser(url, binary, tmp_path / "profile")
    yield page
    page.close()
  finally:
    process.terminate()
    process.wait()


def test_the_page_streams_stops_and_reports_errors(serve_scripted, browser):
  steps = {"next": 0}  # how many pieces the engine may say

  def script(request):
    question = bytes(t for t in request.prompt if t < 256).decode()
    if question.endswith("[u]first[a]"):
      pieces = ["<b>one</b> ", "twö ", "🙂"]
    elif question.endswith("[u]endless[a]"):
      pieces = ["and "] * 10_000
    else:
      pieces = ["last"]
    for number, piece in enumerate(pieces):
      while steps["next"] <= number:
        time.sleep(0.005)
        yield []
      yield list(piece.encode())
    yield [257]

  url, engine, chat = serve_scripted(script)
  browser.open(url)
  browser.wait("document.querySelector('#model').textContent === 'tiny'")
  browser.type("#prompt", "first" + ENTER)
  # It streams: the first piece is shown while the engine has not said the second.
  steps["next"] = 1
  browser.wait("document.querySelector('.assistant')?.textContent === '<b>one</b> '")
  assert browser.script("return document.querySelector('#send').disabled")
  steps["next"] = 3
  browser.wait("document.querySelector('#status').textContent.includes('new tokens')")
  assert browser.texts(".turn") == ["first", "<b>one</b> twö 🙂"]
  assert not browser.script("return document.querySelector('.turn b')")  # text, never HTML
  if folder := os.environ.get("MINICPM_JAX_SCREENSHOTS"):
    pathlib.Path(folder, "chat_page.png").write_bytes(browser.screenshot())

  # Stop frees the row; what was said stays, and the next question carries the conversation.
  browser.type("#prompt", "endless")
  browser.click("#send")
  browser.wait("document.querySelectorAll('.assistant')[1]?.textContent.includes('and and')")
  browser.click("#stop")
  browser.wait("document.querySelector('#status').textContent === 'stopped'")
  while chat.num_running:
    time.sleep(0.01)
  assert len(engine.cancelled) == 1
  browser.type("#system", "Be kind")
  browser.type("#prompt", "third" + ENTER)
  browser.wait("document.querySelectorAll('.assistant')[2]?.textContent === 'last'")
  prompt = bytes(t for t in engine.requests[-1].prompt if t < 256).decode()
  assert prompt.startswith("[s]Be kind[u]first[a]<b>one</b> twö 🙂[u]endless[a]and and")

  # An error is shown, the question can be asked again.
  browser.script("document.querySelector('#temperature').value = 9")
  browser.type("#prompt", "fourth" + ENTER)
  browser.wait("document.querySelector('.error')?.textContent.startsWith('temperature: found 9')")
  assert browser.script("return messages.length") == 6
  browser.click("#clear")
  assert browser.texts(".turn") == []
