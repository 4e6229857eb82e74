"""How fast a merge is, beside copying the same files and beside PEFT's way, in one run on one machine.

    python tests/bench/merge_speed.py --shape 1.5B --folder /var/tmp/merge-bench

Random bf16 weights of a real shape (Qwen2.5-1.5B: 3 GB, Qwen2.5-7B: 15 GB) and an adapter of rank 16 on all linear
layers. Each way runs in a process of its own; wall time starts after its imports. CPU time and peak memory are those of
that process and its children; memory that they share counts once, looked at ten times a second. Cold means that the
kernel was told to forget the input files. Results are appended to results/merge.jsonl, and the medians are printed with
whether the limits hold: 1.5 times `cp`, 3 GiB.
"""

import argparse
import datetime
import json
import os
import platform
import re
import shutil
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from importlib.metadata import version
from pathlib import Path
from typing import NamedTuple

import psutil
import torch
from safetensors.torch import save_file
from transformers import AutoModelForCausalLM, Qwen2Config

SHAPES = {
    "0.5B": {"hidden_size": 896, "intermediate_size": 4864, "num_hidden_layers": 24, "num_attention_heads": 14},
    "1.5B": {"hidden_size": 1536, "intermediate_size": 8960, "num_hidden_layers": 28, "num_attention_heads": 12},
    "7B": {"hidden_size": 3584, "intermediate_size": 18944, "num_hidden_layers": 28, "num_attention_heads": 28},
}
VOCABULARY = {"0.5B": 151936, "1.5B": 151936, "7B": 152064}
KV_HEADS = {"0.5B": 2, "1.5B": 2, "7B": 4}
RANK = 16
LINEARS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
RESULTS = Path(__file__).parent / "results" / "merge.jsonl"
WALL_LIMIT, MEMORY_LIMIT_GIB = 1.5, 3.0
"""What a merge with its proof may take: over `cp`, and in memory."""
GB = 10**9


def make_base(shape: str, folder: Path) -> dict[str, torch.Size]:
    """A random checkpoint in shards of 2 GB; returns the shapes of its tensors by name."""
    config = Qwen2Config(
        vocab_size=VOCABULARY[shape],
        num_key_value_heads=KV_HEADS[shape],
        tie_word_embeddings=shape != "7B",
        dtype="bfloat16",
        **SHAPES[shape],
    )
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
    tied = {"lm_head.weight"} if config.tie_word_embeddings else set()
    shapes = {name: tensor.shape for name, tensor in model.state_dict().items() if name not in tied}
    folder.mkdir(parents=True)
    names = list(_shards(shapes))
    weight_map = {}
    for at, shard in enumerate(names, start=1):
        file = f"model-{at:05d}-of-{len(names):05d}.safetensors"
        save_file({name: _random(shapes[name], at) for name in shard}, folder / file, {"format": "pt"})
        weight_map |= dict.fromkeys(shard, file)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    config.architectures = ["Qwen2ForCausalLM"]
    config.save_pretrained(folder)
    return shapes


def make_adapter(shapes: dict[str, torch.Size], folder: Path) -> None:
    """An adapter in PEFT's format."""
    folder.mkdir(parents=True)
    tensors = {}
    for name, (rows, columns) in (
        (n, s) for n, s in shapes.items() if n.endswith(tuple(f"{x}.weight" for x in LINEARS))
    ):
        module = f"base_model.model.{name.removesuffix('.weight')}"
        tensors[f"{module}.lora_A.weight"] = torch.randn(RANK, columns) * 0.02
        tensors[f"{module}.lora_B.weight"] = torch.randn(rows, RANK) * 0.02
    save_file(tensors, folder / "adapter_model.safetensors", {"format": "pt"})
    config = {"peft_type": "LORA", "task_type": "CAUSAL_LM", "r": RANK, "lora_alpha": RANK, "target_modules": LINEARS}
    (folder / "adapter_config.json").write_text(json.dumps(config))


class Spent(NamedTuple):
    """Wall time, and CPU time of this process and of the children it waited for."""

    wall_s: float
    cpu_s: float


def now() -> Spent:
    return Spent(time.perf_counter(), sum(os.times()[:4]))


def copy(folder: Path) -> Spent:
    start = now()
    subprocess.run(["cp", "-r", folder / "base", folder / "out"], check=True)
    return start


def merge_here(folder: Path) -> Spent:
    """Write and prove all tensors, as `qlora_core.merging.worker.write_model` does it."""
    from qlora_core.events import ignore
    from qlora_core.merging.accept import accept, check_places
    from qlora_core.merging.adapter import read_changes
    from qlora_core.merging.tensors import lay_out, read_folder, write_index
    from qlora_core.merging.write import write_shards

    out = folder / "out"
    out.mkdir()
    start = now()
    base = read_folder(folder / "base")
    changes = read_changes(folder / "adapter", base, tied=False)
    shards = lay_out(base.values(), None, 2 * GB, out)
    differences = write_shards(shards, base, changes, torch.get_num_threads(), ignore)
    write_index(shards, out)
    check_places(shards, read_folder(out))
    accept(differences, changes.keys())
    return start


def merge_by_peft(folder: Path) -> Spent:
    from peft import PeftModel

    start = now()
    model = AutoModelForCausalLM.from_pretrained(folder / "base", dtype=torch.bfloat16, low_cpu_mem_usage=True)
    merged = PeftModel.from_pretrained(model, folder / "adapter").merge_and_unload()
    merged.save_pretrained(folder / "out", max_shard_size="2GB")
    return start


# Each way returns when it started: after its imports.
WAYS: dict[str, Callable[[Path], Spent]] = {"cp": copy, "merge with proof": merge_here, "peft": merge_by_peft}


def measure(way: str, folder: Path, cold: bool) -> dict[str, float | str | bool]:
    """Run one way in a fresh process; the output is removed afterwards."""
    shutil.rmtree(folder / "out", ignore_errors=True)
    os.sync()
    for file in (folder / "base").iterdir():
        _forget(file) if cold else _read(file)
    command = [sys.executable, __file__, "--folder", str(folder), "--way", way]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True) as process:
        peak_gib = 0.0
        while process.poll() is None:
            peak_gib = max(peak_gib, memory_gib(process.pid))
            time.sleep(0.1)
        said = process.communicate()[0]
    if process.returncode:
        raise SystemExit(f"{way} ended with code {process.returncode}; run it alone: {' '.join(command)}")
    shutil.rmtree(folder / "out")
    return {"way": way, "cold": cold, **json.loads(said.splitlines()[-1]), "peak_memory_gib": round(peak_gib, 2)}


def memory_gib(pid: int) -> float:
    """What a process and all below it have in memory; what some of them share counts once."""
    used = 0
    try:
        for process in (top := psutil.Process(pid), *top.children(recursive=True)):
            used += process.memory_full_info().pss
    except psutil.Error:  # one has just ended
        pass
    return used / 2**30


def one(way: str, folder: Path) -> None:
    """Run one way here and print its wall and CPU time."""
    start = WAYS[way](folder)
    end = now()
    print(json.dumps({"wall_s": round(end.wall_s - start.wall_s, 2), "cpu_s": round(end.cpu_s - start.cpu_s, 2)}))


def main() -> None:
    arguments = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    arguments.add_argument("--shape", choices=SHAPES, default="1.5B")
    arguments.add_argument("--folder", type=Path, required=True, help="a new folder on the disk to measure")
    arguments.add_argument("--repeat", type=int, default=3, help="of all ways but PEFT's, which is slow")
    arguments.add_argument("--results", type=Path, default=RESULTS, help="JSON lines are appended to it")
    arguments.add_argument("--way", choices=WAYS, help=argparse.SUPPRESS)
    chosen = arguments.parse_args()
    if chosen.way:
        one(chosen.way, chosen.folder)
        return
    torch.manual_seed(0)
    make_adapter(make_base(chosen.shape, chosen.folder / "base"), chosen.folder / "adapter")
    machine = _machine(chosen.shape, chosen.folder)
    rows = []
    measure("cp", chosen.folder, cold=False)  # what a virtual machine has never used comes slowly the first time
    for cold in (False, True):
        for turn in range(chosen.repeat):
            for way in WAYS if turn == 0 else [way for way in WAYS if way != "peft"]:
                row = {**machine, **measure(way, chosen.folder, cold)}
                rows.append(row)
                print(json.dumps(row), flush=True)
                chosen.results.parent.mkdir(exist_ok=True)
                with chosen.results.open("a") as file:
                    file.write(json.dumps(row) + "\n")
    shutil.rmtree(chosen.folder)
    for cold in (False, True):
        print(summary([row for row in rows if row["cold"] is cold], "cold" if cold else "warm"))


def summary(rows: list[dict[str, float]], state: str) -> str:
    """The medians side by side, and whether the limits hold."""
    walls = {way: statistics.median(row["wall_s"] for row in rows if row["way"] == way) for way in WAYS}
    ours = "merge with proof"
    peak = max(row["peak_memory_gib"] for row in rows if row["way"] == ours)
    ratio = walls[ours] / walls["cp"]
    verdict = "within" if ratio <= WALL_LIMIT and peak < MEMORY_LIMIT_GIB else "OVER"
    times = ", ".join(f"{way} {wall_s:.2f} s" for way, wall_s in walls.items())
    limits = f"{WALL_LIMIT} x cp and {MEMORY_LIMIT_GIB:g} GiB"
    return f"{state}: {times}; {ratio:.2f} x cp, peak {peak:.2f} GiB: {verdict} {limits}"


def _shards(shapes: dict[str, torch.Size]) -> Iterator[list[str]]:
    shard: list[str] = []
    filled = 0
    for name, shape in shapes.items():
        if shard and filled + 2 * shape.numel() > 2 * GB:
            yield shard
            shard, filled = [], 0
        shard.append(name)
        filled += 2 * shape.numel()
    yield shard


def _random(shape: torch.Size, seed: int) -> torch.Tensor:
    """Normal values with a period of about a million: quick to make, and no two rows of a tensor are alike."""
    torch.manual_seed(seed)
    pool = (torch.randn(1_000_003) * 0.02).to(torch.bfloat16)
    return pool.repeat(shape.numel() // len(pool) + 1)[: shape.numel()].view(shape).clone()


def _forget(file: Path) -> None:
    descriptor = os.open(file, os.O_RDONLY)
    os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
    os.close(descriptor)


def _read(file: Path) -> None:
    with file.open("rb") as stream:
        while stream.read(1 << 24):
            pass


def _machine(shape: str, folder: Path) -> dict[str, float | str | int]:
    size = sum(file.stat().st_size for file in (folder / "base").iterdir())
    return {
        "bench": "merge",
        "date": datetime.datetime.now(datetime.UTC).date().isoformat(),
        "shape": f"Qwen2.5-{shape}",
        "checkpoint_gb": round(size / GB, 2),
        "rank": RANK,
        "device": f"{_processor()}, {len(os.sched_getaffinity(0))} cores",
        "load_before": round(os.getloadavg()[0], 1),
        "python": platform.python_version(),
        **{name: version(name) for name in ("torch", "transformers", "peft", "safetensors")},
    }


def _processor() -> str:
    found = re.search(r"model name\s*: (.*)", Path("/proc/cpuinfo").read_text())
    return found[1] if found else platform.machine()


if __name__ == "__main__":
    main()
