"""Answers for evaluation: batched with a KV cache against one prompt after the other with transformers' `generate`.

    python tests/bench/generation.py MODEL_FOLDER PREPARED_DATA_FOLDER [--max-new-tokens 96]

Both sides answer greedily, stop at the end of the turn and compute in the same number format. The result, one JSON
line, is printed and appended to tests/bench/results/generation.jsonl.
"""

import argparse
import json
import platform
import time
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import torch
import transformers

from qlora_core.evaluation.generation import end_of_turn_ids, generate
from qlora_core.limits import usable_cpus
from qlora_core.modeling.device import name_of, pick_device
from qlora_core.modeling.load import load_full
from qlora_core.modeling.rows import read_prompts
from qlora_core.modeling.tokenizer import load_tokenizer
from qlora_core.recipe import Generation

RESULTS = Path(__file__).parent / "results" / "generation.jsonl"


class Taken(NamedTuple):
    """Time on the clock, and time of all cores together, which other work on the machine does not stretch."""

    wall_s: float
    cpu_s: float


def main() -> None:
    """Run both, check that they agree, write the result."""
    arguments = _arguments()
    model = load_full(arguments.model, pick_device())
    stop_ids = end_of_turn_ids(model, load_tokenizer(arguments.model))
    prompts = [prompt.prompt_ids for prompt in read_prompts(arguments.data / "prompts.arrow")][: arguments.prompts]
    generation = Generation(max_new_tokens=arguments.max_new_tokens, batch_size=arguments.batch_size)

    def one_by_one() -> list[list[int]]:
        return [_plain(model, prompt, stop_ids, generation.max_new_tokens) for prompt in prompts]

    def batched() -> list[list[int]]:
        return [answer.ids for answer in generate(model, prompts, stop_ids, generation, lambda _: None)]

    _plain(model, prompts[0], stop_ids, 4)  # warm up
    first, answers = _timed(batched)
    plain, reference = _timed(one_by_one)
    again, _ = _timed(batched)
    result = {
        "bench": "generation",
        "model": arguments.name,
        "parameters": model.num_parameters(),
        "device": _device(model.device),
        "dtype": name_of(model.dtype),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "prompts": len(prompts),
        "prompt_tokens": sum(map(len, prompts)),
        "answer_tokens": sum(map(len, answers)),
        "max_new_tokens": generation.max_new_tokens,
        "batch_size": generation.batch_size,
        "one_by_one_s": plain.wall_s,
        "batched_s": [first.wall_s, again.wall_s],
        "speedup": round(plain.wall_s / max(first.wall_s, again.wall_s), 2),
        "one_by_one_cpu_s": plain.cpu_s,
        "batched_cpu_s": [first.cpu_s, again.cpu_s],
        "speedup_in_cpu_time": round(plain.cpu_s / max(first.cpu_s, again.cpu_s), 2),
        "same_answers": sum(ours == theirs for ours, theirs in zip(answers, reference, strict=True)),
    }
    line = json.dumps(result)
    print(line)
    RESULTS.parent.mkdir(exist_ok=True)
    with RESULTS.open("a") as file:
        file.write(line + "\n")


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path, help="a model folder")
    parser.add_argument("data", type=Path, help="a prepared data set with prompts.arrow")
    parser.add_argument("--name", required=True, help="what to call the model in the result")
    parser.add_argument("--prompts", type=int, default=24)
    parser.add_argument("--max-new-tokens", type=int, default=96)
    parser.add_argument("--batch-size", type=int, default=32)
    return parser.parse_args()


def _plain(model: transformers.PreTrainedModel, prompt: list[int], stop_ids: frozenset[int], most: int) -> list[int]:
    ids = torch.tensor([prompt], device=model.device)
    output = model.generate(
        input_ids=ids,
        attention_mask=torch.ones_like(ids),
        max_new_tokens=most,
        do_sample=False,
        eos_token_id=sorted(stop_ids),
        pad_token_id=min(stop_ids),
    )
    answer: list[int] = output[0, len(prompt) :].tolist()
    return answer[:-1] if answer and answer[-1] in stop_ids else answer


def _timed(work: Callable[[], list[list[int]]]) -> tuple[Taken, list[list[int]]]:
    start, start_cpu = time.perf_counter(), time.process_time()
    answers = work()
    return Taken(round(time.perf_counter() - start, 2), round(time.process_time() - start_cpu, 2)), answers


def _device(device: torch.device) -> str:
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return f"{platform.machine()} CPU, {usable_cpus()} cores, {torch.get_num_threads()} threads"


if __name__ == "__main__":
    main()
