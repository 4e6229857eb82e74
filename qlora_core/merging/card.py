"""The model card: what a person needs to know before running the merged model."""

import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory

from qlora_core.artifacts import Adapter, EvaluationReport, ExportedModel, ModelSnapshot, PreparedDataset
from qlora_core.merging.spec import MergeSpec

CARD = "README.md"
TRAINING = "## Training\n"
HOW_TO_RUN = "## How to run it\n"


def write_card(task: MergeSpec, changed: int, tensors: int, dtype: str) -> None:
    """Write the card from the records alone, so that the same merge gives the same card."""
    card = f"""{_front_matter(task.base)}
# A fine-tune of {task.base.source}

A LoRA adapter of rank {task.adapter.rank} was trained with QLoRA on the quantized base and added into the unquantized
one: {changed} of {tensors} tensors changed, every other one is the base's, byte for byte or cast. Weights are {dtype}.

{HOW_TO_RUN}
```python
from transformers import pipeline

chat = pipeline("text-generation", model=".", dtype="auto", device_map="auto")
print(chat([{{"role": "user", "content": "..."}}], max_new_tokens=256, return_full_text=False)[0]["generated_text"])
```

`transformers serve .` answers in OpenAI's chat form.

## Where it comes from

| what | which | digest (SHA-256) |
|---|---|---|
| base | {task.base.source}, revision {task.base.revision} | `{task.base.digest}` |
| data | {_data(task.dataset)} | `{task.dataset.digest}` |
| adapter | rank {task.adapter.rank}, {task.adapter.trainable_parameters:,} parameters | `{task.adapter.digest}` |

{TRAINING}
{_training(task.adapter, task.dataset)}

Compare with the base and with earlier versions in the evaluation report before use. Limits, biases and licence are
those of the base and of the data.
"""
    (task.into / "model" / CARD).write_text(card, encoding="utf-8")


@contextmanager
def scored_folder(model: Path, report: EvaluationReport) -> Iterator[Path]:
    """A folder of links to the model's files, its card with the scores that were not known when it was written.

    The artifact itself is never changed: its digest is what the scores are about.
    """
    with TemporaryDirectory(prefix="qlora-card-") as temporary:
        folder = Path(temporary) / model.name
        folder.mkdir()
        for file in model.iterdir():
            (folder / file.name).symlink_to(file)
        (folder / CARD).unlink()
        card = (model / CARD).read_text(encoding="utf-8")
        (folder / CARD).write_text(card.replace(TRAINING, f"{_scores(report)}\n{TRAINING}", 1), encoding="utf-8")
        yield folder


def note_export(card: Path, exported: ExportedModel) -> None:
    """Say on the card of an export how it was quantized and what that costs."""
    losses = exported.losses
    text = f"""## This export

Quantized to {exported.kind}, {exported.bytes / 1e6:,.1f} MB of weights. On {exported.probe_tokens:,} held-out tokens
the loss is {losses["exported"]:.4f} and was {losses["merged"]:.4f} before; the most likely token is the same on
{exported.top1_agreement:.1%}, the KL divergence is {exported.kl_divergence:.4f} nats.
"""
    said = card.read_text(encoding="utf-8") if card.is_file() else ""
    before, how_to_run, after = said.partition(HOW_TO_RUN)
    # A model that was not made here has another card, or none.
    card.write_text(f"{before.rstrip()}\n\n{text}\n{how_to_run}{after}".lstrip(), encoding="utf-8")


def _scores(report: EvaluationReport) -> str:
    models = {"base": report.base, "this model": report.candidate, "champion before": report.champion or {}}
    known = {name: scores for name, scores in models.items() if scores}
    lines = [f"| metric | {' | '.join(known)} |", "|---" * (len(known) + 1) + "|"]
    for metric in report.candidate:
        cells = (f"{scores[metric]:.4g}" if metric in scores else "" for scores in known.values())
        lines.append(f"| {metric} | {' | '.join(cells)} |")
    return f"## Scores\n\nOn {report.rows:,} held-out rows.\n\n" + "\n".join(lines) + "\n"


def _front_matter(base: ModelSnapshot) -> str:
    license_line = f"license: {name}\n" if (name := _license(base.path / CARD)) else ""
    return f"---\nlibrary_name: transformers\npipeline_tag: text-generation\n{license_line}tags: [qlora, lora]\n---\n"


def _license(card: Path) -> str | None:
    """What the base's own card declares, if it has one."""
    if not card.is_file():
        return None
    found = re.search(r"\A---\n.*?^license: *([\w.-]+) *$.*?^---$", card.read_text(encoding="utf-8"), re.M | re.S)
    return found[1] if found else None


def _data(dataset: PreparedDataset) -> str:
    return f"{dataset.train_rows:,} rows to train on, {dataset.evaluation_rows:,} held out"


def _training(adapter: Adapter, dataset: PreparedDataset) -> str:
    dropped = ", ".join(f"{count:,} {reason}" for reason, count in sorted(dataset.dropped.items()) if count)
    return f"""- {adapter.steps:,} optimizer steps; loss {adapter.train_loss:.4f} on training rows at the end
- loss {adapter.evaluation_loss:.4f} on the held-out rows (quantized base with the adapter)
- {dataset.trained_tokens:,} of {dataset.train_tokens:,} training tokens carry loss
- rows left out: {dropped or "none"}"""
