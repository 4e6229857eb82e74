"""The real clients of Hugging Face and ModelScope against a hub on loopback."""

import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import pytest

from qlora_core.artifacts import Architecture, ModelSnapshot
from qlora_core.errors import SourceError, SourceUnavailableError
from qlora_core.events import Event, Progress, ignore
from qlora_core.hub import disk, repository
from qlora_core.hub.resolve import fetch_data, fetch_model, find_twin, resolve
from qlora_core.recipe import HubSource
from tests.integration.hub_server import Fault, HubServer, running
from tests.tiny import write_model

WEIGHTS = bytes(range(256)) * 4000
MODEL = {
    "config.json": b"{}",
    "model.safetensors": WEIGHTS,
    "tokenizer.json": b'{"a": 1}',
    "pytorch_model.bin": WEIGHTS,
    "README.md": b"# A model",
    "onnx/model.onnx": WEIGHTS,
}
NEEDED = ["README.md", "config.json", "model.safetensors", "tokenizer.json"]
NEVER_ANSWERS = "http://127.0.0.1:1"
FACTS = Architecture(
    model_type="llama",
    layers=1,
    hidden=8,
    intermediate=8,
    heads=1,
    kv_heads=1,
    vocab=8,
    context_tokens=8,
    parameters=8,
    tied_embeddings=True,
)


class Place(NamedTuple):
    """One hub and the folder of this machine's downloads."""

    name: str
    server: HubServer
    downloads: Path

    @property
    def token(self) -> str:
        return {"huggingface": "HF_TOKEN", "modelscope": "MODELSCOPE_API_TOKEN"}[self.name]

    def source(self, **changes: object) -> HubSource:
        return HubSource.model_validate({"source": self.name, "repo": "acme/tiny", **changes})

    def model(self, source: HubSource | None = None, report=ignore) -> dict[str, bytes]:
        """The content of the files of a model, by name."""
        resolved = resolve(source or self.source(), "model", self.downloads)
        files = repository.model_files(resolved.source, resolved, self.downloads, self.downloads, report)
        return {name: path.read_bytes() for name, path in files.items()}


@pytest.fixture(params=["huggingface", "modelscope"])
def hub(request, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[Place]:
    with running() as server:
        for name in ("HF_TOKEN", "HF_HUB_OFFLINE", "MODELSCOPE_API_TOKEN"):
            monkeypatch.delenv(name, raising=False)
        monkeypatch.setenv("HF_ENDPOINT", server.url)
        monkeypatch.setenv("MODELSCOPE_ENDPOINT", server.url)
        monkeypatch.setenv("MODELSCOPE_HOME", str(tmp_path / "modelscope-home"))
        server.commit("models", "acme/tiny", MODEL)
        yield Place(request.param, server, tmp_path / "downloads")


def test_only_the_files_that_are_needed_are_fetched(hub):
    assert hub.model() == {name: MODEL[name] for name in NEEDED}
    assert len(hub.server.downloads()) == len(NEEDED)


def test_resolving_fetches_no_file(hub):
    commit = hub.server.repos["models", "acme/tiny"].commits[-1].id
    assert resolve(hub.source(), "model", hub.downloads).revision == commit
    assert hub.server.downloads() == []


def test_a_download_cut_in_the_middle_of_a_file_goes_on_there(hub):
    long = WEIGHTS * 15
    hub.server.commit("models", "acme/tiny", {**MODEL, "model.safetensors": long})
    hub.server.faults = [Fault("model.safetensors", cut_after_bytes=14_000_000)]
    assert hub.model()["model.safetensors"] == long
    (_, first), (_, second) = hub.server.downloads("model.safetensors")
    assert first is None
    assert second is not None and int(second.removeprefix("bytes=").rstrip("-")) >= 10_000_000


@pytest.mark.parametrize("status", [429, 503])
def test_a_busy_hub_is_asked_again(hub, status):
    asked = {"huggingface": "/api/models/acme/tiny", "modelscope": "/repo/files"}[hub.name]
    hub.server.faults = [
        Fault(asked, status=status),
        Fault(asked, status=status, retry_after_s=1),
        Fault("model.safetensors", status=status),
    ]
    assert hub.model()["model.safetensors"] == WEIGHTS
    assert hub.server.faults == []


def test_wrong_bytes_are_refused_and_fetched_anew_by_the_next_run(hub):
    hub.server.corrupt = {"model.safetensors"}
    with pytest.raises(SourceError, match=r"model\.safetensors of acme/tiny is not what|sent wrong bytes of acme/tiny"):
        hub.model()
    hub.server.corrupt = set()
    assert hub.model()["model.safetensors"] == WEIGHTS


def test_wrong_bytes_of_a_small_file_are_refused_too(hub):
    hub.server.corrupt = {"tokenizer.json"}
    with pytest.raises(SourceError, match=r"tokenizer\.json of acme/tiny is not what|sent wrong bytes of acme/tiny"):
        hub.model()


def test_a_private_repository_says_which_token_to_set(hub):
    hub.server.repos["models", "acme/tiny"].token = "secret"
    with pytest.raises(SourceError, match=rf"{hub.token} is not set.*set {hub.token} to a token") as caught:
        hub.model()
    assert not isinstance(caught.value, SourceUnavailableError)


def test_a_gated_repository_says_that_the_token_may_not_read_it(hub, monkeypatch):
    monkeypatch.setenv(hub.token, "wrong")
    repo = hub.server.repos["models", "acme/tiny"]
    repo.token, repo.gated = "secret", True
    with pytest.raises(SourceError, match=rf"the token in {hub.token} may not read it.*Accept its terms") as caught:
        hub.model()
    assert 'wrong"' not in str(caught.value)


def test_the_token_of_the_environment_opens_a_private_repository(hub, monkeypatch):
    monkeypatch.setenv(hub.token, "secret")
    hub.server.repos["models", "acme/tiny"].token = "secret"
    assert hub.model()["config.json"] == b"{}"


def test_a_missing_repository_names_its_neighbours(hub):
    hub.server.commit("models", "acme/tiny-chat", MODEL)
    with pytest.raises(SourceError, match=r"has no model acme/tinny; there are .*acme/tiny"):
        hub.model(hub.source(repo="acme/tinny"))


def test_a_missing_revision_is_named(hub):
    with pytest.raises(SourceError, match=r"has no model acme/tiny at revision v9"):
        hub.model(hub.source(revision="v9"))


def test_a_missing_data_file_names_its_neighbours(hub):
    hub.server.commit("datasets", "acme/rows", {"train.jsonl": b"{}", "test.jsonl": b"{}"})
    resolved = resolve(hub.source(repo="acme/rows", file="trian.jsonl"), "data", hub.downloads)
    with pytest.raises(SourceError, match=r"holds no file trian\.jsonl; it has train\.jsonl"):
        fetch_data([resolved], [], hub.downloads, hub.downloads / "into", ignore)


def test_a_moved_branch_does_not_change_a_pinned_run(hub):
    pinned = resolve(hub.source(), "model", hub.downloads)
    hub.server.commit("models", "acme/tiny", {**MODEL, "config.json": b'{"new": true}'})
    files = repository.model_files(pinned.source, pinned, hub.downloads, hub.downloads, ignore)
    assert files["config.json"].read_bytes() == b"{}"
    assert hub.model()["config.json"] == b'{"new": true}'
    assert hub.model(hub.source(revision=pinned.revision))["config.json"] == b"{}"


def test_a_second_run_of_a_pinned_recipe_asks_nothing(hub):
    pinned = hub.source(revision=resolve(hub.source(), "model", hub.downloads).revision)
    first = hub.model(pinned)
    hub.server.requests.clear()
    assert hub.model(pinned) == first
    assert hub.server.requests == []


def test_a_second_run_downloads_nothing(hub):
    first = hub.model()
    hub.server.requests.clear()
    assert hub.model() == first
    assert hub.server.downloads() == []


def test_what_is_here_is_used_offline(hub, monkeypatch):
    first = hub.model()
    hub.server.requests.clear()
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    assert hub.model() == first
    assert hub.server.requests == []


def test_offline_says_what_is_not_here(hub, monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    with pytest.raises(SourceUnavailableError, match=r"was never looked up .* HF_HUB_OFFLINE is set"):
        hub.model()
    assert hub.server.requests == []


def test_files_are_fetched_in_parallel(hub):
    hub.server.delay_s = 0.3
    hub.model()
    assert hub.server.most_at_once > 1


def test_progress_is_told_in_bytes(hub):
    events: list[Event] = []
    hub.model(report=events.append)
    told = [event for event in events if isinstance(event, Progress) and event.unit == "bytes"]
    assert told and told[-1].total == sum(len(MODEL[name]) for name in NEEDED)


def test_a_full_disk_is_noticed_before_anything_is_fetched(hub, monkeypatch):
    monkeypatch.setattr(disk, "SPARE_BYTES", 2**60)
    with pytest.raises(SourceError, match=r"downloading acme/tiny needs .* free some space"):
        hub.model()
    assert hub.server.downloads() == []


def test_a_data_set_of_the_same_name_is_another_thing(hub):
    hub.server.commit("datasets", "acme/tiny", {"train.jsonl": b'{"a": 1}\n', "README.md": b"# Rows"})
    resolved = resolve(hub.source(), "data", hub.downloads)
    snapshot = fetch_data([resolved], [], hub.downloads, hub.downloads.parent / "data", ignore)
    assert [(file.name, file.bytes) for file in snapshot.rows] == [("rows/train.jsonl", 9)]


def test_a_data_file_may_be_named_by_a_pattern(hub):
    files = {f"{name}.jsonl": b"{}" for name in ("train-2", "train-1", "test-1")}
    hub.server.commit("datasets", "acme/rows", files)
    resolved = resolve(hub.source(repo="acme/rows", file="train-*.jsonl"), "data", hub.downloads)
    snapshot = fetch_data([], [], hub.downloads, hub.downloads.parent / "data", ignore, [resolved])
    assert [file.name for file in snapshot.evaluation] == ["evaluation/train-1.jsonl", "evaluation/train-2.jsonl"]


def test_an_unreachable_hub_is_worth_a_retry(hub, monkeypatch):
    monkeypatch.setenv("HF_ENDPOINT", NEVER_ANSWERS)
    monkeypatch.setenv("MODELSCOPE_ENDPOINT", NEVER_ANSWERS)
    with pytest.raises(SourceUnavailableError, match=r"cannot be reached; try again later"):
        hub.model()


def test_the_next_hub_is_tried_when_the_first_is_down(hub, monkeypatch):
    first, other = hub.name, {"huggingface": "modelscope", "modelscope": "huggingface"}[hub.name]
    monkeypatch.setenv({"huggingface": "HF_ENDPOINT", "modelscope": "MODELSCOPE_ENDPOINT"}[first], NEVER_ANSWERS)
    resolved = resolve(hub.source(alternatives=[{"source": other, "repo": "acme/tiny"}]), "model", hub.downloads)
    assert resolved.source.source == other
    assert hub.model(resolved.source)["model.safetensors"] == WEIGHTS


def test_a_repository_that_no_hub_has_gives_every_reason(hub):
    source = hub.source(repo="acme/none", alternatives=[{"source": hub.name, "repo": "acme/nothing"}])
    with pytest.raises(SourceError, match=r"no model acme/none.*no model acme/nothing"):
        resolve(source, "model", hub.downloads)


def test_a_killed_download_leaves_nothing_that_looks_whole(hub):
    hub.server.delay_s = 30
    code = (
        "from pathlib import Path; from qlora_core.events import ignore; from qlora_core.hub import repository; "
        "from qlora_core.hub.resolve import resolve; from qlora_core.recipe import HubSource; "
        f"s = HubSource(source='{hub.name}', repo='acme/tiny'); d = Path('{hub.downloads}'); "
        "repository.model_files(s, resolve(s, 'model', d), d, d, ignore)"
    )
    child = subprocess.Popen([sys.executable, "-c", code], env=os.environ)
    while not hub.server.downloads("model.safetensors"):
        assert child.poll() is None
    child.kill()
    child.wait()
    hub.server.delay_s = 0
    assert hub.model()["model.safetensors"] == WEIGHTS


def test_a_model_of_a_hub_becomes_a_snapshot(hub, tmp_path):
    folder = write_model(tmp_path / "model")
    hub.server.commit("models", "acme/tiny", {file.name: file.read_bytes() for file in folder.iterdir()})
    resolved = resolve(hub.source(), "model", hub.downloads)
    snapshot = fetch_model(resolved, hub.downloads, tmp_path / "into", ignore)
    assert snapshot.source == f"{hub.name} acme/tiny@{resolved.revision[:12]}"
    assert (snapshot.architecture.layers, snapshot.quantization) == (2, None)
    assert sorted(file.name for file in snapshot.path.iterdir()) == sorted(file.name for file in folder.iterdir())


def test_the_twin_of_a_quantized_model_is_found_by_its_card_or_its_name(hub):
    hub.server.commit("models", "acme/tiny-Int4", MODEL)
    hub.server.commit("models", "acme/original", MODEL)
    base = resolve(hub.source(repo="acme/tiny-Int4"), "model", hub.downloads)
    folder = hub.downloads.parent / "quantized"
    folder.mkdir()
    snapshot = ModelSnapshot(path=folder, source="", revision="", architecture=FACTS, quantization="gptq-int4")
    assert find_twin(base, snapshot, None, hub.downloads).source.repo == "acme/tiny"
    (folder / "README.md").write_text("---\nbase_model: acme/original\n---\n")
    assert find_twin(base, snapshot, None, hub.downloads).source.repo == "acme/original"


def test_a_file_name_that_leaves_the_folder_is_refused(hub):
    hub.server.commit("models", "acme/tiny", {**MODEL, "../../evil.json": b"{}"})
    with pytest.raises(SourceError, match=r"lists a file named '\.\./\.\./evil\.json', which is no safe path"):
        hub.model()
    assert hub.server.downloads() == []


def test_a_missing_client_says_what_to_install(hub, monkeypatch):
    library = {"huggingface": "huggingface_hub", "modelscope": "modelscope_hub"}[hub.name]
    monkeypatch.setitem(sys.modules, library, None)
    monkeypatch.delitem(sys.modules, f"qlora_core.hub.{hub.name}", raising=False)
    with pytest.raises(SourceError, match=rf"pip install 'qlora-flows\[{hub.name}\]'"):
        resolve(hub.source(), "model", hub.downloads)
