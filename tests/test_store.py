"""A folder of adapters by name."""

from __future__ import annotations

import threading
from pathlib import Path

import pytest
import torch

from shine import LoRA, Store
from shine.provenance import ContextRecord, ModelRecord, Provenance, sha256


def adapter(text: str, *, rank: int = 2, seed: int | None = None) -> LoRA:
    """Random weights with the record of a context."""
    torch.manual_seed(len(text) if seed is None else seed)
    context = ContextRecord(sha256(text), len(text), len(text), len(text), name=text)
    record = Provenance(
        context, rank, ModelRecord("h", "1-2"), ModelRecord("b", "1-2-3"), {"shine": "0"}, "2026-01-01T00:00:00+00:00"
    )
    return LoRA({path: (torch.randn(1, 6, rank), torch.randn(1, rank, 5)) for path in ("x.q", "x.k")}, ((record,),))


def update(lora: LoRA) -> dict[str, torch.Tensor]:
    return {path: (a @ b)[0] for path, (a, b) in lora.items()}


def names(folder: Path) -> list[str]:
    return sorted(str(file.relative_to(folder)) for file in folder.rglob("*") if file.is_file() and file.name != ".lock")


@pytest.fixture
def store(tmp_path: Path) -> Store:
    return Store(tmp_path / "store")


def test_what_is_added_is_listed_and_loaded(store: Store) -> None:
    assert store.list() == []
    store.add("notes", adapter("a"))
    entry = store.add("handbook", adapter("bb"))
    assert (entry.name, entry.version, entry.folder) == ("handbook", 1, store.folder / "handbook" / "1")
    assert [(e.name, e.provenance[0].context.name) for e in store.list()] == [("handbook", "bb"), ("notes", "a")]
    for path, matrix in update(store.load("notes")).items():
        torch.testing.assert_close(matrix, update(adapter("a"))[path])


def test_an_update_is_a_new_version_at_a_new_path(store: Store) -> None:
    store.add("notes", adapter("a"))
    assert store.update("notes", adapter("bb")).version == 2
    assert store.update("notes", adapter("ccc")).folder == store.folder / "notes" / "3"
    assert store.load("notes").provenance[0][0].context.name == "ccc"
    assert store.load("notes", version=1).provenance[0][0].context.name == "a"
    # The same text again is no new version, a stronger one is.
    assert store.update("notes", adapter("ccc")).version == 3
    assert store.update("notes", adapter("ccc").scale(0.5)).version == 4


def test_one_of_the_composed_is_replaced(store: Store) -> None:
    for name in ("one", "two", "three"):
        store.add(name, adapter(name))
    before = store.compose(["one", "two", "three"])
    assert before.rank == 6
    assert [span.context.name for span in before.provenance[0]] == ["one", "two", "three"]
    new = adapter("second", rank=3)
    store.update("two", new)
    after = store.compose(["one", "two", "three"])
    for path in before:
        wanted = update(before)[path] - update(adapter("two"))[path] + update(new)[path]
        torch.testing.assert_close(update(after)[path], wanted, atol=1e-5, rtol=1e-5)


def test_forgetting_leaves_nothing_of_it(store: Store) -> None:
    store.add("notes", adapter("a"))
    store.add("other", adapter("bb"))
    store.update("notes", adapter("ccc"))
    store.forget("notes")
    assert names(store.folder) == ["other/1/config.json", "other/1/lora.safetensors"]
    assert store.add("notes", adapter("dddd")).version == 1


def test_what_cannot_be_done_is_said(store: Store, tmp_path: Path) -> None:
    store.add("notes", adapter("a"))
    for call, about in (
        (lambda: store.add("notes", adapter("bb")), "'notes' is in .* already: update it"),
        (lambda: store.update("absent", adapter("bb")), "has no 'absent'; it has notes"),
        (lambda: store.forget("absent"), "has no 'absent'; it has notes"),
        (lambda: store.load("notes", version=7), "'notes' has no version 7; it has 1"),
        (lambda: store.compose([]), "nothing to compose"),
        (lambda: store.add("../out", adapter("bb")), "cannot be a name"),
        (lambda: store.forget(".."), "cannot be a name"),
        (lambda: Store(tmp_path / "none").entry("x"), "has no 'x'; it has nothing yet"),
    ):
        with pytest.raises(ValueError, match=about):
            call()
    assert names(store.folder) == ["notes/1/config.json", "notes/1/lora.safetensors"]


@pytest.mark.parametrize("spoil", ["config.json", "lora.safetensors"])
@pytest.mark.parametrize("gone", [True, False])
def test_a_damaged_adapter_hides_no_other_and_can_be_replaced_or_forgotten(store: Store, spoil: str, gone: bool) -> None:
    for name in ("a", "b", "c"):
        store.add(name, adapter(name))
    file = store.folder / "b" / "1" / spoil
    if gone:
        file.unlink()
    else:
        file.write_bytes(file.read_bytes()[:-20])
    first, damaged, last = store.list()
    assert [(entry.name, entry.provenance[0].context.name) for entry in (first, last)] == [("a", "a"), ("c", "c")]
    assert (damaged.name, damaged.version, damaged.provenance, first.damage) == ("b", 1, (), None)
    assert damaged.damage is not None
    assert "b/1" in damaged.damage
    with pytest.raises(ValueError, match="b/1"):
        store.load("b")
    assert store.compose(["a", "c"]).rank == 4
    # The same text again, which would change nothing if its adapter were whole.
    assert store.update("b", adapter("b")).version == 2
    assert [entry.damage for entry in store.list()] == [None, None, None]
    (store.folder / "c" / "1" / spoil).unlink()
    store.forget("c")
    assert [entry.name for entry in store.list()] == ["a", "b"]


def test_what_was_half_written_is_no_version_and_goes_with_the_next_write(store: Store) -> None:
    store.add("notes", adapter("a"))
    (store.folder / "notes" / ".2.77.partial").mkdir()
    assert store.entry("notes").version == 1
    store.update("notes", adapter("bb"))
    assert sorted(child.name for child in (store.folder / "notes").iterdir()) == ["1", "2"]


def test_a_process_that_is_stopped_while_it_forgets_leaves_no_half(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    store.add("notes", adapter("a"))
    store.add("other", adapter("bb"))

    def stopped(folder: Path) -> None:
        (folder / "1" / "config.json").unlink()
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr("shutil.rmtree", stopped)
        with pytest.raises(KeyboardInterrupt):
            store.forget("notes")
    assert [(entry.name, entry.damage) for entry in store.list()] == [("other", None)]
    store.add("notes", adapter("ccc"))
    assert sorted(child.name for child in store.folder.iterdir()) == [".lock", "notes", "other"]


def test_writers_at_once_take_turns(store: Store) -> None:
    store.add("notes", adapter("start"))
    loras = [adapter("x" * n) for n in range(1, 9)]
    threads = [threading.Thread(target=store.update, args=("notes", lora)) for lora in loras]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert store.entry("notes").version == 9
    versions = [store.load("notes", version=n).provenance[0][0].context.name for n in range(2, 10)]
    assert sorted(versions) == sorted("x" * n for n in range(1, 9))
