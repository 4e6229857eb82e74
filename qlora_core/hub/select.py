"""Which files of a repository or folder are needed: one copy of the weights, and what describes them."""

import re
from collections.abc import Iterable
from fnmatch import fnmatch

from qlora_core.errors import SourceError

BESIDE_WEIGHTS = (
    "*.json",
    "*.jinja",
    "*.txt",
    "*.tiktoken",
    "tokenizer.model",
    "LICEN[CS]E*",
    "NOTICE*",
    "USE_POLICY*",
    "README.md",
)
NEVER = ("*.bin.index.json", "*.msgpack.index.json", "*.h5.index.json", "dataset_info*.json")
PICKLES = ("*.bin", "*.pt", "*.pth", "*.ckpt", "*.pkl")
WHOLE = re.compile(r"^model\.safetensors$")
SHARD = re.compile(r"^model-\d+-of-\d+\.safetensors$")
GPTQ = re.compile(r"^gptq_model[\w.-]*\.safetensors$")
DATA_SUFFIXES = (".json", ".jsonl", ".ndjson", ".parquet", ".csv", ".txt")
COMPRESSIONS = (".gz", ".zst")


def select_model_files(names: Iterable[str], where: str, code: bool = False) -> list[str]:
    """Names of the files that transformers loads a model and its tokenizer from, at the top level of `names`.

    Repositories often hold the weights several times (as pickles, for other frameworks, as one consolidated file);
    only the first of these sets is taken: model.safetensors, its shards, a GPTQ file.

    Args:
        names: of all files.
        where: what to call the place in an error.
        code: whether the model's own Python files are trusted and wanted.

    Raises:
        SourceError: there are no safetensors, or no config.json.
    """
    top = sorted(name for name in names if "/" not in name or name.startswith("additional_chat_templates/"))
    weights = next((found for kind in (WHOLE, SHARD, GPTQ) if (found := [n for n in top if kind.match(n)])), [])
    if not weights:
        _explain_missing_weights(top, where)
    if "config.json" not in top:
        raise SourceError(f"{where} has weights but no config.json, so it is no model that transformers can load")
    beside = (*BESIDE_WEIGHTS, "*.py") if code else BESIDE_WEIGHTS
    return weights + [name for name in top if _matches(name, beside) and not _matches(name, NEVER)]


def select_data_files(names: Iterable[str], where: str) -> list[str]:
    """Names of the files that hold rows or text.

    Raises:
        SourceError: there are none.
    """
    found = sorted(name for name in names if _plain(name).endswith(DATA_SUFFIXES) and not _is_about_data(name))
    if not found:
        raise SourceError(f"{where} holds no data files; they end with {', '.join(DATA_SUFFIXES)}")
    return found


def _explain_missing_weights(names: list[str], where: str) -> None:
    pickles = [name for name in names if _matches(name, PICKLES)]
    if pickles:
        raise SourceError(
            f"{where} holds its weights only as pickles ({', '.join(pickles[:3])}), which can run code when loaded; "
            "safetensors are needed. Convert it once, on a machine where you trust it: load it with transformers "
            "and call `save_pretrained(folder)`, then use `source: local` with that folder"
        )
    near = [name for name in names if name.endswith((".safetensors", ".gguf"))]
    hint = f"; it has {', '.join(near[:5])}" if near else ""
    raise SourceError(f"{where} holds no model.safetensors or model-00001-of-0000N.safetensors{hint}")


def _matches(name: str, patterns: tuple[str, ...]) -> bool:
    return any(fnmatch(name, pattern) for pattern in patterns)


def _plain(name: str) -> str:
    """The name without the suffix of a compression."""
    return next((name.removesuffix(end) for end in COMPRESSIONS if name.endswith(end)), name)


def _is_about_data(name: str) -> bool:
    """Descriptions that hubs and tools put beside the data, and hidden files."""
    base = name.rpartition("/")[2]
    return base.startswith((".", "dataset_info")) or base.lower() in ("readme.txt", "license.txt", "metadata.json")
