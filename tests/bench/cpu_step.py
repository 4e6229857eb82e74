"""The quickstart's training step on a CPU, beside its matrix products alone and beside plain PEFT.

    taskset -c 0,1 python tests/bench/cpu_step.py

SmolLM2-135M's shape with random weights in NF4, LoRA of rank 16 on all linears, 4 rows of 146 tokens a step, of which
18 % carry loss: what the quickstart's recipe trains on. `products` are the products that no implementation can avoid,
as bare `torch.mm`: forward and input gradient of every linear, of its adapter, of attention and of the head where it
predicts. The three ways take turns, so that all see the same machine; the medians are compared.
"""

import argparse
import json
import os
import platform
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from datetime import UTC, datetime
from importlib import metadata
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import AutoModelForCausalLM, LlamaConfig

sys.path.insert(0, str(Path(__file__).parents[2]))

from qlora_core.artifacts import ModelSnapshot
from qlora_core.events import ignore
from qlora_core.modeling.load import load_base, read_architecture
from qlora_core.modeling.lora import add_lora
from qlora_core.modeling.rows import TokenRow
from qlora_core.process import KEEP_FREED_MEMORY
from qlora_core.recipe import Lora, Quantization
from qlora_core.training.engine.engine import Engine
from qlora_core.training.engine.module import FusedLoss
from qlora_core.training.step import LossModule

CONFIG = LlamaConfig(
    vocab_size=49152, hidden_size=576, intermediate_size=1536, num_hidden_layers=30, num_attention_heads=9,
    num_key_value_heads=3, tie_word_embeddings=True, max_position_embeddings=2048,
)  # fmt: skip
RANK, ROWS, TOKENS, TRAINED = 16, 4, 146, 0.18
LIMIT = 1.3
"""Of the time of the products."""


def rows() -> list[TokenRow]:
    random = np.random.default_rng(0)
    mask = np.zeros(TOKENS, np.uint8)
    mask[-round(TOKENS * TRAINED) :] = 1  # an answer at the end
    return [TokenRow("", random.integers(5, 49000, TOKENS, dtype=np.int32), mask) for _ in range(ROWS)]


def adapted(folder: Path):  # type: ignore[no-untyped-def]
    snapshot = ModelSnapshot(path=folder, source="bench", revision="1", architecture=read_architecture(folder))
    model = load_base(snapshot, torch.device("cpu"), Quantization())
    return add_lora(model, Lora(rank=RANK, alpha=16, dropout=0.0)).train()


def engine_step(folder: Path) -> Callable[[], None]:
    """As `training/losses.py` sets it up on a CPU with memory to spare."""
    model = adapted(folder)
    engine = Engine(model, torch.float32, "fast")
    engine.keep_weights(2**62, apart=True)
    loss = FusedLoss(model, engine, 0.0, "auto", 1 << 20, ignore)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-4, fused=True)
    pack = loss.collate(rows())

    def step() -> None:
        engine.adapter.grads.zero_()
        loss.loss_and_grads(pack)
        optimizer.step()
        loss.refresh()

    return step


def plain_step(folder: Path) -> Callable[[], None]:
    """PEFT and bitsandbytes through autograd."""
    model = adapted(folder)
    loss = LossModule(model, torch.float32, 0, "auto")
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-4, fused=True)
    batch = loss.collate(rows())

    def step() -> None:
        optimizer.zero_grad(set_to_none=True)
        loss(batch).backward()
        optimizer.step()

    return step


def products() -> Callable[[], None]:
    """Every product once with operands of its own shapes."""
    tokens, hidden, inner, kv = ROWS * TOKENS, CONFIG.hidden_size, CONFIG.intermediate_size, 3 * 64
    linears = [(hidden, hidden), (hidden, kv), (hidden, kv), (hidden, hidden), (hidden, inner), (hidden, inner)]
    linears.append((inner, hidden))
    weights = [(torch.randn(outputs, inputs), torch.randn(RANK, inputs), torch.randn(outputs, RANK))
               for inputs, outputs in linears]  # fmt: skip
    inputs = {width: torch.randn(tokens, width) for width in {hidden, kv, inner}}
    heads = torch.randn(ROWS * CONFIG.num_attention_heads, TOKENS, 64)
    scores = torch.randn(ROWS * CONFIG.num_attention_heads, TOKENS, TOKENS)
    head, states = torch.randn(CONFIG.vocab_size, hidden), torch.randn(ROWS * round(TOKENS * TRAINED), hidden)

    def linear(weight: torch.Tensor, a: torch.Tensor, b: torch.Tensor) -> None:
        x, grad = inputs[weight.shape[1]], inputs[weight.shape[0]]
        torch.mm(x, weight.t())
        torch.mm(grad, weight)
        low, low_grad = torch.mm(x, a.t()), torch.mm(grad, b)
        torch.mm(low, b.t())
        torch.mm(low_grad, a)
        torch.mm(low_grad.t(), x)
        torch.mm(grad.t(), low)

    def step() -> None:
        for _ in range(CONFIG.num_hidden_layers):
            for weight in weights:
                linear(*weight)
            for _ in range(3):  # two forward, four backward
                torch.bmm(heads, heads.transpose(1, 2))
                torch.bmm(scores, heads)
        torch.mm(torch.mm(states, head.t()), head)

    return step


def processor() -> str:
    """Name of the processor and the widest instructions that torch uses on it: products alone differ twofold."""
    described = Path("/proc/cpuinfo").read_text() if Path("/proc/cpuinfo").exists() else ""
    names = [line.partition(":")[2].strip() for line in described.splitlines() if line.startswith("model name")]
    return f"{names[0] if names else platform.machine()}, {torch.backends.cpu.get_cpu_capability()}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=9)
    parser.add_argument("--results", type=Path, default=Path(__file__).parent / "results" / "cpu_step.jsonl")
    args = parser.parse_args()
    if not KEEP_FREED_MEMORY.keys() <= os.environ.keys():  # as in every child process
        os.execve(sys.executable, [sys.executable, *sys.argv], {**os.environ, **KEEP_FREED_MEMORY})
    torch.manual_seed(0)
    with tempfile.TemporaryDirectory() as folder:
        AutoModelForCausalLM.from_config(CONFIG).save_pretrained(folder)
        ways = {"products": products(), "engine": engine_step(Path(folder)), "plain peft": plain_step(Path(folder))}
    seconds: dict[str, list[float]] = {name: [] for name in ways}
    with torch.no_grad():
        ways["products"]()
    for _ in range(args.steps + 1):
        for name, step in ways.items():
            start = time.perf_counter()
            step()
            seconds[name].append(time.perf_counter() - start)
    medians = {name: round(statistics.median(times[1:]) * 1e3, 1) for name, times in seconds.items()}
    row: dict[str, Any] = {
        "bench": "cpu step", "tokens": ROWS * TOKENS, "step_ms": medians,
        "over_products": round(medians["engine"] / medians["products"], 3),
        "over_plain": round(medians["engine"] / medians["plain peft"], 3),
        "device": processor(), "threads": torch.get_num_threads(),
        "torch": metadata.version("torch"), "peft": metadata.version("peft"),
        "bitsandbytes": metadata.version("bitsandbytes"), "date": datetime.now(UTC).date().isoformat(),
    }  # fmt: skip
    print(json.dumps(row))
    with args.results.open("a") as file:
        file.write(json.dumps(row) + "\n")
    print("within" if row["over_products"] <= LIMIT and row["over_plain"] <= 1 else "OVER", f"{LIMIT} x the products")


if __name__ == "__main__":
    main()
