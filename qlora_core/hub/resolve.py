"""The front door of the hub: pin a source, then fetch the model or the data that it names.

Every kind of source answers three questions: what it is pinned to (`resolve`), and where its verified files are on
this machine once fetched (`model_files`, `data_files`). What is done with the files is the same for all.
"""

import importlib
from collections.abc import Sequence
from pathlib import Path
from typing import Protocol

from qlora_core.artifacts import DataFile, DataSnapshot, ModelSnapshot, TwinProof
from qlora_core.errors import SourceError, refusing
from qlora_core.events import Note, Report
from qlora_core.hub.disk import place, require_space
from qlora_core.hub.resolved import Files, Resolved, Role
from qlora_core.hub.sizes import ModelSize, model_size
from qlora_core.hub.snapshot import SnapshotSpec, TwinSpec
from qlora_core.process import run_child
from qlora_core.recipe import LocalSource, Source
from qlora_core.store import discard, write_atomically

VERSION = 3
"""Of the model stage; raised when the same source gives other files than before."""

TWIN_VERSION = 1
"""Of the proof that two models are twins."""

KINDS = {
    "package": "qlora_core.hub.package",
    "local": "qlora_core.hub.local",
    "huggingface": "qlora_core.hub.repository",
    "modelscope": "qlora_core.hub.repository",
    "s3": "qlora_core.hub.s3",
}
"""Kind of source to its module, imported when one is used: each brings its own client library."""


class _Kind(Protocol):
    """What the module of a kind of source offers."""

    def resolve(self, source: Source, role: Role, downloads: Path) -> Resolved: ...

    def model_files(
        self, source: Source, resolved: Resolved, downloads: Path, scratch: Path, report: Report
    ) -> Files: ...

    def data_files(
        self, source: Source, resolved: Resolved, downloads: Path, scratch: Path, report: Report
    ) -> Files: ...


def resolve(source: Source, role: Role, downloads: Path) -> Resolved:
    """Pin a source to what it holds now; may ask the network, never fetches weights or rows.

    Args:
        source: from the recipe.
        role: what it is wanted for.
        downloads: the folder of verified downloads.

    Raises:
        SourceError: there is no such thing.
        SourceUnavailableError: it could not be asked now.
    """
    with refusing(SourceError, f"what the source {source.source} holds"):
        return _kind_of(source).resolve(source, role, downloads)


def fetch_model(resolved: Resolved, downloads: Path, into: Path, report: Report) -> ModelSnapshot:
    """Write a plain transformers folder (safetensors, config, tokenizer, chat template) into `into`.

    Args:
        resolved: what `resolve` answered.
        downloads: the folder of verified downloads, shared between runs.
        into: an empty folder, or one that an interrupted attempt left.
        report: hears progress.

    Raises:
        SourceError: it is no model that can be used, or not what was pinned.
        SourceUnavailableError: it could not be reached now.
    """
    _clear(into)
    scratch = into / "scratch"
    scratch.mkdir()
    source = resolved.source
    with refusing(SourceError, f"what {resolved.description} holds"):
        files = _kind_of(source).model_files(source, resolved, downloads, scratch, report)
    gguf = next((file for name, file in files.items() if name.endswith(".gguf")), None)
    if gguf is None:
        _place_all(files, into, source)
    spec = SnapshotSpec(into=into, gguf=gguf, source=resolved.description, revision=resolved.revision)
    record = run_child("qlora_core.hub.snapshot:build", spec, scratch / "child", report)
    discard(scratch)
    return ModelSnapshot.model_validate(record)


def find_twin(base: Resolved, snapshot: ModelSnapshot, merge_base: Source | None, downloads: Path) -> Resolved:
    """The unquantized model that a quantized one was made from; not proven yet, and nothing is fetched.

    Args:
        base: the quantized model, as resolved.
        snapshot: the same on disk.
        merge_base: what the recipe says; None looks for it by the model's card and by its name.
        downloads: the folder of verified downloads.

    Raises:
        SourceError: it was not found; the message lists what was tried.
    """
    from qlora_core.hub.twin import candidates, explain_no_twin

    if merge_base is not None:
        return resolve(merge_base, "model", downloads)
    tried: list[tuple[Source, SourceError]] = []
    for source in candidates(base, snapshot):
        try:
            return resolve(source, "model", downloads)
        except SourceError as problem:
            tried.append((source, problem))
    raise explain_no_twin(base, tried)


def prove_twin(quantized: ModelSnapshot, twin: ModelSnapshot, into: Path, report: Report) -> TwinProof:
    """Compare architecture, tensor names, shapes, unquantized values and tokenizers, in a child process.

    Raises:
        SourceError: they differ; the message names the field, tensor or token and says what to set.
    """
    spec = TwinSpec(quantized=quantized, twin=twin)
    proof = TwinProof.model_validate(run_child("qlora_core.hub.twin_proof:prove", spec, into / "child", report))
    write_atomically(into / "proof.json", proof.model_dump_json(indent=1, exclude={"path"}))
    return proof.model_copy(update={"path": into})


def fetch_data(
    rows: Sequence[Resolved],
    forgetting: Sequence[Resolved],
    downloads: Path,
    into: Path,
    report: Report,
    evaluation: Sequence[Resolved] = (),
) -> DataSnapshot:
    """Write the raw files into a folder for each role, in the order given, under unique names.

    Raises:
        SourceError: a source holds no data files, or not what was pinned.
        SourceUnavailableError: a source could not be reached now.
    """
    _clear(into)
    snapshot = DataSnapshot(
        path=into,
        rows=_fetch_all(rows, "rows", downloads, into, report),
        forgetting=_fetch_all(forgetting, "forgetting", downloads, into, report),
        evaluation=_fetch_all(evaluation, "evaluation", downloads, into, report),
    )
    discard(into / "scratch")
    return snapshot


def _fetch_all(
    sources: Sequence[Resolved], role: str, downloads: Path, into: Path, report: Report
) -> tuple[DataFile, ...]:
    found = []
    for number, resolved in enumerate(sources):
        scratch = into / "scratch" / role / str(number)
        scratch.mkdir(parents=True)
        report(Note(message=f"fetching {resolved.name} from {resolved.description}"))
        with refusing(SourceError, f"what {resolved.description} holds"):
            files = _kind_of(resolved.source).data_files(resolved.source, resolved, downloads, scratch, report)
        for name, file in files.items():
            target = _unused(into / role / name)
            place(file, target, share=not isinstance(resolved.source, LocalSource))
            found.append(
                DataFile(
                    name=target.relative_to(into).as_posix(),
                    source=resolved.description,
                    bytes=target.stat().st_size,
                    entry=number,
                )
            )
    return tuple(found)


def _place_all(files: Files, into: Path, source: Source) -> None:
    is_ours = not isinstance(source, LocalSource)
    if not is_ours:
        require_space(into, sum(file.stat().st_size for file in files.values()), "copying the model")
    for name, file in files.items():
        place(file, into / name, share=is_ours)


def _unused(target: Path) -> Path:
    """The path itself, or with the first number that makes it unique."""
    number, unused = 2, target
    stem, dot, suffixes = target.name.partition(".")
    while unused.exists():
        unused = target.with_name(f"{stem}-{number}{dot}{suffixes}")
        number += 1
    return unused


def _clear(into: Path) -> None:
    """Remove what an interrupted attempt left; what is worth keeping of it lies in the downloads."""
    discard(into)
    into.mkdir(parents=True)


def _kind_of(source: Source) -> _Kind:
    kind: _Kind = importlib.import_module(KINDS[source.source])
    return kind


__all__ = [
    "TWIN_VERSION",
    "VERSION",
    "ModelSize",
    "Resolved",
    "fetch_data",
    "fetch_model",
    "find_twin",
    "model_size",
    "prove_twin",
    "resolve",
]
