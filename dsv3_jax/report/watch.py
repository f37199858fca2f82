"""Serves the page of a run that is still training, to this machine alone."""

import contextlib
import hashlib
import html
import http.server
import os
import pathlib
import shlex
import socketserver
import threading
import time

from dsv3_jax.errors import InputError
from dsv3_jax.report import page, pictures, run_data

HOST = "127.0.0.1"
LEAST_S = 2.0  # between two pages
BUSY = 0.2  # most of a core that drawing takes from the run
_LIVE = pathlib.Path(__file__).with_name("live.html")


class LivePage:
  """The page of a run, drawn again when the files of the run have changed."""

  def __init__(self, workdir: str | os.PathLike):
    """Draws nothing yet; the workdir need not be there."""
    self._workdir = pathlib.Path(workdir)
    self._lock = threading.Lock()
    self._drawn, self._page, self._next = "", b"", 0.0

  def version(self) -> str:
    """Returns what differs once there is a newer page than before."""
    if time.monotonic() < self._next:
      return self._drawn
    digest = hashlib.sha256()
    for name in run_data.FILES:
      with contextlib.suppress(OSError):
        stat = (self._workdir / name).stat()
        digest.update(f"{name} {stat.st_mtime_ns} {stat.st_size};".encode())
    return digest.hexdigest()

  def content(self) -> bytes:
    """Returns the newest page."""
    with self._lock:
      began, version = time.monotonic(), self.version()
      if version != self._drawn:
        self._page, self._drawn = self._draw(version), version
        now = time.monotonic()
        self._next = now + max(LEAST_S, (now - began) / BUSY)
      return self._page

  def _draw(self, version: str) -> bytes:
    live = _LIVE.read_text(encoding="utf-8").replace("VERSION", version)
    try:
      run = run_data.read(self._workdir)
      text = page.to_html(run, pictures.pictures(run), live=live)
    except (InputError, OSError) as error:  # not there, or just being replaced
      text = page.fill(
        "Waiting for the first step",
        f"<p class=sub>workdir {html.escape(self._workdir.name)}</p>\n"
        f"<p>{html.escape(str(error))}</p>\n",
        live,
      )
    return text.encode(errors="replace")


class _Handler(http.server.BaseHTTPRequestHandler):
  """Answers / and /version; no path leads to a file."""

  live_page: LivePage
  timeout = 30

  def do_GET(self) -> None:
    """Sends an answer."""
    self._send(self._answer())

  def do_HEAD(self) -> None:
    """Sends the head of an answer."""
    self._send(self._answer(), head_only=True)

  def _answer(self) -> tuple[int, str, bytes]:
    # A page from elsewhere may have its name point to this machine.
    name = self.headers.get("Host", "").rpartition(":")[0]
    if name in (HOST, "localhost"):
      if self.path == "/":
        return 200, "text/html", self.live_page.content()
      if self.path == "/version":
        return 200, "text/plain", self.live_page.version().encode()
    return 404, "text/plain", b"only / is served, to localhost\n"

  def _send(
    self, answer: tuple[int, str, bytes], *, head_only: bool = False
  ) -> None:
    status, kind, body = answer
    with contextlib.suppress(ConnectionError):  # the browser has left
      self.send_response(status)
      self.send_header("Content-Type", f"{kind}; charset=utf-8")
      self.send_header("Content-Length", str(len(body)))
      self.send_header("Cache-Control", "no-store")
      self.end_headers()
      if not head_only:
        self.wfile.write(body)

  def log_message(self, *_: object) -> None:
    """Prints nothing."""


def make_server(
  workdir: str | os.PathLike, port: int
) -> http.server.ThreadingHTTPServer:
  """Opens the server of a run's page, which its `serve_forever` runs.

  Port 0 is one that the system chooses. Raises InputError if the port cannot be
  listened on.
  """
  handler = type("Handler", (_Handler,), {"live_page": LivePage(workdir)})
  try:
    return http.server.ThreadingHTTPServer((HOST, port), handler)
  except OSError as error:
    with socketserver.TCPServer((HOST, 0), handler) as other:
      free = other.server_address[1]
    raise InputError(
      f"--port={port}: cannot be served on: {error.strerror}. This one is free:"
      f" python -m scripts.report --workdir={shlex.quote(str(workdir))} --watch"
      f" --port={free}"
    ) from error
