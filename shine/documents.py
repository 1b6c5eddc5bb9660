"""What a user calls a document: text, Markdown, HTML, PDF, DOCX, standard input, a folder of these. Read as plain text."""

from __future__ import annotations

import re
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from html.parser import HTMLParser
from pathlib import Path

LARGEST = 10_000_000
"""Bytes of a document: 50 times a long novel's chapter, and already thousands of pieces."""
STANDARD_INPUT = "-"
_EXTRA = "pip install 'shine-hypernetwork[documents]'"


@dataclass(frozen=True)
class Document:
    """A text and what it is called: the file's name."""

    name: str
    text: str


def read_documents(paths: Sequence[str], *, encoding: str = "utf-8") -> list[Document]:
    """The documents at these paths; a folder gives every document in it, in the order of their names.

    Args:
        paths: files, folders, or ``-`` for standard input.
        encoding: of plain text, Markdown and HTML.

    Raises:
        ValueError: a path is not there, a document is empty, too large, binary, or of another encoding; with the remedy.
    """
    return [document for path in paths for document in _read(path, encoding)]


def _read(path: str, encoding: str) -> list[Document]:
    if path == STANDARD_INPUT:
        return [_checked(Document("standard input", _decode(sys.stdin.buffer.read(LARGEST + 1), "standard input", encoding)))]
    place = Path(path).expanduser()
    if not place.exists():
        raise ValueError(f"{path}: no such file or folder; give a text to read, or - for standard input")
    if not place.is_dir():
        return [read_document(place, encoding=encoding)]
    inside = sorted(f for f in place.rglob("*") if f.is_file() and f.suffix.lower() in SUFFIXES and not _hidden(f, place))
    if not inside:
        raise ValueError(f"{path}: no document in this folder (looked for {', '.join(sorted(SUFFIXES))})")
    found = [read_document(file, encoding=encoding) for file in inside]
    return [Document(str(file.relative_to(place)), document.text) for file, document in zip(inside, found, strict=True)]


def _hidden(file: Path, folder: Path) -> bool:
    return any(part.startswith(".") for part in file.relative_to(folder).parts)


def read_document(file: Path, *, encoding: str = "utf-8") -> Document:
    """One file as text; a suffix that is not known means plain text.

    Raises:
        ValueError: see `read_documents`.
    """
    if not file.is_file():
        raise ValueError(f"{file}: not a plain file (a pipe or device); give - and send it to standard input")
    size = file.stat().st_size
    if size > LARGEST:
        raise ValueError(f"{file}: {size / 1e6:,.0f} MB, at most {LARGEST / 1e6:.0f} MB are read: give the part that matters")
    if size == 0:
        raise ValueError(f"{file}: the file is empty; give one with text in it")
    return _checked(Document(file.name, SUFFIXES.get(file.suffix.lower(), _plain)(file, encoding)))


def _checked(document: Document) -> Document:
    if not document.text.strip():
        raise ValueError(f"{document.name}: there is no text in it; give one with text (a scanned PDF needs OCR first)")
    if len(document.text) > LARGEST:
        raise ValueError(f"{document.name}: more than {LARGEST:,} characters of text: give the part that matters")
    return document


def _decode(content: bytes, name: str, encoding: str) -> str:
    if len(content) > LARGEST:
        raise ValueError(f"{name}: more than {LARGEST / 1e6:.0f} MB, which is the most that is read: give the part that matters")
    if b"\0" in content[:8192] and not encoding.lower().startswith(("utf-16", "utf-32", "utf16", "utf32")):
        raise ValueError(f"{name}: a binary file, not text; give text, Markdown, HTML, PDF or DOCX (--encoding for UTF-16)")
    try:
        return content.decode("utf-8-sig" if encoding.lower() in ("utf-8", "utf8") else encoding)
    except LookupError:
        raise ValueError(f"{encoding!r} is no text encoding: try utf-8, latin-1 or cp1252") from None
    except UnicodeDecodeError as error:
        raise ValueError(
            f"{name}: not {encoding} (byte 0x{content[error.start]:02x} at {error.start:,}); say its encoding, for instance "
            "--encoding cp1252, or save it as UTF-8"
        ) from None


def _plain(file: Path, encoding: str) -> str:
    return _decode(file.read_bytes(), str(file), encoding)


def _html(file: Path, encoding: str) -> str:
    parser = _Text()
    parser.feed(_plain(file, encoding))
    parser.close()
    return parser.text()


class _Text(HTMLParser):
    """The text of a page: blocks are paragraphs, what is not shown is left out."""

    UNSEEN = frozenset(("head", "script", "style", "template", "noscript"))
    INLINE = frozenset(
        re.findall(
            r"\w+", "a abbr b bdi bdo cite code data dfn em font i kbd mark q s samp small span strong sub sup time u var wbr"
        )
    )

    def __init__(self) -> None:
        super().__init__(convert_charrefs=True)
        self.parts: list[str] = []
        self.unseen: list[str] = []

    def handle_starttag(self, tag: str, attrs: object) -> None:
        # A body ends a head that was never closed.
        if tag == "body":
            self.unseen.clear()
        if tag in self.UNSEEN:
            self.unseen.append(tag)
        elif tag not in self.INLINE:
            self.parts.append("\n" if tag in ("br", "tr", "li") else " " if tag in ("td", "th") else "\n\n")

    def handle_endtag(self, tag: str) -> None:
        if tag in self.unseen:
            del self.unseen[self.unseen.index(tag) :]
        elif tag not in self.INLINE | {"td", "th", "tr", "li"}:
            self.parts.append("\n\n")

    def handle_data(self, data: str) -> None:
        if not self.unseen:
            self.parts.append(re.sub(r"\s+", " ", data))

    def text(self) -> str:
        lines = (re.sub(r" +", " ", line).strip() for line in "".join(self.parts).split("\n"))
        return re.sub(r"\n{3,}", "\n\n", "\n".join(lines)).strip()


def _pdf(file: Path, _encoding: str) -> str:
    try:
        from pypdf import PdfReader
    except ImportError:
        raise ValueError(f"{file}: reading PDF takes an extra: {_EXTRA}") from None
    try:
        return "\n\n".join(page.extract_text() for page in PdfReader(file).pages)
    # Damage surfaces as whatever the parser stumbles over.
    except Exception as error:
        raise ValueError(f"{file}: not a PDF that can be read ({_said(error)}); save it again, or give its text") from None


def _docx(file: Path, _encoding: str) -> str:
    try:
        import docx
        from docx.table import Table
    except ImportError:
        raise ValueError(f"{file}: reading DOCX takes an extra: {_EXTRA}") from None
    try:
        blocks = docx.Document(str(file)).iter_inner_content()
        return "\n\n".join(
            "\n".join(" | ".join(cell.text for cell in row.cells) for row in block.rows) if isinstance(block, Table) else block.text
            for block in blocks
        )
    except Exception as error:
        raise ValueError(f"{file}: not a DOCX file that can be read ({_said(error)}); save it again, or give its text") from None


def _said(error: Exception) -> str:
    return next(iter(str(error).splitlines()), "") or type(error).__name__


SUFFIXES: dict[str, Callable[[Path, str], str]] = {
    ".txt": _plain,
    ".text": _plain,
    ".md": _plain,
    ".markdown": _plain,
    ".html": _html,
    ".htm": _html,
    ".pdf": _pdf,
    ".docx": _docx,
}
"""What is taken from a folder, and how each kind is read."""
