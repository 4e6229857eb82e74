"""Coverage-guided fuzzing of everything that reads what comes from outside: `make fuzz`, or `make fuzz T=rows S=600`.

What a reader takes or refuses with an error of this package is fine; any other exception, ten seconds or a GiB end the
run and print the input, which then belongs into `test_fuzz.py` or among the hostile inputs. Needs atheris.
"""

import argparse
import json
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path
from tempfile import TemporaryDirectory

MOST_S, MOST_MIB = 10, 1024
MEMORY = Path("/dev/shm")
"""Where a file costs no disk."""


def gguf_header(content: bytes, place: Path) -> None:
    from qlora_core.hub.gguf_header import read_header

    read_header(written(place / "model.gguf", content))


def tensor_header(content: bytes, place: Path) -> None:
    from qlora_core.merging.tensors import read_file

    read_file(written(place / "model.safetensors", content))


def tensor_index(content: bytes, place: Path) -> None:
    from qlora_core.merging.tensors import read_folder

    written(place / "model.safetensors.index.json", content)
    read_folder(place)


def adapter_config(content: bytes, place: Path) -> None:
    from qlora_core.merging.adapter import read_changes
    from tests.unit.hostile.test_fuzz import WEIGHTS

    written(place / "adapter_config.json", content)
    written(place / "adapter_model.safetensors", WEIGHTS)
    read_changes(place, {}, tied=False)


def model_config(content: bytes, place: Path) -> None:
    from qlora_core.modeling.load import read_architecture

    written(place / "config.json", content)
    read_architecture(place)


def recipe(content: bytes, place: Path) -> None:
    from qlora_core.recipe import load_recipe

    load_recipe(written(place / "recipe.yaml", content))


def archive(content: bytes, place: Path) -> None:
    from qlora_core.hub.archive import extract

    suffix = ".zip" if content.startswith(b"PK") else ".tar.gz" if content.startswith(b"\x1f\x8b") else ".tar"
    extract(written(place / f"package{suffix}", content), "data/rows.json", place / "rows.json")


def rows(content: bytes, place: Path) -> None:
    """The first byte says what the file is called."""
    from qlora_core.data.formats import to_conversation
    from qlora_core.data.read import inspect, read_rows
    from qlora_core.data.reasons import RowProblem

    suffixes = (".jsonl", ".json", ".csv", ".parquet", ".jsonl.gz", ".jsonl.zst")
    path = written(place / f"rows{suffixes[content[0] % len(suffixes)] if content else suffixes[0]}", content[1:])
    inspect(path)
    for number, row in read_rows(path):
        if not isinstance(row, RowProblem):
            with suppress(RowProblem):
                to_conversation(row, "auto", path.name, number)


TARGETS: dict[str, Callable[[bytes, Path], None]] = {
    reader.__name__: reader
    for reader in (gguf_header, tensor_header, tensor_index, adapter_config, model_config, recipe, archive, rows)
}


def seeds(target: str) -> Iterator[bytes]:
    """Inputs from which to go on: well-formed ones, and known hostile ones that are small."""
    from tests.unit.hostile import data_files, model_files, recipes
    from tests.unit.hostile.test_fuzz import CONFIG, WEIGHTS

    suffixes = (".jsonl", ".json", ".csv", ".parquet", ".gz", ".zst")
    index = {"metadata": {"total_size": 4}, "weight_map": {"a": "model-00001-of-00001.safetensors"}}
    known: dict[str, list[bytes]] = {
        "gguf_header": list(model_files.GGUF.values()),
        "tensor_header": [WEIGHTS],
        "tensor_index": [json.dumps(index).encode()],
        "adapter_config": [json.dumps(CONFIG).encode()],
        "model_config": [json.dumps({"model_type": "llama", "hidden_size": 8, "num_hidden_layers": 1}).encode()],
        "recipe": [json.dumps(recipes.GOOD, indent=1).encode(), *recipes.YAML.values()],
        "archive": [content for _, content, _ in model_files.ARCHIVES()],
        "rows": [
            bytes([next(n for n, suffix in enumerate(suffixes) if file.endswith(suffix))]) + content
            for file, content in data_files.FILES.values()
            if file.endswith(suffixes)
        ],
    }
    yield from (content for content in known[target] if len(content) < 1 << 16)


def written(path: Path, content: bytes) -> Path:
    path.write_bytes(content)
    return path


def fuzz(target: str, seconds: int) -> None:
    """Until the time is up or something is found; ends the process."""
    import atheris

    with atheris.instrument_imports(include=["qlora_core"]):
        from qlora_core.errors import QloraError

        with suppress(Exception):
            TARGETS[target](b"{}", Path(TemporaryDirectory(dir=MEMORY if MEMORY.is_dir() else None).name))
    folder = TemporaryDirectory(prefix="qlora-fuzz-", dir=MEMORY if MEMORY.is_dir() else None)
    corpus = Path(folder.name) / "corpus"
    corpus.mkdir()
    for number, content in enumerate(seeds(target)):
        written(corpus / str(number), content)
    place = Path(folder.name) / "place"
    place.mkdir()

    def one(content: bytes) -> None:
        with suppress(QloraError):
            TARGETS[target](content, place)
        for file in place.iterdir():
            file.unlink()

    limits = [f"-max_total_time={seconds}", f"-timeout={MOST_S}", f"-rss_limit_mb={2 * MOST_MIB}", "-max_len=65536"]
    atheris.Setup([sys.argv[0], *limits, f"-artifact_prefix={Path.cwd()}/found-{target}-", str(corpus)], one)
    atheris.Fuzz()


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--target", choices=TARGETS, action="append")
    parser.add_argument("--seconds", type=int, default=60)
    parser.add_argument("--one", choices=TARGETS, help=argparse.SUPPRESS)
    asked = parser.parse_args()
    if asked.one:
        fuzz(asked.one, asked.seconds)
    found = 0
    for target in asked.target or TARGETS:
        command = [sys.executable, "-m", "tests.unit.hostile.fuzz", "--one", target, "--seconds", str(asked.seconds)]
        done = subprocess.run(command, capture_output=True, text=True, env={**os.environ, "OMP_NUM_THREADS": "1"})
        last = [line for line in done.stderr.splitlines() if line.startswith(("Done ", "#"))][-1:]
        found += done.returncode != 0
        print(f"{target}: {'FOUND' if done.returncode else 'nothing found'}; {' '.join(last)}", flush=True)  # noqa: T201
        if done.returncode:
            print(done.stdout[-3000:] + done.stderr[-3000:], flush=True)  # noqa: T201
    return min(found, 1)


if __name__ == "__main__":
    sys.exit(main())
