"""Ask a model folder a question: template, generate, stop at the end of the turn."""

from pathlib import Path

import torch

from qlora_core.modeling.device import pick_device
from qlora_core.modeling.load import load_full
from qlora_core.modeling.tokenizer import load_tokenizer

Message = dict[str, str]


class ChatModel:
    """A model folder, loaded once and asked many times, greedily."""

    def __init__(self, folder: Path, max_new_tokens: int = 256) -> None:
        self._device = pick_device()
        self._model, self._tokenizer = load_full(folder, self._device), load_tokenizer(folder)
        self._max_new_tokens = max_new_tokens

    def answer(self, messages: list[Message]) -> str:
        """The model's next turn, without special tokens."""
        prompt = self._tokenizer.apply_chat_template(
            messages, add_generation_prompt=True, return_tensors="pt", return_dict=True
        ).to(self._device)
        with torch.no_grad():
            out = self._model.generate(
                **prompt,
                max_new_tokens=self._max_new_tokens,
                do_sample=False,
                pad_token_id=self._tokenizer.pad_token_id,
            )
        text: str = self._tokenizer.decode(out[0, prompt["input_ids"].shape[1] :], skip_special_tokens=True)
        return text
