"""Files of every kind as text, and what is wrong with them said in a line."""

from __future__ import annotations

import io
import sys
import zipfile
from pathlib import Path

import docx
import pytest
from pypdf import PdfWriter
from pypdf.generic import DecodedStreamObject, DictionaryObject, NameObject

from shine.documents import read_documents


def text_of(path: Path, **options: str) -> str:
    (document,) = read_documents([str(path)], **options)
    return document.text


def write_pdf(path: Path, lines: list[str]) -> Path:
    """One page of real PDF text operators."""
    writer = PdfWriter()
    page = writer.add_blank_page(300, 300)
    content = DecodedStreamObject()
    shown = " T* ".join(f"({line}) Tj" for line in lines)
    content.set_data(f"BT /F1 12 Tf 14 TL 20 250 Td {shown} ET".encode())
    names = {"/Type": "/Font", "/Subtype": "/Type1", "/BaseFont": "/Helvetica"}
    font = DictionaryObject({NameObject(key): NameObject(value) for key, value in names.items()})
    page[NameObject("/Resources")] = DictionaryObject({NameObject("/Font"): DictionaryObject({NameObject("/F1"): font})})
    page[NameObject("/Contents")] = writer._add_object(content)
    writer.write(path)
    return path


def test_text_and_markdown_are_taken_as_they_are(tmp_path: Path) -> None:
    for name in ("a.txt", "b.md", "c.unknown", "noending"):
        (tmp_path / name).write_text("# Ünï\n\n*x*\n", encoding="utf-8")
        assert text_of(tmp_path / name) == "# Ünï\n\n*x*\n"
    (tmp_path / "bom.txt").write_bytes(b"\xef\xbb\xbfText")
    assert text_of(tmp_path / "bom.txt") == "Text"


def test_html_gives_what_a_reader_sees(tmp_path: Path) -> None:
    page = (
        "<!doctype html><html><head><title>No</title><style>p {color: red}</style></head><body><script>var no = 1 < 2;</script>"
        "<h1>Head &amp; line</h1><p>One <b>bo</b>ld\n word.<br>Next line.</p><ul><li>first</li><li>second</li></ul>"
        "<table><tr><td>a</td><td>b</td></tr></table>&eacute;</body></html>"
    )
    (tmp_path / "page.html").write_text(page)
    assert text_of(tmp_path / "page.html") == "Head & line\n\nOne bold word.\nNext line.\n\nfirst\nsecond\n\na b\n\né"


def test_pdf(tmp_path: Path) -> None:
    assert text_of(write_pdf(tmp_path / "a.pdf", ["Zoran works as a baker.", "Umar lives in Selkirk."])).split("\n") == [
        "Zoran works as a baker.",
        "Umar lives in Selkirk.",
    ]


def test_docx_with_a_table(tmp_path: Path) -> None:
    document = docx.Document()
    document.add_heading("Title", 1)
    document.add_paragraph("Zoran works as a baker.")
    row = document.add_table(rows=1, cols=2).rows[0]
    row.cells[0].text, row.cells[1].text = "left", "right"
    document.save(str(tmp_path / "a.docx"))
    assert text_of(tmp_path / "a.docx") == "Title\n\nZoran works as a baker.\n\nleft | right"


def test_a_folder_gives_its_documents_in_order(tmp_path: Path) -> None:
    (tmp_path / "sub").mkdir()
    (tmp_path / ".hidden").mkdir()
    for name in ("b.txt", "a.md", "sub/c.html", ".hidden/d.txt", "picture.png", ".e.txt"):
        (tmp_path / name).write_text(name)
    assert [(d.name, d.text) for d in read_documents([str(tmp_path)])] == [
        ("a.md", "a.md"),
        ("b.txt", "b.txt"),
        ("sub/c.html", "sub/c.html"),
    ]


def test_standard_input(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO("Zoran ü".encode())))
    assert [(d.name, d.text) for d in read_documents(["-"])] == [("standard input", "Zoran ü")]


def test_an_encoding_can_be_said(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_bytes("Käse".encode("latin-1"))
    assert text_of(tmp_path / "a.txt", encoding="latin-1") == "Käse"
    (tmp_path / "b.txt").write_bytes("Käse".encode("utf-16"))
    assert text_of(tmp_path / "b.txt", encoding="utf-16") == "Käse"


@pytest.mark.parametrize(
    ("name", "content", "about"),
    [
        ("a.txt", b"", r"a\.txt: the file is empty; give one with text"),
        ("a.txt", b" \n\t", "there is no text in it"),
        ("a.txt", b"\x89PNG\0\0\1", "a binary file, not text; give text, Markdown, HTML, PDF or DOCX"),
        ("a.txt", "Käse".encode("latin-1"), r"not utf-8 \(byte 0xe4 at 1\); say its encoding, for instance --encoding cp1252"),
        ("a.pdf", b"%PDF-1.7 nothing", "not a PDF that can be read"),
        ("a.pdf", b"plain text", "not a PDF that can be read"),
        ("a.docx", b"PK nothing", "not a DOCX file that can be read"),
        ("a.html", b"<html><head><title>x</title></head><body></body></html>", "there is no text in it"),
    ],
)
def test_what_is_wrong_is_said_in_one_line(tmp_path: Path, name: str, content: bytes, about: str) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(ValueError, match=about) as error:
        read_documents([str(tmp_path / name)])
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("damage", ["xml", "deflate", "no part"])
def test_a_damaged_docx_is_one_line(tmp_path: Path, damage: str) -> None:
    document = docx.Document()
    document.add_paragraph("Zoran works as a baker. " * 50)
    document.save(str(tmp_path / "good.docx"))
    with zipfile.ZipFile(tmp_path / "good.docx") as good, zipfile.ZipFile(tmp_path / "a.docx", "w", zipfile.ZIP_DEFLATED) as bad:
        for info in good.infolist():
            content = good.read(info)
            if info.filename == "word/document.xml" and damage == "xml":
                content = content[: len(content) // 2]
            if info.filename != "word/document.xml" or damage != "no part":
                bad.writestr(info.filename, content)
        place = bad.getinfo("word/document.xml").header_offset if damage == "deflate" else None
    if place is not None:
        content = bytearray((tmp_path / "a.docx").read_bytes())
        content[place + 60 : place + 120] = bytes(byte ^ 0xFF for byte in content[place + 60 : place + 120])
        (tmp_path / "a.docx").write_bytes(bytes(content))
    with pytest.raises(ValueError, match=r"a\.docx: not a DOCX file that can be read \(.+\); save it again") as error:
        read_documents([str(tmp_path / "a.docx")])
    assert "\n" not in str(error.value)


def test_a_pdf_whose_parser_stumbles_is_one_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_pdf(tmp_path / "a.pdf", ["Zoran"])

    def stumble(*_: object, **__: object) -> str:
        raise IndexError

    monkeypatch.setattr("pypdf.PageObject.extract_text", stumble)
    with pytest.raises(ValueError, match=r"a\.pdf: not a PDF that can be read \(IndexError\); save it again"):
        read_documents([str(tmp_path / "a.pdf")])


def test_a_scanned_pdf_has_no_text(tmp_path: Path) -> None:
    writer = PdfWriter()
    writer.add_blank_page(100, 100)
    writer.write(tmp_path / "scan.pdf")
    with pytest.raises(ValueError, match=r"scan\.pdf: there is no text.*OCR"):
        read_documents([str(tmp_path / "scan.pdf")])


def test_fifty_megabytes_are_refused_before_they_are_read(tmp_path: Path) -> None:
    with (tmp_path / "big.txt").open("wb") as file:
        file.truncate(50_000_000)
    with pytest.raises(ValueError, match=r"big\.txt: 50 MB, at most 10 MB are read: give the part that matters"):
        read_documents([str(tmp_path / "big.txt")])


@pytest.mark.parametrize(("path", "about"), [("absent.txt", "no such file or folder"), ("empty", "no document in this folder")])
def test_what_is_not_there(tmp_path: Path, path: str, about: str) -> None:
    (tmp_path / "empty").mkdir()
    with pytest.raises(ValueError, match=about):
        read_documents([str(tmp_path / path)])


@pytest.mark.parametrize(("suffix", "module"), [(".pdf", "pypdf"), (".docx", "docx")])
def test_without_the_extra_its_name_is_said(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, suffix: str, module: str) -> None:
    (tmp_path / f"a{suffix}").write_bytes(b"x")
    monkeypatch.setitem(sys.modules, module, None)
    with pytest.raises(ValueError, match=r"pip install 'shine-hypernetwork\[documents\]'"):
        read_documents([str(tmp_path / f"a{suffix}")])
