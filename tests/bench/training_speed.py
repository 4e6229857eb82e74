"""Time a QLoRA training step of this project beside what users would pick instead, on one GPU.

    python tests/bench/training_speed.py make 7b --tokenizer DIR --out DIR      a checkpoint of random weights
    python tests/bench/training_speed.py quantize DIR/1.5b                      its GPTQ-Int4 form, DIR/1.5b-gptq
    python tests/bench/training_speed.py time DIR/7b --impl ours                one row, one process
    python tests/bench/training_speed.py compare DIR                            all rows, one process each

    python tests/bench/training_speed.py time DIR/7b --shortest 256             rows of 256 to 2048 tokens, ours only

Rules: random token ids that lie on the GPU, collated as each implementation wants them; labels on every token, LoRA on
the seven linears, of rank 16 and without dropout where nothing else is asked for; forward, backward and optimizer are
timed, median of the timed steps, peak of `torch.cuda.max_memory_allocated` over all steps. `ready_s` is from the start
of the process, with all its imports, until the quantized model with its adapter lies on the GPU; `load_s` is the part
of it after importing torch (and Unsloth). Without a cache of bytecode, as where PYTHONDONTWRITEBYTECODE is set, 3,000
imported files are compiled again each time, so the row says. Every row is printed as JSON and appended to `--results`.
"""

import argparse
import json
import os
import shutil
import statistics
import subprocess
import sys
import time
from datetime import UTC, datetime
from importlib import metadata
from pathlib import Path

BEGAN = time.perf_counter()  # before torch is imported
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("UNSLOTH_DISABLE_STATISTICS", "1")
SHAPES = {
    "7b": {"hidden_size": 3584, "intermediate_size": 18944, "num_attention_heads": 28, "num_key_value_heads": 4,
           "vocab_size": 152064, "tie_word_embeddings": False},
    "1.5b": {"hidden_size": 1536, "intermediate_size": 8960, "num_attention_heads": 12, "num_key_value_heads": 2,
             "vocab_size": 151936, "tie_word_embeddings": True},
    "32b": {"hidden_size": 5120, "intermediate_size": 27648, "num_attention_heads": 40, "num_key_value_heads": 8,
            "num_hidden_layers": 64, "vocab_size": 152064, "tie_word_embeddings": False},
    "tiny": {"hidden_size": 256, "intermediate_size": 512, "num_attention_heads": 4, "num_key_value_heads": 2,
             "vocab_size": 1024, "tie_word_embeddings": True},
}  # fmt: skip
LINEARS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
GPTQ_GROUP = 128
WARM_UP = 3
GIB = 2**30
PACKAGES = ("torch", "triton", "transformers", "peft", "bitsandbytes", "unsloth", "liger-kernel", "flash-attn-4")


def make(shape: str, tokenizer: Path | None, out: Path, nf4: bool) -> None:
    """Write a Qwen2 checkpoint of random weights, in bf16 or as bitsandbytes stores NF4."""
    import torch
    from transformers import AutoModelForCausalLM, Qwen2Config

    torch.manual_seed(0)
    torch.set_default_dtype(torch.bfloat16)
    common = {"num_hidden_layers": 28, "max_position_embeddings": 32768, "eos_token_id": 2, "bos_token_id": 1}
    config = Qwen2Config(**common | SHAPES[shape])
    device = "cuda" if torch.cuda.is_available() else "cpu"
    with torch.device("meta" if nf4 else device):
        model = AutoModelForCausalLM.from_config(config)
    if nf4:
        _write_nf4(model, out / shape, device)
    else:
        model.save_pretrained(out / shape)
    for file in tokenizer.iterdir() if tokenizer else ():
        shutil.copy(file, out / shape)


def _write_nf4(model, folder: Path, device: str) -> None:  # type: ignore[no-untyped-def]
    """One tensor after another, so that the model never has to fit in memory in bf16."""
    import torch
    from bitsandbytes.functional import quantize_4bit
    from safetensors.torch import save_file
    from transformers import BitsAndBytesConfig

    folder.mkdir(parents=True)
    tensors = {}
    for name, parameter in model.named_parameters():
        values = torch.randn(parameter.shape, device=device) * 0.02
        if name.endswith("_proj.weight"):
            packed, state = quantize_4bit(values, quant_type="nf4", compress_statistics=True)
            tensors[name] = packed.cpu()
            tensors |= {f"{name}.{key}": part.cpu() for key, part in state.as_dict(packed=True).items()}
        else:
            tensors[name] = (torch.ones_like(values) if "norm" in name else values).to(torch.bfloat16).cpu()
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    model.config.architectures = [type(model).__name__]
    model.config.quantization_config = BitsAndBytesConfig(
        load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=torch.bfloat16,
    )  # fmt: skip
    model.config.save_pretrained(folder)


def quantize(folder: Path) -> None:
    """Write a checkpoint again in GPTQ-Int4, groups of 128, rounded to the nearest: for speed, not for quality."""
    import torch
    from safetensors.torch import load_file, save_file

    sys.path.insert(0, str(Path(__file__).parents[2]))
    from tests.quantized import pack_gptq

    into = folder.with_name(f"{folder.name}-gptq")
    shutil.copytree(folder, into, ignore=shutil.ignore_patterns("*.safetensors"))
    device = "cuda" if torch.cuda.is_available() else "cpu"
    tensors = load_file(folder / "model.safetensors")
    for name in [name for name in tensors if name.endswith("_proj.weight")]:
        stem, bias = name.removesuffix(".weight"), tensors.get(name.replace(".weight", ".bias"))
        packed = pack_gptq(tensors.pop(name).to(device).float(), bits=4, group=GPTQ_GROUP)
        tensors |= {f"{stem}.{part}": tensor.cpu() for part, tensor in packed.items() if part != "bias" or bias is None}
    save_file(tensors, into / "model.safetensors", metadata={"format": "pt"})
    config = json.loads((into / "config.json").read_text())
    config["quantization_config"] = {
        "quant_method": "gptq", "bits": 4, "group_size": GPTQ_GROUP, "desc_act": False, "sym": True,
        "checkpoint_format": "gptq",
    }  # fmt: skip
    (into / "config.json").write_text(json.dumps(config))


def time_one(args: argparse.Namespace) -> dict[str, object]:
    """One row: load, warm up, time."""
    if args.impl == "unsloth":
        import unsloth  # noqa: F401  # patches transformers: must come first
    import torch

    from qlora_core.training.engine.compiled import wait

    torch.manual_seed(0)
    began = time.perf_counter()
    collate, step, facts = BUILD[args.impl](args)
    torch.cuda.synchronize()
    row: dict[str, object] = {
        "shape": Path(args.checkpoint).name, "impl": args.impl, "micro_batch": args.rows, "seq_len": args.seq,
        "accumulate": args.accumulate, "rank": args.rank, "dropout": args.dropout,
        "shortest": args.shortest or args.seq, "activation_memory": args.activation_memory, "keep_gib": args.keep_gib,
        "ready_s": round(time.perf_counter() - BEGAN, 1), "load_s": round(time.perf_counter() - began, 1),
        "loaded_gib": round(torch.cuda.memory_allocated() / GIB, 2), "bytecode_cached": not sys.dont_write_bytecode,
        **facts,
    }  # fmt: skip
    seconds: list[float] = []
    try:
        for _ in range(WARM_UP + args.steps):
            ids = torch.randint(5, SHAPES["tiny"]["vocab_size"], (args.accumulate, args.rows, args.seq), device="cuda")
            batch = collate(ids)
            torch.cuda.synchronize()
            start = time.perf_counter()
            loss = step(batch)
            torch.cuda.synchronize()
            seconds.append(time.perf_counter() - start)
            wait()  # training would go on with other kernels until then
        median = statistics.median(seconds[WARM_UP:])
        tokens = sum(_lengths(args)) * args.accumulate
        row |= {
            "step_ms": round(median * 1e3, 1), "tokens_per_s": round(tokens / median), "loss": round(float(loss), 4),
            "peak_gib": round(torch.cuda.max_memory_allocated() / GIB, 2), "first_step_s": round(seconds[0], 1),
        }  # fmt: skip
    except torch.OutOfMemoryError:
        row["out_of_memory"] = True
    return row | _where()


def _lengths(args: argparse.Namespace) -> list[int]:
    """Tokens of the rows of each micro-batch, from the longest to the shortest in even steps."""
    shortest = args.shortest or args.seq
    return [args.seq - (args.seq - shortest) * row // max(1, args.rows - 1) for row in range(args.rows)]


def _where() -> dict[str, object]:
    import torch

    versions = {}
    for package in PACKAGES:
        try:
            versions[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            continue
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else "CPU"
    return {"device": device, "versions": versions, "date": datetime.now(UTC).date().isoformat()}


def _ours(args: argparse.Namespace):  # type: ignore[no-untyped-def]
    import numpy as np
    import torch

    from qlora_core.events import ignore
    from qlora_core.modeling.load import kernel_of, load_base
    from qlora_core.modeling.lora import add_lora
    from qlora_core.modeling.rows import TokenRow
    from qlora_core.recipe import Lora, Quantization
    from qlora_core.training.engine.engine import Engine
    from qlora_core.training.engine.graphs import Replayed
    from qlora_core.training.engine.pack import Pack, pack_rows
    from qlora_core.training.losses import begin_compiling

    device = torch.device("cuda")
    snapshot = _snapshot(Path(args.checkpoint))
    begin_compiling(snapshot, torch.bfloat16)
    model = add_lora(load_base(snapshot, device, Quantization()), Lora(rank=args.rank, dropout=args.dropout))
    engine = Engine(model, torch.bfloat16, args.activation_memory)
    kept = engine.groups()[: engine.keep_weights(int(args.keep_gib * GIB))]
    predicted = _predicted_gib(snapshot, args) + sum(group.bytes for group in kept) / GIB
    run = engine if args.no_graphs else Replayed(engine, ignore)
    parameters = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(parameters, lr=1e-4, fused=True)
    seed = torch.zeros(1, dtype=torch.int64, device=device)

    def collate(ids: torch.Tensor) -> list[Pack]:
        parts = ids.cpu().numpy().astype(np.int32)
        cut = [[row[:length] for row, length in zip(part, _lengths(args), strict=True)] for part in parts]
        rows = [[TokenRow("", row, np.ones(len(row), np.uint8)) for row in part] for part in cut]
        return [pack_rows(part, fill_up=args.shortest is not None).to(device) for part in rows]

    def step(packs: list[Pack]) -> torch.Tensor:
        engine.adapter.grads.zero_()
        total = torch.zeros((), device=device)
        for pack in packs:
            total = total + run.loss_and_grads(pack, seed)
        tokens = sum(len(pack.targets) for pack in packs)
        engine.adapter.grads.div_(tokens)
        optimizer.step()
        engine.refresh()
        return total / tokens

    return collate, step, {"linears": kernel_of(model), "predicted_gib": round(predicted, 2)}


def _predicted_gib(snapshot, args: argparse.Namespace) -> float:  # type: ignore[no-untyped-def]
    """What `qlora check` would say, without weights that stay dequantized."""
    from qlora_core.recipe import Lora, TrainRecipe
    from qlora_core.training.memory import estimate

    tokens, recipe = sum(_lengths(args)), TrainRecipe(lora=Lora(rank=args.rank))
    planned = estimate(
        snapshot.architecture, recipe, tokens, args.activation_memory, quantization=snapshot.quantization
    )
    return planned.total_gib


def _snapshot(checkpoint: Path):  # type: ignore[no-untyped-def]
    from qlora_core.artifacts import ModelSnapshot
    from qlora_core.modeling.bases import quantization_of
    from qlora_core.modeling.load import read_architecture

    quantization = quantization_of(json.loads((checkpoint / "config.json").read_text()))
    return ModelSnapshot(
        path=checkpoint,
        source=checkpoint.name,
        revision="bench",
        architecture=read_architecture(checkpoint),
        quantization=quantization,
    )


def _transformers(args: argparse.Namespace):  # type: ignore[no-untyped-def]
    import torch
    from peft import LoraConfig, get_peft_model, prepare_model_for_kbit_training
    from transformers import AutoModelForCausalLM, BitsAndBytesConfig

    if "liger" in args.impl:
        from liger_kernel.transformers import apply_liger_kernel_to_qwen2

        apply_liger_kernel_to_qwen2()
    nf4 = BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=torch.bfloat16,
    )
    model = AutoModelForCausalLM.from_pretrained(
        args.checkpoint, quantization_config=nf4, dtype=torch.bfloat16, device_map={"": 0}, attn_implementation="sdpa"
    )
    model.config.use_cache = False
    checkpointing = args.activation_memory == "small"
    model = prepare_model_for_kbit_training(
        model, use_gradient_checkpointing=checkpointing, gradient_checkpointing_kwargs={"use_reentrant": False}
    )
    lora = LoraConfig(
        r=args.rank, lora_alpha=16, lora_dropout=args.dropout, target_modules=LINEARS, task_type="CAUSAL_LM"
    )
    return _autograd_step(get_peft_model(model, lora).train())


def _unsloth(args: argparse.Namespace):  # type: ignore[no-untyped-def]
    import torch
    from unsloth import FastLanguageModel

    model, _ = FastLanguageModel.from_pretrained(
        args.checkpoint, max_seq_length=args.seq, dtype=torch.bfloat16, load_in_4bit=True, local_files_only=True
    )
    model = FastLanguageModel.get_peft_model(
        model,
        r=args.rank,
        lora_alpha=16,
        lora_dropout=args.dropout,
        bias="none",
        target_modules=LINEARS,
        use_gradient_checkpointing="unsloth" if args.activation_memory == "small" else False,
    )
    FastLanguageModel.for_training(model)
    return _autograd_step(model)


def _autograd_step(model):  # type: ignore[no-untyped-def]
    import torch

    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-4, fused=True)

    def step(ids: torch.Tensor) -> torch.Tensor:
        total = torch.zeros((), device="cuda")
        for part in ids:
            with torch.autocast("cuda", dtype=torch.bfloat16):
                loss = model(input_ids=part, labels=part).loss / len(ids)
            loss.backward()
            total = total + loss.detach()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        return total

    return list, step, {}


BUILD = {"ours": _ours, "transformers": _transformers, "transformers_liger": _transformers, "unsloth": _unsloth}


def compare(folder: Path, results: Path, impls: list[str], shapes: list[str]) -> None:
    """Every implementation at every point, one process each."""
    points = (("7b", 4, 2048, 1), ("1.5b", 4, 2048, 1), ("1.5b", 1, 512, 16))
    for shape, rows, seq, accumulate in points:
        for memory in ("fast", "small"):
            for impl in impls:
                if shape not in shapes:
                    continue
                command = [sys.executable, __file__, "time", str(folder / shape), "--impl", impl, "--rows", str(rows)]
                command += ["--seq", str(seq), "--accumulate", str(accumulate), "--activation-memory", memory]
                subprocess.run([*command, "--results", str(results)], check=False)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    verbs = parser.add_subparsers(dest="verb", required=True)
    maker = verbs.add_parser("make")
    maker.add_argument("shape", choices=SHAPES)
    maker.add_argument("--tokenizer", type=Path)
    maker.add_argument("--out", type=Path, required=True)
    maker.add_argument("--nf4", action="store_true", help="quantized already: a quarter of the disk")
    packer = verbs.add_parser("quantize")
    packer.add_argument("folder", type=Path)
    timer = verbs.add_parser("time")
    timer.add_argument("checkpoint")
    timer.add_argument("--impl", choices=BUILD, default="ours")
    timer.add_argument("--rows", type=int, default=4, help="sequences in a micro-batch")
    timer.add_argument("--seq", type=int, default=2048, help="tokens of a sequence")
    timer.add_argument("--shortest", type=int, help="tokens of the shortest row; as long as the others if not given")
    timer.add_argument("--accumulate", type=int, default=1, help="micro-batches in a step")
    timer.add_argument("--activation-memory", choices=["fast", "balanced", "small"], default="fast")
    timer.add_argument("--keep-gib", type=float, default=0.0, help="memory for weights that stay dequantized")
    timer.add_argument("--no-graphs", action="store_true")
    timer.add_argument("--dropout", type=float, default=0.0, help="of the adapters")
    timer.add_argument("--rank", type=int, default=16)
    timer.add_argument("--steps", type=int, default=6)
    timer.add_argument("--results", type=Path)
    both = verbs.add_parser("compare")
    both.add_argument("folder", type=Path)
    both.add_argument("--results", type=Path, default=Path("training.jsonl"))
    both.add_argument("--impls", nargs="+", default=list(BUILD), choices=BUILD)
    both.add_argument("--shapes", nargs="+", default=["7b", "1.5b"], choices=SHAPES)
    args = parser.parse_args()
    if args.verb == "make":
        make(args.shape, args.tokenizer, args.out, args.nf4)
    elif args.verb == "quantize":
        quantize(args.folder)
    elif args.verb == "compare":
        compare(args.folder, args.results, args.impls, args.shapes)
    else:
        if args.shortest and args.impl != "ours":
            parser.error("--shortest: the others would be timed with padding; only ours takes rows of any lengths")
        row = time_one(args)
        print("RESULT", json.dumps(row), flush=True)
        if args.results:
            with args.results.open("a") as file:
                file.write(json.dumps(row) + "\n")


if __name__ == "__main__":
    main()
