"""A page in a browser: a context on the left, on the right what SHINE, In-Context and Only Question answer about it.

Needs Gradio (``pip install 'shine-hypernetwork[app]'``). Nothing is fetched from elsewhere, and nothing is sent there.
"""

from __future__ import annotations

import shutil
import tempfile
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NoReturn

import gradio as gr

from shine.cli.models import remarks
from shine.cli.side_by_side import SideBySide
from shine.documents import LARGEST, read_document
from shine.evaluation.tables import TITLES
from shine.export.peft import write_peft
from shine.model import Shine

METHODS = {
    "shine": "wears the adapter",
    "in_context": "sees the context",
    "only_question": "has neither",
}
_CSS = """
.gradio-container { max-width: 1600px !important; margin: auto; padding-top: 8px !important; }
#title h1 { margin: 0 0 4px 0; }
#title p { margin: 0; opacity: 0.75; }
#facts { min-height: 3.6em; }
#talks { flex-wrap: nowrap !important; }
#talks > * { min-width: 0 !important; }
#talks .bubble-wrap { padding-top: 40px; }
#talks .icon-button-wrapper { display: none !important; }
#talks small { opacity: 0.6; }
#asking { align-items: stretch; }
footer { display: none !important; }
"""
Message = dict[str, str]


@dataclass
class Session:
    """What one visitor has encoded and said.

    Attributes:
        talks: the conversation with the three methods; ``None`` before a context is encoded.
        shown: the messages of each method.
        archive: the adapter as it can be downloaded now.
    """

    talks: SideBySide | None = None
    shown: dict[str, list[Message]] = field(default_factory=lambda: {name: [] for name in METHODS})
    archive: Path | None = None


class Page:
    """What the page does; `build` is how it looks."""

    def __init__(self, shine: Shine, *, folder: Path, reading: Mapping[str, Any], encoding: str = "utf-8") -> None:
        """Serve one loaded model.

        Args:
            folder: where adapters for downloading are written.
            reading: options of `Shine.encode`.
            encoding: of files that are uploaded.
        """
        self.shine, self.folder, self.reading, self.encoding = shine, folder, dict(reading), encoding

    def read(self, file: str) -> Any:
        """The text of an uploaded file."""
        try:
            return read_document(Path(file), encoding=self.encoding).text
        except ValueError as error:
            # Without the place where the upload lies, which says nothing to a visitor.
            return _refuse(str(error).replace(f"{Path(file).parent}/", ""), 1)[0]

    def encode(self, text: str) -> tuple[Any, ...]:
        """Encode what is in the box: a new session, what to say of it, the download, strength one, no conversations."""
        outputs = 4 + len(METHODS)
        if len(text) > LARGEST:
            return _refuse(f"more than {LARGEST:,} characters of text: give the part that matters", outputs)
        started = time.perf_counter()
        try:
            lora = self.shine.encode(text, **self.reading)
        except ValueError as error:
            return _refuse(str(error), outputs)
        seconds = time.perf_counter() - started
        context = lora.provenance[0][0].context
        values = sum(a.numel() + b.numel() for a, b in lora.values())
        lines = [
            f"**{context.read:,} tokens** read in **{seconds:.2f} s** into an adapter of rank {lora.rank}, {_size(4 * values)}.",
            *(f"Note: {line}" for line in remarks(lora)),
        ]
        session = Session(SideBySide(self.shine, lora, text))
        return session, "\n\n".join(lines), self.download(session, 1.0), 1.0, *session.shown.values()

    def download(self, session: Session, strength: float) -> Any:
        """The adapter at this strength as a zip: as SHINE keeps it, and for PEFT."""
        if session.talks is None:
            return gr.DownloadButton(interactive=False)
        place = Path(tempfile.mkdtemp(dir=self.folder))
        lora = session.talks.lora.scale(strength) if strength != 1 else session.talks.lora
        lora.save(place / "adapter" / "shine")
        write_peft(lora, place / "adapter" / "peft", backbone=self.shine.config.path)
        archive = shutil.make_archive(str(place / "adapter"), "zip", root_dir=place / "adapter")
        shutil.rmtree(place / "adapter")
        if session.archive is not None:
            shutil.rmtree(session.archive.parent, ignore_errors=True)
        session.archive = Path(archive)
        at = "" if strength == 1 else f" at strength {strength:g}"
        return gr.DownloadButton(f"Download the adapter{at}", value=archive, interactive=True)

    def ask(self, session: Session, question: str, strength: float) -> Iterator[tuple[Any, ...]]:
        """Put a question to the three methods: the session, the box and each conversation, as answers come."""
        if session.talks is None or not question.strip():
            missing = "there is no adapter yet: give a context and encode it" if session.talks is None else "there is no question"
            yield _refuse(missing, 2 + len(METHODS))
            return
        for messages in session.shown.values():
            messages.append({"role": "user", "content": _plain(question.strip())})
        yield session, "", *session.shown.values()
        for told in session.talks.ask(question.strip(), strength=strength):
            said = _plain(f"{told.text} …" if told.cut else told.text or "(nothing)")
            session.shown[told.method].append({"role": "assistant", "content": f"{said}<br><small>{told.seconds:.2f} s</small>"})
            yield session, "", *session.shown.values()

    def reset(self, session: Session) -> tuple[Any, ...]:
        """Forget what was said, keep the adapter."""
        if session.talks is not None:
            session.talks.reset()
        fresh = Session(session.talks, archive=session.archive)
        return fresh, *fresh.shown.values()


def build(page: Page, *, text: str = "") -> gr.Blocks:
    """The page, with a text in the box to begin with."""
    with gr.Blocks(title="SHINE", analytics_enabled=False, fill_width=True, delete_cache=(3600, 3600)) as blocks:
        session = gr.State(Session())
        gr.Markdown(
            f"# SHINE\n{page.shine.name} reads the context once and writes it into weights of {page.shine.config.path}; the same "
            "model is then asked in three ways.",
            elem_id="title",
        )
        with gr.Row(equal_height=False):
            with gr.Column(scale=2, min_width=300):
                context = gr.Textbox(text, label="Context", lines=13, max_lines=13, elem_id="context", placeholder="A text …")
                with gr.Row():
                    upload = gr.UploadButton("Open a file", size="md", elem_id="upload", min_width=100)
                    encode = gr.Button("Encode", variant="primary", size="md", elem_id="encode", min_width=100)
                facts = gr.Markdown("Not encoded yet.", elem_id="facts")
                strength = gr.Slider(0, 2, 1, step=0.05, label="Strength of the adapter", elem_id="strength")
                download = gr.DownloadButton("Download the adapter", size="md", interactive=False, elem_id="download")
            with gr.Column(scale=5, min_width=300):
                with gr.Row(elem_id="talks"):
                    talks = [_chatbot(name, about) for name, about in METHODS.items()]
                with gr.Row(elem_id="asking"):
                    question = gr.Textbox(
                        show_label=False, container=False, placeholder="A question about the context …", scale=8, elem_id="question"
                    )
                    ask = gr.Button("Ask", variant="primary", size="md", scale=1, min_width=90, elem_id="ask")
                    again = gr.Button("Start over", size="md", scale=1, min_width=110, elem_id="reset")
        upload.upload(page.read, upload, context)
        encode.click(page.encode, context, [session, facts, download, strength, *talks], show_progress_on=[facts])
        strength.release(page.download, [session, strength], download)
        gr.on(
            [ask.click, question.submit],
            page.ask,
            [session, question, strength],
            [session, question, *talks],
            show_progress="hidden",
        )
        again.click(page.reset, session, [session, *talks])
    return blocks


def serve(page: Page, *, host: str, port: int, text: str = "") -> NoReturn:
    """Serve the page until the process is stopped (Ctrl-C).

    Raises:
        ValueError: the port is taken.
    """
    theme = gr.themes.Default(
        primary_hue="blue", neutral_hue="slate", font=["system-ui", "sans-serif"], font_mono=["ui-monospace", "monospace"]
    )
    try:
        _, address, _ = build(page, text=text).launch(
            server_name=host, server_port=port, quiet=True, prevent_thread_lock=True, css=_CSS, theme=theme, ssr_mode=False
        )
    except OSError as error:
        raise ValueError(f"{host}:{port} cannot be served ({error}); choose another --port") from None
    print(f"SHINE is at {address} (Ctrl-C ends it)", flush=True)
    while True:
        time.sleep(3600)


def _chatbot(name: str, about: str) -> gr.Chatbot:
    empty = "Encode a context, then ask." if name == "shine" else ""
    return gr.Chatbot(label=f"{TITLES[name]}: {about}", height=540, min_width=0, elem_id=name, buttons=[], placeholder=empty)


def _refuse(message: str, outputs: int) -> tuple[Any, ...]:
    """Tell the visitor, and leave so many components as they are; an exception would write "Error" across each of them."""
    gr.Warning(message, title="That cannot be done", duration=10)
    return tuple(gr.skip() for _ in range(outputs))


def _plain(text: str) -> str:
    """Words as they are: what looks like Markdown or HTML in them is not meant so."""
    escaped = (letter if letter.isalnum() or letter in " .,:;!?'\n" else f"&#{ord(letter)};" for letter in text)
    return "".join(escaped).replace("\n", "<br>")


def _size(count: int) -> str:
    return f"{count / 1e6:,.1f} MB" if count >= 1e6 else f"{count / 1e3:,.0f} kB"
