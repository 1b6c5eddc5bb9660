"""Checkpoints to and from the hubs, through the real libraries against a server on loopback."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import huggingface_hub.constants
import pytest
import torch
from conftest import tiny_hypernetwork_config, tiny_model
from hubs import TOKEN, Hub, serve
from modelscope_hub.config import set_default_config
from processes import call_on_ranks
from runs import stage_config, train_config

from shine.backbone import Backbone
from shine.checkpoint import CheckpointInfo, load_hypernetwork, read_info, read_weights, save_hypernetwork
from shine.cli.main import main
from shine.config import BackboneConfig
from shine.hub import FILES, HubId, download, hub_id
from shine.hypernetwork import Hypernetwork
from shine.manifest import damage
from shine.released import RELEASED_FILES
from shine.training.stage import train

RELEASED = Path(__file__).parent / "fixtures" / "tiny_qwen3" / "reference_checkpoint"
HUBS = ("hf", "ms")

# huggingface_hub 2.4 hands httpx its uploads in a way that httpx deprecates.
pytestmark = pytest.mark.filterwarnings("ignore:Use 'content=<...>':DeprecationWarning")


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Hub]:
    """Both libraries talk to it, with caches of their own."""
    with serve() as hub:
        # What HF_ENDPOINT sets, which is read once at import.
        monkeypatch.setattr(huggingface_hub.constants, "ENDPOINT", hub.url)
        template = hub.url + "/{repo_id}/resolve/{revision}/{filename}"
        monkeypatch.setattr(huggingface_hub.constants, "HUGGINGFACE_CO_URL_TEMPLATE", template)
        monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path / "hf-cache"))
        # By git-lfs: the server knows nothing of the other way, a storage service with a protocol of its own.
        monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_DISABLE_XET", True)
        monkeypatch.setenv("HF_TOKEN", TOKEN)
        monkeypatch.setenv("MODELSCOPE_ENDPOINT", hub.url)
        monkeypatch.setenv("MODELSCOPE_API_TOKEN", TOKEN)
        monkeypatch.setenv("MODELSCOPE_CACHE", str(tmp_path / "ms-cache"))
        set_default_config(None)
        yield hub
    set_default_config(None)


@pytest.fixture
def saved(tmp_path: Path) -> Path:
    return checkpoint(tmp_path / "run" / "final", seed=1)


def checkpoint(folder: Path, *, seed: int) -> Path:
    torch.manual_seed(seed)
    hypernetwork = Hypernetwork(tiny_hypernetwork_config(), Backbone(tiny_model()))
    info = CheckpointInfo(BackboneConfig(path="tiny"), hypernetwork.config, ("mqa",))
    save_hypernetwork(folder, hypernetwork.state_dict(), info)
    return folder


def one_line(capsys: pytest.CaptureFixture[str]) -> str:
    """What was said on standard error: one line and no traceback."""
    said = capsys.readouterr()
    errors = [line for line in said.err.splitlines() if line.startswith("error: ")]
    assert len(errors) == 1, said.err
    assert "Traceback" not in said.err
    assert said.out == ""
    return errors[0]


@pytest.mark.parametrize("kind", HUBS)
def test_what_is_pushed_is_pulled(kind: str, hub: Hub, saved: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """From a run's folder to the hub and back, byte for byte, with the hash of each file."""
    assert main(["push", str(saved.parent), f"{kind}:me/one", "--private"]) == 0
    pushed = capsys.readouterr().out.strip()
    assert pushed.startswith(f"{kind}:me/one")
    assert hub.private == {"me/one": True}
    assert main(["pull", pushed, str(tmp_path / "back")]) == 0
    assert capsys.readouterr().out == f"{tmp_path / 'back'}\n"
    assert sorted(file.name for file in (tmp_path / "back").iterdir()) == [
        "config.json",
        "hypernetwork.safetensors",
        "manifest.json",
    ]
    for file in saved.iterdir():
        assert (tmp_path / "back" / file.name).read_bytes() == file.read_bytes()
    assert damage(tmp_path / "back") is None


@pytest.mark.parametrize("kind", HUBS)
def test_a_repository_stands_where_a_checkpoint_does(kind: str, hub: Hub, saved: Path) -> None:
    main(["push", str(saved), f"{kind}:me/two"])
    loaded = load_hypernetwork(f"{kind}:me/two", Backbone(tiny_model()))
    assert read_info(f"{kind}:me/two") == read_info(saved)
    for name, tensor in read_weights(saved).items():
        assert torch.equal(loaded.state_dict()[name], tensor), name


@pytest.mark.parametrize("kind", HUBS)
def test_a_revision_stays_what_it_was(kind: str, hub: Hub, saved: Path, tmp_path: Path) -> None:
    main(["push", str(saved), f"{kind}:me/three"])
    branch = {"hf": "main", "ms": "master"}[kind]
    first = hub.heads["me/three"][branch]
    other = checkpoint(tmp_path / "other", seed=2)
    main(["push", str(other), f"{kind}:me/three"])
    for name, source in ((f"{kind}:me/three@{first}", saved), (f"{kind}:me/three", other)):
        assert torch.equal(read_weights(name)["memory_tokens"], read_weights(source)["memory_tokens"])


def test_a_push_makes_the_branch_it_names(hub: Hub, saved: Path, tmp_path: Path) -> None:
    """Where it is missing, and only there; the main branch stays as it is."""
    main(["push", str(saved), "hf:me/branches"])
    head = hub.heads["me/branches"]["main"]
    for seed in (2, 3):
        other = checkpoint(tmp_path / str(seed), seed=seed)
        assert main(["push", str(other), "hf:me/branches@try/one"]) == 0
        wanted = read_weights(other)["memory_tokens"]
        assert torch.equal(read_weights("hf:me/branches@try/one")["memory_tokens"], wanted)
    assert hub.heads["me/branches"]["main"] == head
    assert torch.equal(read_weights("hf:me/branches")["memory_tokens"], read_weights(saved)["memory_tokens"])


def train_from(url: str, caches: str, folder: str, output: str, machines: int) -> None:
    """A rank of a stage that starts from a hub, with a cache of its own; of two machines, or one."""
    rank = os.environ["RANK"]
    if machines == 2:
        os.environ |= {"LOCAL_RANK": "0", "LOCAL_WORLD_SIZE": "1"}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(huggingface_hub.constants, "ENDPOINT", url)
        patch.setattr(huggingface_hub.constants, "HUGGINGFACE_CO_URL_TEMPLATE", url + "/{repo_id}/resolve/{revision}/{filename}")
        patch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", f"{caches}/{rank}")
        patch.setattr(huggingface_hub.constants, "HF_HUB_DISABLE_XET", True)
        stage = stage_config("1qa", steps=2, micro_batch_size=1)
        train(train_config(folder, Path(output), stage=stage, checkpoint="hf:me/stage", from_scratch=False))


@pytest.mark.parametrize("machines", [1, 2])
def test_each_machine_downloads_a_checkpoint_once(
    machines: int, hub: Hub, saved: Path, tiny_backbone_folder: str, tmp_path: Path
) -> None:
    """Two ranks; what one machine has in its cache, another does not."""
    main(["push", str(saved), "hf:me/stage"])
    args = (hub.url, str(tmp_path / "caches"), tiny_backbone_folder, str(tmp_path / "next"), machines)
    assert call_on_ranks(2, train_from, *args) == [0, 0]
    assert sorted(cache.name for cache in (tmp_path / "caches").iterdir()) == ["0", "1"][:machines]
    info = read_info(tmp_path / "next")
    assert info is not None
    assert info.stages == ("mqa", "1qa")


@pytest.mark.parametrize("kind", HUBS)
def test_a_released_directory_travels_too(kind: str, hub: Hub, tmp_path: Path) -> None:
    assert main(["push", str(RELEASED), f"{kind}:me/released"]) == 0
    assert main(["pull", f"{kind}:me/released", str(tmp_path / "back")]) == 0
    assert torch.equal(read_weights(tmp_path / "back")["memory_tokens"], read_weights(RELEASED)["memory_tokens"])


@pytest.mark.parametrize("kind", HUBS)
def test_a_push_replaces_a_checkpoint_of_the_other_format(kind: str, hub: Hub, saved: Path, tmp_path: Path) -> None:
    """Ours over a released one and back; what else the repository holds stays."""
    branch = {"hf": "main", "ms": "master"}[kind]
    hub.create("me/twelve", private=False, main=branch)
    hub.commit("me/twelve", branch, {"README.md": b"hello"})
    for source in (RELEASED, saved, RELEASED):
        assert main(["push", str(source), f"{kind}:me/twelve"]) == 0
        _, files = hub.find("me/twelve", branch)
        names = {file.name for file in source.iterdir()} & set(FILES)
        assert set(files) == names | {"manifest.json", "README.md"}
        # ModelScope's cache keeps what a repository no longer has, which is refused with the advice to delete it.
        shutil.rmtree(tmp_path / "ms-cache", ignore_errors=True)
        assert torch.equal(read_weights(f"{kind}:me/twelve")["memory_tokens"], read_weights(source)["memory_tokens"])


@pytest.mark.parametrize("kind", HUBS)
def test_two_formats_in_one_repository_are_refused(kind: str, hub: Hub, saved: Path) -> None:
    main(["push", str(saved), f"{kind}:me/thirteen"])
    files = {name: (RELEASED / name).read_bytes() for name in RELEASED_FILES}
    hub.commit("me/thirteen", {"hf": "main", "ms": "master"}[kind], files)
    with pytest.raises(ValueError, match=r"mem_tokens\.pt is of another checkpoint than the one that was pushed; delete"):
        read_weights(f"{kind}:me/thirteen")


@pytest.mark.parametrize("kind", HUBS)
def test_what_is_damaged_on_the_hub_is_refused(
    kind: str, hub: Hub, saved: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The hub serves it with a hash of its own; the manifest that was pushed knows better. Nothing is written."""
    main(["push", str(saved), f"{kind}:me/four"])
    branch = {"hf": "main", "ms": "master"}[kind]
    weights = bytearray((saved / "hypernetwork.safetensors").read_bytes())
    weights[-1] ^= 1
    hub.commit("me/four", branch, {"hypernetwork.safetensors": bytes(weights)})
    capsys.readouterr()
    assert main(["pull", f"{kind}:me/four", str(tmp_path / "back")]) == 2
    assert "hypernetwork.safetensors is not as it was written; delete" in one_line(capsys)
    assert not (tmp_path / "back").exists()
    with pytest.raises(ValueError, match="is not as it was written"):
        load_hypernetwork(f"{kind}:me/four", Backbone(tiny_model()))


@pytest.mark.parametrize("kind", HUBS)
def test_a_malicious_pickle_on_a_hub_is_refused(kind: str, hub: Hub, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    import pickle

    class Trap:
        def __reduce__(self) -> tuple[object, tuple[str]]:
            return os.mkdir, (str(tmp_path / "trapped"),)

    hub.create("me/trap", private=False, main={"hf": "main", "ms": "master"}[kind])
    files = {name: (RELEASED / name).read_bytes() for name in ("mem_tokens.pt", "metanetwork.pth", "metalora.pth")}
    hub.commit("me/trap", {"hf": "main", "ms": "master"}[kind], {**files, "metalora.pth": pickle.dumps(Trap(), protocol=2)})
    assert main(["pull", f"{kind}:me/trap", str(tmp_path / "back")]) == 2
    assert "not a file of plain weights" in one_line(capsys)
    assert not (tmp_path / "back").exists()
    assert not (tmp_path / "trapped").exists()


@pytest.mark.parametrize("kind", HUBS)
@pytest.mark.parametrize(
    ("name", "reason"),
    [("nobody/nothing", "check name, revision and network"), ("me/five@gone", "check name, revision and network")],
)
def test_what_is_not_there_is_one_line(
    kind: str, name: str, reason: str, hub: Hub, saved: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    main(["push", str(saved), f"{kind}:me/five"])
    capsys.readouterr()
    assert main(["pull", f"{kind}:{name}", str(tmp_path / "back")]) == 2
    assert reason in one_line(capsys)
    assert not (tmp_path / "back").exists()


@pytest.mark.parametrize("kind", HUBS)
def test_a_repository_without_a_checkpoint_is_named(
    kind: str, hub: Hub, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    branch = {"hf": "main", "ms": "master"}[kind]
    hub.create("me/six", private=False, main=branch)
    hub.commit("me/six", branch, {"README.md": b"hello"})
    assert main(["pull", f"{kind}:me/six", str(tmp_path / "back")]) == 2
    assert f"{kind}:me/six holds no checkpoint: none of config.json, " in one_line(capsys)


@pytest.mark.parametrize("kind", HUBS)
def test_a_push_without_the_right_to_is_one_line(
    kind: str, hub: Hub, saved: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv({"hf": "HF_TOKEN", "ms": "MODELSCOPE_API_TOKEN"}[kind], "wrong")
    assert main(["push", str(saved), f"{kind}:me/seven"]) == 2
    assert {"hf": "hf auth login", "ms": "modelscope login"}[kind] in one_line(capsys)
    assert hub.commits == {}


def test_what_cannot_be_read_is_not_pushed(hub: Hub, saved: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (saved / "hypernetwork.safetensors").write_bytes(b"x")
    assert main(["push", str(saved), "hf:me/eight"]) == 2
    assert "cannot be read" in one_line(capsys)
    assert hub.requests == []


def test_offline_takes_what_was_pulled_before(
    hub: Hub, saved: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    main(["push", str(saved), "hf:me/nine"])
    main(["push", str(saved), "hf:me/ten"])
    folder = download(HubId("hf", "me/nine"))
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    asked = len(hub.requests)
    assert download(HubId("hf", "me/nine")) == folder
    capsys.readouterr()
    assert main(["pull", "hf:me/ten", str(tmp_path / "back")]) == 2
    assert "check name, revision and network" in one_line(capsys)
    assert main(["push", str(saved), "hf:me/ten"]) == 2
    assert "offline" in one_line(capsys)
    assert len(hub.requests) == asked


@pytest.mark.slow
@pytest.mark.parametrize("kind", HUBS)
def test_the_environment_says_where_the_hubs_are(kind: str, hub: Hub, saved: Path, tmp_path: Path) -> None:
    """In a process of its own, as a user has it: HF_ENDPOINT, then HF_HUB_OFFLINE; MODELSCOPE_ENDPOINT."""
    main(["push", str(saved), f"{kind}:me/eleven"])
    environment = {**os.environ, "HF_ENDPOINT": hub.url, "HF_HOME": str(tmp_path / "home")}

    def pull(name: str, **more: str) -> subprocess.CompletedProcess[str]:
        command = [sys.executable, "-m", "shine.cli.main", "pull", f"{kind}:me/eleven", str(tmp_path / name)]
        return subprocess.run(command, env={**environment, **more}, capture_output=True, text=True, timeout=120)

    assert pull("one").returncode == 0
    if kind == "hf":
        assert pull("two", HF_HUB_OFFLINE="1", HF_ENDPOINT="http://127.0.0.1:9").returncode == 0
        shutil.rmtree(tmp_path / "home")
        refused = pull("three", HF_HUB_OFFLINE="1")
        assert refused.returncode == 2
        assert refused.stderr.count("\n") == 1


def test_a_name_is_a_repository_or_a_path() -> None:
    assert hub_id("hf:me/x") == HubId("hf", "me/x")
    assert hub_id("ms:me/x@v1.0") == HubId("ms", "me/x", "v1.0")
    assert str(HubId("hf", "me/x", "abc")) == "hf:me/x@abc"
    assert hub_id("outputs/x") is None
    assert hub_id(Path("hf:me/x")) is None
    for odd in ("hf:x", "hf:me/x/y", "ms:me/x@", "hf:../x/y"):
        with pytest.raises(ValueError, match="not a repository; write hf:owner/name"):
            hub_id(odd)


def test_pull_does_not_write_over_a_folder(hub: Hub, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["pull", "hf:me/x", str(tmp_path)]) == 2
    assert "is there already; name another folder" in one_line(capsys)
    assert main(["push", str(tmp_path), "me/x"]) == 2
    assert "no hub named; write hf:me/x or ms:me/x" in one_line(capsys)
    assert hub.requests == []
