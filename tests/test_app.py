"""The page: what it refuses before it is there, and what a visitor sees and does in a real browser."""

from __future__ import annotations

import contextlib
import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from shine import LoRA, Shine
from shine.cli.main import main
from shine.cli.side_by_side import SideBySide

TEXT = "The pet of Yorick is a beetle. The coat of Delphi is silver. Umar lives in Selkirk. Zoran works as a baker."
QUESTION = "What is the job of Zoran?"
BROWSERS = ("chromium", "chromium-browser", "google-chrome")
EXTRA = "not installed; scripts/setup_venv.py engines, which make test-all runs, installs it"


def test_the_three_methods_keep_their_own_conversations() -> None:
    shine = Shine.from_pretrained("cpu-world", device="cpu")
    lora = shine.encode(TEXT)
    talks = SideBySide(shine, lora, TEXT)
    told = list(talks.ask(QUESTION))
    assert [each.method for each in told] == talks.names == ["shine", "in_context", "only_question"]
    assert [each.text for each in told[:2]] == ["baker", "baker"]
    assert told[0].text == shine.chat(lora, QUESTION)
    assert [talks.histories[each.method] for each in told] == [((QUESTION, each.text),) for each in told]
    talks.reset()
    assert set(talks.histories.values()) == {()}
    weak, in_context, _ = talks.ask(QUESTION, strength=0.0)
    assert weak.text != "baker"
    assert in_context.text == "baker"


def test_what_cannot_be_served_is_one_line(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: name if name != "gradio" else None)
    (tmp_path / "image.txt").write_bytes(b"\x89PNG\0\0")
    for options, about in (
        (["--model", "cpu-world"], "pip install 'shine-hypernetwork[app]'"),
        (["--model", "cpu-world", "--port", "99999"], "a port is a number from 1 to 65535"),
    ):
        assert main(["app", *options]) == 2
        told = capsys.readouterr()
        assert told.err.startswith("error: ")
        assert about in told.err
        assert told.err.count("\n") == 1
    monkeypatch.setattr("importlib.util.find_spec", lambda name: name)
    for options, about in (
        (["--model", "cpu-world", "--context", str(tmp_path / "image.txt")], "a binary file"),
        (["--model", "cpu-world", "--context", str(tmp_path / "none.txt")], "no such file"),
        (["--model", "checkpoints/absent"], "no such checkpoint directory"),
    ):
        assert main(["app", *options]) == 2
        told = capsys.readouterr()
        assert about in told.err
        assert told.err.count("\n") == 1


# --- in a browser -----------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def address(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """The page, served by the command itself."""
    pytest.importorskip("gradio", reason=f"Gradio is {EXTRA}", exc_type=ImportError)
    folder = tmp_path_factory.mktemp("page")
    text = folder / "notes.txt"
    text.write_text(TEXT)
    command = [sys.executable, "-m", "shine.cli.main", "app", "--model", "cpu-world", "--device", "cpu", "--context", str(text)]
    environment = {**os.environ, "TMPDIR": str(folder)}
    with subprocess.Popen([*command, "--port", str(free_port())], stdout=subprocess.PIPE, text=True, env=environment) as process:
        assert process.stdout is not None
        found = re.search(r"http://\S+", process.stdout.readline())
        assert found is not None
        yield found[0]
        process.terminate()
    # What was written for visitors is gone.
    assert process.returncode == 128 + signal.SIGTERM
    assert not list(folder.glob("shine-app-*"))


def free_port() -> int:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return int(free.getsockname()[1])


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    api = pytest.importorskip("playwright.sync_api", reason=f"Playwright is {EXTRA}", exc_type=ImportError)
    program = next(filter(None, map(shutil.which, BROWSERS)), None)
    with api.sync_playwright() as playwright:
        if program is None and not Path(playwright.chromium.executable_path).exists():
            pytest.skip("there is no Chromium: apt install chromium")
        running = playwright.chromium.launch(executable_path=program, args=["--no-sandbox"])
        with contextlib.closing(running):
            yield running


@pytest.fixture
def page(browser: Any, address: str) -> Iterator[Any]:
    opened = browser.new_page(viewport={"width": 1440, "height": 820})
    opened.set_default_timeout(60_000)
    elsewhere: list[str] = []
    opened.on(
        "request", lambda request: None if request.url.startswith((address, "data:", "blob:")) else elsewhere.append(request.url)
    )
    opened.goto(address)
    opened.wait_for_selector("#encode")
    yield opened
    # Nothing is fetched from other places.
    assert elsewhere == []
    opened.close()


def ask(page: Any, question: str, *, turn: int) -> list[str]:
    """The answers of the three methods to the ``turn``-th question."""
    page.fill("#question textarea", question)
    page.click("#ask")
    answers = []
    for name in ("shine", "in_context", "only_question"):
        said = page.locator(f"#{name} .bot.message").nth(turn)
        said.wait_for()
        # The time stands below it.
        text, seconds = said.inner_text().strip().rsplit("\n", 1)
        assert re.fullmatch(r"\d+\.\d\d s", seconds)
        answers.append(text.strip())
    return answers


def encode(page: Any) -> str:
    page.click("#encode")
    page.locator("#facts", has_text="tokens read in").wait_for()
    return page.inner_text("#facts")


@pytest.mark.slow
def test_a_visitor_encodes_and_asks(page: Any, tmp_path: Path) -> None:
    assert page.input_value("#context textarea") == TEXT
    assert re.search(r"26 tokens read in \d+\.\d\d s into an adapter of rank 2, 43 kB", encode(page))
    assert ask(page, QUESTION, turn=0)[:2] == ["baker", "baker"]
    first, second, third = ask(page, "Where does Umar live?", turn=1)
    assert first == second == "Selkirk" != third
    # Of these answers a picture is left, for whoever wants to look.
    page.screenshot(path=tmp_path / "page.png")
    page.click("#reset")
    page.locator("#shine .bot.message").first.wait_for(state="detached")
    assert ask(page, QUESTION, turn=0)[0] == "baker"


@pytest.mark.slow
def test_two_visitors_at_once_are_answered_from_their_own_contexts(page: Any, browser: Any, address: str) -> None:
    with contextlib.closing(browser.new_page()) as other:
        other.goto(address)
        other.wait_for_selector("#encode")
        other.fill("#context textarea", TEXT.replace("baker", "tailor"))
        encode(page)
        encode(other)
        # Both questions are under way before the first answer is waited for.
        for visitor in (page, other):
            visitor.fill("#question textarea", QUESTION)
        for visitor in (page, other):
            visitor.click("#ask")
        for visitor, job in ((other, "tailor"), (page, "baker")):
            said = visitor.locator("#shine .bot.message").first
            said.get_by_text(job).wait_for()
            assert said.inner_text().strip().startswith(job)


@pytest.mark.slow
def test_the_slider_and_the_download(page: Any, tmp_path: Path) -> None:
    encode(page)
    adapters = {}
    for strength in ("1", "0.5"):
        if strength != "1":
            box = page.locator("#strength input[type=number]")
            box.fill(strength)
            box.blur()
            page.locator("#download", has_text=f"at strength {strength}").wait_for()
        with page.expect_download() as started:
            page.click("#download")
        with zipfile.ZipFile(started.value.path()) as archive:
            archive.extractall(tmp_path / strength)
        adapters[strength] = LoRA.load(tmp_path / strength / "shine")
        peft = json.loads((tmp_path / strength / "peft" / "adapter_config.json").read_text())
        assert (peft["r"], peft["peft_type"]) == (2, "LORA")
    assert adapters["0.5"].provenance[0][0].strength == 0.5
    shine = Shine.from_pretrained("cpu-world", device="cpu")
    assert shine.chat(adapters["1"], QUESTION) == "baker"
    assert adapters["0.5"].inner(adapters["0.5"]) == pytest.approx(adapters["1"].inner(adapters["1"]) / 4)
    box = page.locator("#strength input[type=number]")
    box.fill("0")
    box.blur()
    assert ask(page, QUESTION, turn=0)[0] != "baker"


@pytest.mark.slow
def test_a_file_is_opened_and_what_is_wrong_is_shown(page: Any, tmp_path: Path) -> None:
    # Before anything is encoded.
    page.fill("#question textarea", QUESTION)
    page.click("#ask")
    page.get_by_text("there is no adapter yet: give a context and encode it").wait_for()
    (tmp_path / "page.html").write_text("<html><body><p>Zoran works as a <b>tailor</b>.</p><script>x()</script></body></html>")
    (tmp_path / "image.txt").write_bytes(b"\x89PNG\0\0")
    upload = page.locator("input[type=file]").first
    upload.set_input_files(tmp_path / "image.txt")
    told = page.get_by_text("image.txt: a binary file, not text")
    told.wait_for()
    assert "/tmp" not in told.inner_text()
    upload.set_input_files(tmp_path / "page.html")
    page.wait_for_function("document.querySelector('#context textarea').value == 'Zoran works as a tailor.'")
    encode(page)
    assert ask(page, QUESTION, turn=0)[0] == "tailor"
    page.fill("#context textarea", "  ")
    page.click("#encode")
    page.get_by_text("a context is empty: give text to read").wait_for()


@pytest.mark.slow
def test_words_that_look_like_html_are_words(page: Any) -> None:
    encode(page)
    asked = "<img src=x onerror=alert(1)> *Who*? $x_1$"
    ask(page, asked, turn=0)
    assert page.locator("#shine .user.message").first.inner_text().strip() == asked


@pytest.mark.slow
def test_a_taken_port_is_one_line(address: str) -> None:
    port = address.rstrip("/").rsplit(":", 1)[1]
    command = [sys.executable, "-m", "shine.cli.main", "app", "--model", "cpu-world", "--device", "cpu", "--port", port]
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=120)
    assert (done.returncode, done.stdout) == (2, "")
    assert re.fullmatch(rf"error: 127\.0\.0\.1:{port} cannot be served .*choose another --port\n", done.stderr)
