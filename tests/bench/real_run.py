"""A real training run through the fused engine and through plain PEFT: evaluation losses side by side.

    python tests/bench/real_run.py BASE DATA --results FILE

BASE is the folder of a model, DATA one that `prepare` made (both lie in the store after `make quickstart`). The recipe
is the quickstart's; each way runs in a process of its own, and a row with both is printed and appended to `--results`.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
from datetime import UTC, datetime
from importlib import metadata
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[2]))
QUICKSTART = Path(__file__).parents[2] / "deployments" / "recipes" / "quickstart.yaml"
PACKAGES = ("torch", "transformers", "peft", "bitsandbytes")
WAYS = ("fused", "plain")


def train(base: Path, data: Path, way: str) -> dict[str, Any]:
    """Losses of a run of the quickstart's training."""
    import torch

    from qlora_core.artifacts import ModelSnapshot, PreparedDataset
    from qlora_core.events import Event, Metrics, Note
    from qlora_core.modeling.bases import quantization_of
    from qlora_core.modeling.load import read_architecture
    from qlora_core.recipe import load_recipe
    from qlora_core.training import losses, worker
    from qlora_core.training.spec import TrainSpec

    if way == "plain":  # the product takes the engine wherever it can, so there is no switch for it
        losses._why_plain = lambda *_: "asked for by a benchmark"
    curve: list[float] = []

    def hear(event: Event) -> None:
        if isinstance(event, Metrics) and "loss" in event.values:
            curve.append(round(event.values["loss"], 4))
        if isinstance(event, Note):
            print(event.message, file=sys.stderr)

    snapshot = ModelSnapshot(
        path=base, source=base.name, revision="bench", digest="0" * 64, architecture=read_architecture(base),
        quantization=quantization_of(json.loads((base / "config.json").read_text())),
    )  # fmt: skip
    dataset = PreparedDataset(path=data, **json.loads((data / "manifest.json").read_text())["record"])
    recipe = load_recipe(QUICKSTART)
    with tempfile.TemporaryDirectory() as into:
        spec = TrainSpec(recipe=recipe.train, seed=recipe.seed, base=snapshot, dataset=dataset, into=Path(into))
        adapter = worker.run(spec.model_dump(mode="json"), hear)
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else "CPU"
    return {"device": device, "steps": adapter.steps, "evaluation_loss": adapter.evaluation_loss, "losses": curve}


def compare(base: Path, data: Path) -> dict[str, Any]:
    """Both ways, and how far the evaluation losses are apart."""
    made = {}
    for way in WAYS:
        command = [sys.executable, __file__, str(base), str(data), "--way", way]
        done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
        made[way] = json.loads(done.stdout.splitlines()[-1])
    fused, plain = (made[way]["evaluation_loss"] for way in WAYS)
    return {
        "bench": "real run", "base": json.loads((base / "config.json").read_text())["model_type"], **made,
        "relative_difference": abs(fused - plain) / plain,
        "versions": {package: metadata.version(package) for package in PACKAGES},
        "date": datetime.now(UTC).date().isoformat(),
    }  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("base", type=Path)
    parser.add_argument("data", type=Path)
    parser.add_argument("--way", choices=WAYS, help="only this one, and print its losses")
    parser.add_argument("--results", type=Path, default=Path(__file__).parent / "results" / "real_run.jsonl")
    args = parser.parse_args()
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    if args.way:
        print(json.dumps(train(args.base, args.data, args.way)))
        return
    row = compare(args.base, args.data)
    print("RESULT", json.dumps(row))
    with args.results.open("a") as file:
        file.write(json.dumps(row) + "\n")


if __name__ == "__main__":
    main()
