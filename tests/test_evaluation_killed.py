"""Evaluations in processes of their own: several ranks share one, and one is killed again and again."""

from __future__ import annotations

import json
import os
import random
import signal
import socket
import subprocess
import sys
import time
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from processes import CONTEXT

from shine.config import BackboneConfig, DataConfig, EvaluationConfig, HypernetworkConfig, PromptConfig, SourceConfig, StageConfig
from shine.evaluation import results
from shine.evaluation.results import PREDICTIONS_FILE, SUMMARY_FILE, TIMINGS_FILE, ResultFolder, read_jsonl
from shine.evaluation.run import evaluate
from shine.zoo import ASSETS

ROOT = Path(__file__).resolve().parent.parent
KILLS, CONTEXTS = 10, 240


def small(folder: str, output: Path) -> EvaluationConfig:
    """Seven contexts and twenty-odd questions, two contexts a batch: an odd one left over in each method."""
    return EvaluationConfig(
        backbone=BackboneConfig(path=folder, dtype="float32", device="cpu"),
        hypernetwork=HypernetworkConfig(),
        stage=StageConfig(name="1qa", context_length=400, conversation_length=64, learning_rate=1.0, warmup_steps=0),
        data=DataConfig(test={"worlds": SourceConfig(kind="worlds", options={"count": 7, "seed": 3})}),
        prompts=PromptConfig(),
        output=str(output),
        methods=("in_context", "only_question"),
        batch_size=2,
        max_new_tokens=4,
    )


def evaluate_on_rank(rank: int, size: int, port: int, config: EvaluationConfig, note: str) -> None:
    """The body of one rank's process; it leaves the numbers of the units that it computed in the file ``note``."""
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(size), "LOCAL_WORLD_SIZE": str(size)}
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    append, computed = ResultFolder.append, []

    def noting(self: ResultFolder, rank: int, unit: Any, *args: Any) -> None:
        computed.append(unit.number)
        append(self, rank, unit, *args)

    ResultFolder.append = noting  # type: ignore[method-assign]
    evaluate(config)
    Path(note).write_text(json.dumps(computed))


def evaluate_on_ranks(size: int, config: EvaluationConfig, notes: Path) -> list[list[int]]:
    """What each of ``size`` ranks computed."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    files = [notes.with_name(f"{notes.name}-{rank}-of-{size}") for rank in range(size)]
    ranks = [CONTEXT.Process(target=evaluate_on_rank, args=(rank, size, port, config, str(files[rank]))) for rank in range(size)]
    for process in ranks:
        process.start()
    for process in ranks:
        process.join(timeout=120)
    assert [process.exitcode for process in ranks] == [0] * size
    return [json.loads(file.read_text()) for file in files]


def test_ranks_share_the_work_and_merge_it(tiny_backbone_folder: str, tmp_path: Path) -> None:
    """Two ranks give the file of one: every question once, in the same order, whoever answered it."""
    alone = small(tiny_backbone_folder, tmp_path / "1")
    summary = evaluate(alone)
    expected = (tmp_path / "1" / PREDICTIONS_FILE).read_bytes()
    units = 2 * 4
    output = tmp_path / "2"
    shares = evaluate_on_ranks(2, replace(alone, output=str(output)), tmp_path / "computed")
    assert sorted(number for share in shares for number in share) == list(range(units))
    assert max(map(len, shares)) - min(map(len, shares)) <= 1
    assert (output / PREDICTIONS_FILE).read_bytes() == expected
    rows = read_jsonl(output / PREDICTIONS_FILE)
    assert len({(row["method"], row["id"], row["turn"]) for row in rows}) == len(rows)
    assert sorted(row["unit"] for row in read_jsonl(output / TIMINGS_FILE)) == list(range(units))
    found = json.loads((output / SUMMARY_FILE).read_text())["sources"]["worlds"]
    assert scores(found) == scores(summary["sources"]["worlds"])
    assert not list(output.glob("*.part-*"))


@pytest.mark.slow
def test_what_one_rank_began_two_finish(tiny_backbone_folder: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing that is there is computed again."""
    whole = small(tiny_backbone_folder, tmp_path / "whole")
    evaluate(whole)
    config, append = replace(whole, output=str(tmp_path / "parts")), ResultFolder.append
    written = []

    def stopping(self: ResultFolder, *args: Any) -> None:
        append(self, *args)
        written.append(args)
        if len(written) == 3:
            raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(ResultFolder, "append", stopping)
        with pytest.raises(KeyboardInterrupt):
            evaluate(config)
    shares = evaluate_on_ranks(2, config, tmp_path / "computed")
    assert sorted(number for share in shares for number in share) == list(range(3, 8))
    assert (tmp_path / "parts" / PREDICTIONS_FILE).read_bytes() == (tmp_path / "whole" / PREDICTIONS_FILE).read_bytes()


def scores(summary: dict[str, Any]) -> dict[str, Any]:
    """What does not depend on the clock."""
    timed = ("seconds", "contexts_encoded")
    return {
        name: {key: value for key, value in method.items() if key not in timed} for name, method in summary["methods"].items()
    } | {"differences": summary["differences"]}


def start(output: Path, *, ranks: int = 1) -> subprocess.Popen[bytes]:
    """The door itself with the shipped hypernetwork."""
    overrides = ["experiment=cpu_world", f"checkpoint={ASSETS / 'cpu-world' / 'hypernetwork'}", f"output={output}", "batch_size=1"]
    launch = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(ranks)] if ranks > 1 else []
    command = [sys.executable, *launch, str(ROOT / "test.py"), *overrides, f"data.test.worlds.options.count={CONTEXTS}"]
    return subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, cwd=output.parent)


def kill(process: subprocess.Popen[bytes]) -> None:
    """At once, with the ranks that torchrun has started: these would live on without it."""
    ranks = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
    for number in (process.pid, *map(int, ranks)):
        with suppress(ProcessLookupError):
            os.kill(number, signal.SIGKILL)
    process.wait()


def size_of(output: Path) -> int:
    """Bytes of predictions that are there, in whatever file."""
    return sum(file.stat().st_size for file in output.glob("predictions.*") if file.exists())


def test_two_evaluations_do_not_write_into_one_folder(tiny_backbone_folder: str, tmp_path: Path) -> None:
    """The second is refused while the first has it open; what the first has written stays, and it ends as it would have."""
    config = small(tiny_backbone_folder, tmp_path / "out")
    append, refused = ResultFolder.append, []

    def meddling(self: ResultFolder, *args: Any) -> None:
        append(self, *args)
        if not refused:
            before = self.part(0).read_bytes()
            with pytest.raises(ValueError, match="another evaluation is writing there; let it end, end its processes, or choose"):
                evaluate(config)
            assert self.part(0).read_bytes() == before
            refused.append(True)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(ResultFolder, "append", meddling)
        evaluate(config)
    assert refused
    evaluate(replace(config, output=str(tmp_path / "alone")))
    assert (tmp_path / "out" / PREDICTIONS_FILE).read_bytes() == (tmp_path / "alone" / PREDICTIONS_FILE).read_bytes()


def evaluate_until(config: EvaluationConfig, place: str) -> None:
    """The body of a process that kills itself with a signal that nothing can catch: in a line, before the merge, or in it."""
    append, close, replaced, appended = ResultFolder.append, ResultFolder.close, results._replace, []

    def die() -> None:
        os.kill(os.getpid(), signal.SIGKILL)

    def appending(self: ResultFolder, rank: int, unit: Any, rows: Any, timing: Any) -> None:
        append(self, rank, unit, rows, timing)
        appended.append(unit)
        if place == "line" and len(appended) == 2:
            with self.part(rank).open("ab") as lines:
                lines.write(b'{"source": "wor')
            die()

    def closing(self: ResultFolder) -> Any:
        if place == "before the merge":
            die()
        return close(self)

    def replacing(file: Path, rows: Any) -> None:
        replaced(file, rows)
        # The whole file is there, and so are the parts that it was made of.
        if place == "merge" and file.name == PREDICTIONS_FILE:
            die()

    ResultFolder.append, ResultFolder.close, results._replace = appending, closing, replacing  # type: ignore[method-assign]
    evaluate(config)


@pytest.mark.parametrize("stage", ["1qa", "mqa"])
def test_a_run_killed_anywhere_has_the_file_of_one_that_was_not(stage: Any, tiny_backbone_folder: str, tmp_path: Path) -> None:
    """Two contexts a batch. Also killed in the merge, when the whole file and its parts both lie there: nothing comes twice."""
    config = small(tiny_backbone_folder, tmp_path / "whole")
    config = replace(config, stage=replace(config.stage, name=stage))
    evaluate(config)
    whole = (tmp_path / "whole" / PREDICTIONS_FILE).read_bytes()
    output = tmp_path / "killed"
    for place in ("line", "before the merge", "merge"):
        process = CONTEXT.Process(target=evaluate_until, args=(replace(config, output=str(output)), place))
        process.start()
        process.join(timeout=120)
        assert process.exitcode == -signal.SIGKILL
        assert not (output / SUMMARY_FILE).exists()
        assert list(output.glob("predictions.part-*"))
        assert (output / PREDICTIONS_FILE).exists() == (place == "merge")
    evaluate(replace(config, output=str(output)))
    assert (output / PREDICTIONS_FILE).read_bytes() == whole
    assert not list(output.glob("predictions.part-*"))
    units = [row["unit"] for row in read_jsonl(output / TIMINGS_FILE)]
    assert sorted(units) == list(range(8)), "each batch counts once, and none was computed again"


@pytest.mark.slow
def test_a_run_killed_ten_times_has_the_file_of_one_that_was_not(tmp_path: Path) -> None:
    """Killed while it starts, in the midst of its work, on one rank and on two in turn, by a signal that nothing can catch."""
    assert start(tmp_path / "whole").wait() == 0
    whole = (tmp_path / "whole" / PREDICTIONS_FILE).read_bytes()
    output, rng, kept = tmp_path / "killed", random.Random(1), [0]
    for number in range(KILLS):
        process = start(output, ranks=1 + number % 2)
        # Every third dies while it starts, the others after some work of their own.
        more, until = rng.uniform(0.01, 0.06) * len(whole), time.monotonic() + rng.uniform(0.2, 3)
        while process.poll() is None:
            early = number % 3 == 2
            if (early and time.monotonic() > until) or (not early and size_of(output) > kept[-1] + more):
                break
            time.sleep(0.002)
        assert process.poll() is None, "it had ended before it was killed"
        kill(process)
        kept.append(max(size_of(output), kept[-1]))
        assert not (output / SUMMARY_FILE).exists()
    assert 0 < kept[-1] < len(whole)
    assert len(set(kept)) > KILLS / 2, "hardly any of the killed runs had done anything"
    assert start(output).wait() == 0
    assert (output / PREDICTIONS_FILE).read_bytes() == whole
    units = [row["unit"] for row in read_jsonl(output / TIMINGS_FILE)]
    assert sorted(units) == list(range(3 * CONTEXTS))
    before, after = (json.loads((tmp_path / name / SUMMARY_FILE).read_text())["sources"]["worlds"] for name in ("whole", "killed"))
    assert scores(after) == scores(before)
