"""Models that bring Python code of their own, which transformers runs only where the recipe trusts it.

Code files get into the store only when the recipe says `trust_remote_code` and pins the revision (`hub/select.py`), so
that a folder of the store holds code exactly when it may run.
"""

import json
from pathlib import Path

from qlora_core.errors import SourceError, refusing


def code_files(folder: Path) -> tuple[str, ...]:
    """Names of the Python files in a model folder."""
    return tuple(sorted(file.name for file in folder.glob("*.py")))


def may_run_code(folder: Path) -> bool:
    """What to give transformers as `trust_remote_code` for a folder of the store."""
    return bool(code_files(folder))


def refuse_code_elsewhere(folder: Path) -> None:
    """Refuse a folder whose code is in another repository: the pinned revision does not pin that one.

    Raises:
        SourceError: `auto_map` points outside of the folder.
    """
    for name in ("config.json", "tokenizer_config.json"):
        file = folder / name
        with refusing(SourceError, str(file)):
            places = json.loads(file.read_text()).get("auto_map", {}) if file.is_file() else {}
        for place in _flat(places):
            if "--" in place:
                raise SourceError(
                    f"{file}: auto_map names {place}, code of another repository, which no revision here pins; copy "
                    "that code beside the model, take the repository's name out of auto_map, and use `source: local`"
                )


def needs_code(folder: Path) -> str:
    """A hint to add to an error about a folder that cannot be loaded, empty if its config names no code."""
    try:
        named = json.loads((folder / "config.json").read_text()).get("auto_map")
    except (OSError, ValueError, AttributeError, RecursionError):  # what is wrong with it is said by who cannot load it
        return ""
    if not named or code_files(folder):
        return ""
    return (
        ". The model brings code of its own: read it, then set `trust_remote_code: true` and pin `revision` beside its "
        "`source`"
    )


def _flat(places: object) -> list[str]:
    """Every place that an `auto_map` names: its values are texts, or lists of them."""
    if isinstance(places, str):
        return [places]
    parts = places.values() if isinstance(places, dict) else places if isinstance(places, list) else ()
    return [place for part in parts for place in _flat(part)]
