"""A model folder, a GGUF file, a data file or a folder of data files on this machine."""

import json
from pathlib import Path

from qlora_core.errors import SourceError
from qlora_core.events import Report
from qlora_core.hub.disk import digest_of_files
from qlora_core.hub.resolved import Files, Resolved, Role, require_pinned
from qlora_core.hub.select import select_data_files, select_model_files
from qlora_core.recipe import LocalSource


def resolve(source: LocalSource, role: Role, downloads: Path) -> Resolved:
    """Pin the source to a digest of what it holds now.

    Raises:
        SourceError: the path does not exist or holds nothing that can be used.
    """
    path = source.path
    if not path.exists() and not (role == "data" and _is_pattern(path)):
        near = sorted(p.name for p in path.parent.iterdir())[:10] if path.parent.is_dir() else []
        hint = f"that folder holds {', '.join(near)}" if near else f"the folder {path.parent} does not exist either"
        raise SourceError(f"path: {path} does not exist; {hint}. A relative path starts at the recipe's folder")
    files = _model(source) if role == "model" else _data(path)
    revision = digest_of_files(files, downloads)
    require_pinned(str(path), source.revision, revision)
    return Resolved(source=source, description=f"local {path}", revision=revision, name=path.name)


def model_files(source: LocalSource, resolved: Resolved, downloads: Path, scratch: Path, report: Report) -> Files:
    """The files of a model folder, or one GGUF file.

    Raises:
        SourceError: it is no model, or has changed since it was resolved.
    """
    return _unchanged(_model(source), resolved, downloads)


def data_files(source: LocalSource, resolved: Resolved, downloads: Path, scratch: Path, report: Report) -> Files:
    """The one data file, or all data files of the folder.

    Raises:
        SourceError: there are none, or they have changed since they were resolved.
    """
    return _unchanged(_data(source.path), resolved, downloads)


def model_files_of(source: LocalSource) -> Files:
    """The same by name, without a look at their content."""
    return _model(source)


def _is_model(path: Path) -> bool:
    return path.suffix == ".gguf" if path.is_file() else (path / "config.json").is_file()


def _model(source: LocalSource) -> Files:
    path = source.path
    if not _is_model(path):
        raise SourceError(f"{path} is no model; it must be a folder with a config.json, or a .gguf file")
    if path.is_file():
        return {path.name: path}
    names = select_model_files(_names(path), str(path), source.trust_remote_code)
    index = path / "model.safetensors.index.json"
    if index.is_file() and "model.safetensors" not in names:
        missing = sorted(set(json.loads(index.read_text())["weight_map"].values()) - set(names))
        if missing:
            raise SourceError(f"{path} is not whole: {index.name} names {', '.join(missing[:5])}; copy them there")
    return {name: path / name for name in names}


def _data(path: Path) -> Files:
    if path.is_file():
        return {path.name: path}
    if path.exists() or not _is_pattern(path):
        return {name: path / name for name in select_data_files(_names(path), str(path))}
    folder = next(parent for parent in path.parents if not _is_pattern(parent))
    fitting = folder.glob(path.relative_to(folder).as_posix())
    found = [file.relative_to(folder).as_posix() for file in fitting if file.is_file()]
    return {name: folder / name for name in select_data_files(found, str(path))}


def _is_pattern(path: Path) -> bool:
    return any(sign in path.as_posix() for sign in "*?[")


def _names(folder: Path) -> list[str]:
    return [file.relative_to(folder).as_posix() for file in folder.rglob("*") if file.is_file()]


def _unchanged(files: Files, resolved: Resolved, downloads: Path) -> Files:
    if digest_of_files(files, downloads) != resolved.revision:
        raise SourceError(f"{resolved.description} changed while it was being used; run again when it is quiet")
    return files
