"""Train one stage: what all ranks agree on before the loop, and the loop."""

from __future__ import annotations

from contextlib import ExitStack, nullcontext
from dataclasses import asdict, replace
from pathlib import Path

from shine.checkpoint import effective_config, find_checkpoint, introduce
from shine.config import StageConfig, TrainConfig
from shine.data.sources import look_into
from shine.devices import find_device
from shine.host_memory import keep_freed_memory
from shine.hub import hub_id
from shine.loading import load_backbone, with_dtype
from shine.pretrained import without_progress_bars
from shine.training.distributed import Ranks, join_ranks, silent
from shine.training.loop import Run
from shine.training.owner import Owner, owned
from shine.training.provenance import run_record
from shine.training.rehearsal import check_start, rehearsal
from shine.training.start import Start, starting_point
from shine.training.state import sweep
from shine.training.stop import StopRequest, stop_requests


def train(config: TrainConfig) -> Path:
    """Train one stage and return the directory of its final checkpoint (after a dry run, where it would have been).

    Raises:
        ValueError: whatever does not fit together, with the remedy: a missing checkpoint or source, ranks, sizes.
        StoppedError: a signal asked for it, and the run was saved.
    """
    with join_ranks(config.backbone.device) as ranks, stop_requests(quiet=not ranks.first) as request:
        if config.dry_run:
            ranks.ask_first(lambda: check_start(config))
            with rehearsal(config, ranks=ranks.size, say=print if ranks.first else silent) as small:
                final = _train(small, ranks, request)
            if ranks.first:
                print("dry run: everything fits together, one step was done, nothing is kept", flush=True)
            return final
        return _train(config, ranks, request)


def _train(config: TrainConfig, ranks: Ranks, request: StopRequest) -> Path:
    """`train`, on ranks that have met: whatever one of them refuses, all refuse."""
    with ExitStack() as held:
        owners: list[Owner] = []
        # One rank looks, before any writes; what it refuses is said once.
        ranks.ask_first(lambda: owners.append(held.enter_context(owned(Path(config.output).expanduser(), say=print))))
        start = ranks.ask_first(lambda: starting_point(config, say=print))
        if start.finished:
            assert start.directory is not None
            if ranks.first:
                print(f"{start.directory} is there: this run has ended already", flush=True)
            return start.directory
        return _prepare(config, ranks, start=start, request=request, owner=owners[0] if owners else None).go()


def _prepare(config: TrainConfig, ranks: Ranks, *, start: Start, request: StopRequest, owner: Owner | None) -> Run:
    with ranks.together():
        _check_shares(config.stage, ranks=ranks.size)
        look_into(config.data.train, "data.train")
        look_into(config.data.validation, "data.validation")
    if start.directory is not None and not start.resumed:
        start = replace(start, directory=_on_each_machine(start.directory, config, ranks))
    with ranks.together():
        shape = effective_config(start.directory, config.hypernetwork)
    if ranks.first:
        sweep(Path(config.output).expanduser())
        for line in introduce(start.directory, config.hypernetwork) if start.directory and not start.resumed else ():
            print(line, flush=True)
    checkpoint = str(start.directory) if start.directory and not start.resumed else config.checkpoint
    # What was asked for, before the shape of a checkpoint stands in for it: a resumed run is compared by that.
    asked = asdict(config.hypernetwork)
    # One for all: machines may differ in what they are good at.
    backbone_config = ranks.ask_first(lambda: with_dtype(config.backbone, ranks=ranks.local_size))
    config = replace(config, backbone=backbone_config, hypernetwork=shape, checkpoint=checkpoint)
    record = {**run_record(config), "asked": asked}
    with ranks.one_by_one(), nullcontext() if ranks.first else without_progress_bars():
        # What is too large for one device goes to the devices in parts.
        parted = config.backbone.shard and ranks.size > 1
        backbone, tokenizer = load_backbone(config.backbone, targets=shape.targets, in_host_memory=parted)
    keep_freed_memory(find_device(config.backbone.device))
    return Run(config, backbone, tokenizer, ranks, start=start, request=request, record=record, owner=owner)


def _check_shares(stage: StageConfig, *, ranks: int) -> None:
    if stage.batch_size % (ranks * stage.micro_batch_size):
        raise ValueError(
            f"stage.batch_size={stage.batch_size} must be a multiple of ranks x micro_batch_size = "
            f"{ranks} x {stage.micro_batch_size}: change one of them"
        )


def _on_each_machine(found: Path, config: TrainConfig, ranks: Ranks) -> Path:
    """The checkpoint that rank 0 found, where this rank can read it: machines need not share the cache of a hub's library."""
    name = config.checkpoint
    if name is None or hub_id(name) is None:
        return found
    return ranks.ask_first_of_machine(lambda: found if ranks.first else find_checkpoint(name))
