import pytest

from qlora_core.errors import EvaluationError
from qlora_core.modeling.chat import ChatModel
from tests.tiny import write_model


def test_a_conversation_that_fills_the_context_is_refused_in_words(tmp_path):
    model = ChatModel(write_model(tmp_path), max_new_tokens=4)
    assert isinstance(model.answer([{"role": "user", "content": "Paint the door red."}]), str)
    with pytest.raises(EvaluationError, match=r"reads at most 256.*begin a new conversation"):
        model.answer([{"role": "user", "content": "Paint the door red. " * 200}])
