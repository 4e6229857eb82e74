"""The last proof: a fresh process loads the merged folder with plain transformers, and its answers stop."""

from typing import Any

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel

from qlora_core.artifacts import Record
from qlora_core.errors import MergeError
from qlora_core.events import Report
from qlora_core.merging.spec import MODEL, MergeSpec
from qlora_core.modeling.device import compute_dtype, pick_device
from qlora_core.modeling.remote_code import may_run_code
from qlora_core.modeling.rows import PromptRow, read_prompts
from qlora_core.modeling.tokenizer import end_of_turn_id

QUESTIONS = 2
SPARE_TOKENS = 32
MAX_NEW_TOKENS = 256


class Answers(Record):
    """What a fresh process saw."""

    answers: int
    """Prompts that were answered."""
    stopped: int
    """Answers that the model ended by itself."""


def work(spec: dict[str, Any], report: Report) -> Answers:
    """Load and answer; the entry of the second child.

    Raises:
        MergeError: weights are missing or left over, the folder does not stop at the end of a turn, or the model
            ended its turn and generation went on.
    """
    task = MergeSpec.model_validate(spec)
    folder, device = task.into / MODEL, pick_device()
    model, loading = AutoModelForCausalLM.from_pretrained(
        folder,
        dtype=compute_dtype(device),
        device_map={"": device},
        output_loading_info=True,
        trust_remote_code=may_run_code(folder),
    )
    wrong = {what: sorted(map(str, names)) for what, names in loading.items() if names}
    if wrong:
        raise MergeError(f"proof of the merge: plain transformers does not load {folder} whole: {wrong}")
    turn_end = end_of_turn_id(AutoTokenizer.from_pretrained(folder, trust_remote_code=may_run_code(folder)))
    _stops_at(turn_end, model)
    rows = read_prompts(task.dataset.path / "prompts.arrow")[:QUESTIONS]
    stopped = [_answer(model, row, turn_end) for row in rows]
    return Answers(answers=len(stopped), stopped=sum(stopped))


def _stops_at(turn_end: int | None, model: PreTrainedModel) -> None:
    stops = model.generation_config.eos_token_id
    if turn_end is not None and turn_end not in (stops if isinstance(stops, list) else [stops]):
        raise MergeError(
            f"proof of the merge: the chat template ends a turn with token {turn_end}, and generation_config.json "
            f"stops at {stops} only; answers would never end"
        )


def _answer(model: PreTrainedModel, row: PromptRow, turn_end: int | None) -> bool:
    """Whether a greedy answer ended by itself, within about the length of the expected one."""
    prompt = torch.tensor(row.prompt_ids, device=model.device)[None]
    budget = min(MAX_NEW_TOKENS, len(row.expected) // 2 + SPARE_TOKENS)
    output = model.generate(prompt, attention_mask=torch.ones_like(prompt), do_sample=False, max_new_tokens=budget)
    answer = output[0, prompt.shape[1] :].tolist()
    if turn_end in answer[:-1]:
        raise MergeError(
            f"proof of the merge: the model ended its turn after {answer.index(turn_end)} tokens and generation went "
            "on; the folder's generation_config.json does not stop it"
        )
    return len(answer) < budget or answer[-1] == turn_end
