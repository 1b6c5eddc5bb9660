"""What ``shine data indexes`` shows and removes."""

from __future__ import annotations

import json
import time

from rich.console import Console
from rich.table import Table

from shine.data.index import Index, index_folder, list_indexes, prune
from shine.downloads import size_of

DAY = 86_400.0


def show_indexes(*, as_json: bool) -> None:
    """List what there is."""
    found, now = list_indexes(), time.time()
    if as_json:
        print(json.dumps([{**_row(index), "last_used_days": (now - index.used) / DAY} for index in found], indent=2))
        return
    if found:
        table = Table("index", "stage", "made from", box=None, pad_edge=False, header_style="bold")
        for column in ("size", "last used"):
            table.add_column(column, justify="right")
        for index in found:
            made = "\n".join(index.sources) if index.whole else "half-written, or of another version"
            table.add_row(index.folder.name, index.stage, made, size_of(index.size), _ago(now - index.used))
        Console(width=None if Console().is_terminal else 160, highlight=False).print(table)
    print(f"{len(found):,} indexes in {index_folder()}, {size_of(sum(index.size for index in found))}")


def prune_indexes(days: float, *, as_json: bool) -> None:
    """Remove what was not used for so many days, but for what a process has open."""
    if days < 0:
        raise ValueError(f"--prune {days:g}: a number of days, zero or more")
    removed, kept = prune(days * DAY, now=time.time())
    if as_json:
        print(json.dumps({"removed": [_row(index) for index in removed], "in_use": [_row(index) for index in kept]}, indent=2))
        return
    print(f"{len(removed):,} indexes removed, {size_of(sum(index.size for index in removed))}")
    for index in kept:
        print(f"left: {index.folder.name}, which a process has open")


def _row(index: Index) -> dict[str, object]:
    return {"folder": str(index.folder), "size": index.size, "stage": index.stage, "sources": index.sources}


def _ago(seconds: float) -> str:
    if seconds < DAY:
        return "today" if seconds >= 3600 else "just now"
    return f"{seconds / DAY:.0f} days ago"
