"""A JSON list of any size as a stream of its items, of which single ones may be no text."""

from __future__ import annotations

import codecs
import json
import re
import secrets
from collections.abc import Iterator
from typing import Any, BinaryIO

import ijson

_AT_ONCE = 1 << 16
# Half of a surrogate pair by itself; other escapes are taken along, so that no escaped backslash is mistaken for the start of one.
_ESCAPES = re.compile(r"\\(?:u[dD][89abAB]..\\u[dD][c-fC-F]..|(u[dD][89a-fA-F]..)|.)", re.DOTALL)
_WITHIN_AN_ESCAPE = "\\u0123456789abcdefABCDEF"


def list_items(stream: BinaryIO) -> Iterator[Any]:
    """The items of the list that ``stream`` holds; one with bytes or escapes that are no text is the ``ValueError`` that says so.

    Raises:
        ijson.JSONError: what stands between the items is no list, or it does not end.
    """
    marked = _Marked(stream)
    for item in ijson.items(marked, "item", use_float=True):
        yield marked.refusal(item) or item


class _Marked:
    """A stream of UTF-8 in which a mark stands for each byte and escape that is no text.

    The parser would end at such a byte and put a question mark for such an escape; a mark it takes for a part of the text.
    """

    def __init__(self, stream: BinaryIO) -> None:
        self._stream = stream
        self._decoder = codecs.getincrementaldecoder("utf-8")(errors="surrogateescape")
        self._rest = ""
        # Drawn anew, so that no file can hold them.
        self._byte, self._half = f"byte {secrets.token_hex(12)}", f"half {secrets.token_hex(12)}"
        self._any = False

    def read(self, size: int = _AT_ONCE) -> bytes:
        """Some more bytes; none at the end only."""
        while size:
            raw = self._stream.read(size)
            text = self._rest + self._decoder.decode(raw, final=not raw)
            # An escape that goes on in the next piece waits for it.
            whole = text.rstrip(_WITHIN_AN_ESCAPE) if raw else text
            self._rest = text[len(whole) :]
            if whole or not raw:
                return self._with_marks(whole).encode("utf-8")
        return b""

    def _with_marks(self, text: str) -> str:
        marked = text
        if "\\ud" in text or "\\uD" in text:
            marked = _ESCAPES.sub(lambda found: self._half if found[1] else found[0], marked)
        if not marked.isascii():
            marked = re.sub("[\udc80-\udcff]+", self._byte, marked)
        self._any = self._any or marked != text
        return marked

    def refusal(self, item: Any) -> ValueError | None:
        """Why an item of the marked stream is none, or ``None``."""
        if not self._any:
            return None
        try:
            text = json.dumps(item, ensure_ascii=False)
        except (ValueError, RecursionError) as error:
            return ValueError(f"cannot be read ({type(error).__name__}: {error})")
        if self._byte in text:
            return ValueError("not UTF-8; save the file as UTF-8")
        return ValueError("not JSON (surrogates not allowed); mend the item") if self._half in text else None
