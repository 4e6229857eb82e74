"""How fast rows become tokens and masks, beside three other ways, in one run on one machine.

    pip install trl datasets
    taskset -c 0,1 python tests/bench/data_speed.py --rows-file alpaca_en_demo.json --tokenizer FOLDER \
        --folder /var/tmp/data-bench

It needs no network: `--tokenizer` is a folder with tokenizer.json, tokenizer_config.json and chat_template.jinja, and
`--rows-file` a list of Alpaca rows. `--ways ours trl ours trl` runs them in turn, and `--rows 2000000 --ways ours`
shows how time and memory grow.

Rows are real ones with a tenth of their words exchanged, so that nothing is cached by luck. Each way runs in a process
of its own on the same cores and the same file; time starts after its imports and ends before its tokens are counted,
CPU time includes that of its workers, peak memory is that of the largest process. `floor` is the tokenizer's
`encode_batch` on texts that were rendered before; `map` is `datasets.map` with the chat template; `trl` is the
preparation of `SFTTrainer` with packing. Results are appended to results/data.jsonl.
"""

import argparse
import datetime
import json
import os
import platform
import random
import resource
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from importlib.metadata import version
from pathlib import Path
from typing import Any

RESULTS = Path(__file__).parent / "results" / "data.jsonl"
WORKERS = 2
SEQ_LEN_TOKENS = 2048
EXCHANGED = 0.1


def make_rows(real: Path, count: int, path: Path) -> None:
    """Alpaca rows as JSONL, drawn from real ones and varied."""
    rows, chance = json.loads(real.read_text()), random.Random(0)
    words = [word for row in rows for word in row["output"].split()]

    def vary(text: str) -> str:
        return " ".join(word if chance.random() > EXCHANGED else chance.choice(words) for word in text.split(" "))

    with path.open("w") as file:
        for _ in range(count):
            file.write(json.dumps({name: vary(text) for name, text in chance.choice(rows).items()}) + "\n")


def messages(row: dict[str, str]) -> list[dict[str, str]]:
    question = "\n".join(part for part in (row["instruction"], row.get("input", "")) if part)
    return [{"role": "user", "content": question}, {"role": "assistant", "content": row["output"]}]


def count_tokens(table: Any) -> int:
    import pyarrow.compute as pc

    return int(pc.sum(pc.list_value_length(table["input_ids"])).as_py())


def ours(rows: Path, tokenizer: Path, folder: Path) -> Iterator[int]:
    from qlora_core.artifacts import Architecture, DataFile, DataSnapshot, ModelSnapshot
    from qlora_core.data.prepare import prepare
    from qlora_core.events import ignore
    from qlora_core.modeling.tokenizer import load_tokenizer
    from qlora_core.recipe import DataRecipe

    load_tokenizer(tokenizer)  # what it imports; inside the time it is loaded once more

    facts: dict[str, Any] = dict.fromkeys(set(Architecture.model_fields) - {"model_type", "tied_embeddings"}, 1)
    facts["context_tokens"] = None
    architecture = Architecture(model_type="llama", tied_embeddings=True, **facts)
    base = ModelSnapshot(path=tokenizer, source="", revision="", architecture=architecture)
    raw = DataSnapshot(path=rows.parent, rows=(DataFile(name=rows.name, source="", bytes=rows.stat().st_size),))
    recipe = DataRecipe.model_validate(
        {
            "rows": [{"source": "local", "path": "."}],
            "seq_len_tokens": SEQ_LEN_TOKENS,
            "split": {"evaluation_fraction": 0.01},
        }
    )
    folder.mkdir(exist_ok=True)
    yield 0
    prepare(recipe, 1, base, raw, folder, ignore)
    yield 0
    from qlora_core.modeling.rows import TokenRows

    yield sum(int(TokenRows(folder / f"{side}.arrow").lengths.sum()) for side in ("train", "evaluation"))


def floor(rows: Path, tokenizer: Path, folder: Path) -> Iterator[int]:
    from transformers import AutoTokenizer

    loaded = AutoTokenizer.from_pretrained(tokenizer)
    with rows.open() as file:
        texts = [loaded.apply_chat_template(messages(json.loads(line)), tokenize=False) for line in file]
    yield 0
    starts = range(0, len(texts), 4096)
    encode = loaded.backend_tokenizer.encode_batch
    tokens = sum(len(e) for at in starts for e in encode(texts[at : at + 4096], add_special_tokens=False))
    yield 0
    yield tokens


def datasets_map(rows: Path, tokenizer: Path, folder: Path) -> Iterator[int]:
    from datasets import load_dataset
    from transformers import AutoTokenizer

    loaded = AutoTokenizer.from_pretrained(tokenizer)

    def encode(row: dict[str, Any]) -> dict[str, Any]:
        return {"input_ids": loaded.apply_chat_template(messages(row), return_dict=False)}

    yield 0
    data = load_dataset("json", data_files=str(rows), split="train", cache_dir=str(folder))
    data = data.map(encode, num_proc=WORKERS, remove_columns=data.column_names)
    yield 0
    yield count_tokens(data.data)


def trl(rows: Path, tokenizer: Path, folder: Path) -> Iterator[int]:
    from datasets import load_dataset
    from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM
    from trl import SFTConfig, SFTTrainer

    loaded = AutoTokenizer.from_pretrained(tokenizer)
    model = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=len(loaded), hidden_size=8, intermediate_size=8, num_hidden_layers=1, num_attention_heads=1
        )
    )
    config = SFTConfig(
        output_dir=str(folder),
        packing=True,
        max_length=SEQ_LEN_TOKENS,
        dataset_num_proc=WORKERS,
        report_to="none",
        use_cpu=True,
        bf16=False,
    )
    yield 0
    data = load_dataset("json", data_files=str(rows), split="train", cache_dir=str(folder))
    data = data.map(lambda row: {"messages": messages(row)}, num_proc=WORKERS, remove_columns=data.column_names)
    trainer = SFTTrainer(model, config, train_dataset=data, processing_class=loaded)
    yield 0
    yield count_tokens(trainer.train_dataset.data)


WAYS: dict[str, Callable[[Path, Path, Path], Iterator[int]]] = {
    "ours": ours,
    "floor": floor,
    "map": datasets_map,
    "trl": trl,
}


def measure(way: str, rows: Path, tokenizer: Path, folder: Path, count: int) -> dict[str, Any]:
    """Run one way in this process: between its first two yields it works, then it says how many tokens came out."""
    steps = WAYS[way](rows, tokenizer, folder)
    next(steps)
    started, cpu_s = time.perf_counter(), sum(os.times()[:4])
    next(steps)
    seconds, cpu_s = time.perf_counter() - started, sum(os.times()[:4]) - cpu_s
    peak = max(resource.getrusage(who).ru_maxrss for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN))
    tokens = next(steps)
    return {
        "way": way,
        "rows": count,
        "tokens": tokens,
        "seconds": round(seconds, 2),
        "cpu_s": round(cpu_s, 2),
        "rows_per_s": round(count / seconds),
        "tokens_per_s": round(tokens / seconds),
        "peak_memory_gib": round(peak / 2**20, 3),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, default=200_000)
    parser.add_argument("--rows-file", type=Path, required=True)
    parser.add_argument("--tokenizer", type=Path, required=True)
    parser.add_argument("--folder", type=Path, required=True)
    parser.add_argument("--ways", nargs="+", choices=WAYS, default=list(WAYS))
    parser.add_argument("--one", choices=WAYS, help=argparse.SUPPRESS)
    options = parser.parse_args()
    options.folder.mkdir(parents=True, exist_ok=True)
    rows = options.folder / f"rows-{options.rows}.jsonl"
    if options.one:
        result = measure(options.one, rows, options.tokenizer, options.folder / options.one, options.rows)
        print(json.dumps(result))
        return
    if not rows.is_file():
        make_rows(options.rows_file, options.rows, rows)
    cores = sorted(os.sched_getaffinity(0))[:WORKERS]
    os.sched_setaffinity(0, cores)
    threads = {"RAYON_NUM_THREADS": str(WORKERS), "TOKENIZERS_PARALLELISM": "true"}
    environment = {**os.environ, **threads, "HF_HUB_OFFLINE": "1", "HF_HOME": str(options.folder / "hub")}
    machine = {
        "at": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "machine": platform.processor() or platform.machine(),
        "cores": WORKERS,
        **{name: version(name) for name in ("tokenizers", "transformers", "kitoken", "datasets", "trl")},
    }
    RESULTS.parent.mkdir(exist_ok=True)
    for way in options.ways:
        shutil.rmtree(options.folder / way, ignore_errors=True)  # else `datasets` would find its results in its cache
        command = [sys.executable, __file__, *sys.argv[1:], "--one", way]
        done = subprocess.run(command, env=environment, stdout=subprocess.PIPE, text=True, check=True)
        result = {**machine, **json.loads(done.stdout.splitlines()[-1])}
        print(json.dumps(result))
        with RESULTS.open("a") as file:
            file.write(json.dumps(result) + "\n")


if __name__ == "__main__":
    main()
