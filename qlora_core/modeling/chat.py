"""Ask a model folder a question: template, generate, stop at the end of the turn."""

from pathlib import Path

import torch

from qlora_core.errors import EvaluationError
from qlora_core.modeling.context import context_tokens
from qlora_core.modeling.device import pick_device
from qlora_core.modeling.load import load_full
from qlora_core.modeling.tokenizer import load_tokenizer

Message = dict[str, str]


class ChatModel:
    """A model folder, loaded once and asked many times, greedily."""

    def __init__(self, folder: Path, max_new_tokens: int = 256) -> None:
        self._device = pick_device()
        self._model, self._tokenizer = load_full(folder, self._device), load_tokenizer(folder)
        self._max_new_tokens, self._context = max_new_tokens, context_tokens(self._model.config)

    def answer(self, messages: list[Message]) -> str:
        """The model's next turn, without special tokens.

        Raises:
            EvaluationError: the conversation leaves no room for an answer in the model's context.
        """
        prompt = self._tokenizer.apply_chat_template(
            messages, add_generation_prompt=True, return_tensors="pt", return_dict=True
        ).to(self._device)
        asked = prompt["input_ids"].shape[1]
        room = self._max_new_tokens if self._context is None else min(self._max_new_tokens, self._context - asked)
        if room < 1:
            raise EvaluationError(
                f"the conversation has {asked:,} tokens, and the model reads at most {self._context:,}: nothing is "
                "left for an answer. Ask less at once, or begin a new conversation"
            )
        with torch.no_grad():
            out = self._model.generate(
                **prompt,
                max_new_tokens=room,
                do_sample=False,
                pad_token_id=self._tokenizer.pad_token_id,
            )
        text: str = self._tokenizer.decode(out[0, asked:], skip_special_tokens=True)
        return text
