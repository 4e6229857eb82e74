import json

import pytest

from qlora_core.data.conversation import Call, Message, content_key
from qlora_core.data.formats import to_conversation
from qlora_core.data.reasons import RowProblem
from qlora_core.data.tool_calls import single_call

CALL = {"name": "add", "arguments": {"a": 1}}
TOOLS = [{"name": "add", "parameters": {}}]


def read(row: object, name: str = "auto"):
    return to_conversation(row, name, "rows.jsonl", 7)


def test_alpaca_joins_instruction_and_input_and_keeps_system_and_history():
    row = {"instruction": "Add.", "input": "1 2", "output": "3", "system": "Be brief.", "history": [["hi", "hello"]]}
    assert [tuple(message[:2]) for message in read(row).messages] == [
        ("system", "Be brief."),
        ("user", "hi"),
        ("assistant", "hello"),
        ("user", "Add.\n1 2"),
        ("assistant", "3"),
    ]


@pytest.mark.parametrize(("user", "assistant"), [("human", "gpt"), ("user", "assistant")])
def test_sharegpt_and_belle_names_mean_the_same(user: str, assistant: str):
    row = {"id": 1, "conversations": [{"from": user, "value": "hi"}, {"from": assistant, "value": "hello"}]}
    assert read(row).messages == (Message("user", "hi"), Message("assistant", "hello"))


def test_sharegpt_calls_tools_and_observations_are_read():
    turns = [
        {"from": "human", "value": "1 + ?"},
        {"from": "function_call", "value": json.dumps(CALL)},
        {"from": "observation", "value": "2"},
        {"from": "gpt", "value": "2"},
    ]
    conversation = read({"conversations": turns, "tools": json.dumps(TOOLS), "system": "Add."})
    assert [message.role for message in conversation.messages] == ["system", "user", "assistant", "tool", "assistant"]
    assert conversation.messages[2].calls == (Call("add", {"a": 1}),)
    assert conversation.tools == tuple(TOOLS)
    assert conversation.function == "add"


def test_openai_messages_with_tool_calls_and_null_content_are_read():
    turns = [
        {"role": "user", "content": "1 + ?"},
        {"role": "assistant", "content": None, "tool_calls": [{"id": "x", "type": "function", "function": CALL}]},
    ]
    assert read({"messages": turns}).messages[1] == Message("assistant", "", (Call("add", {"a": 1}),))


def test_arguments_that_hold_json_as_text_are_read():
    turns = [
        {"from": "human", "value": "1 + ?"},
        {"from": "function_call", "value": json.dumps({"name": "add", "arguments": '{"a": 1}'})},
    ]
    assert read({"conversations": turns}).messages[1].calls == (Call("add", {"a": 1}),)


def test_the_place_is_file_and_row():
    assert read({"instruction": "a", "output": "b"}).place == "rows.jsonl:7"


def test_the_key_depends_on_what_is_said_and_not_on_the_form():
    alpaca = read({"instruction": "hi", "input": "", "output": "hello"})
    chat = read({"messages": [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "hello"}]})
    assert content_key(alpaca) == content_key(chat)


def test_the_key_depends_on_what_is_not_to_be_learnt():
    def chat(**fields):
        turns = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b", **fields}]
        return read({"messages": [*turns, {"role": "user", "content": "c"}, {"role": "assistant", "content": "d"}]})

    assert content_key(chat()) == content_key(chat(train=True)) != content_key(chat(train=False))


def test_a_single_call_has_the_tools_what_the_user_said_and_the_call():
    turns = [
        {"from": "human", "value": "Hello"},
        {"from": "gpt", "value": "Hi!"},
        {"from": "human", "value": "1 + ?"},
        {"from": "function_call", "value": json.dumps(CALL)},
        {"from": "observation", "value": "2"},
        {"from": "gpt", "value": "done"},
    ]
    single = single_call(read({"conversations": turns, "tools": json.dumps(TOOLS)}), "Call a tool.")
    assert single.messages == (
        Message("system", 'Call a tool.\n[{"name":"add","parameters":{}}]'),
        Message("user", "Hello\n1 + ?"),
        Message("assistant", '{"name": "add", "arguments": {"a": 1}}'),
    )


def test_a_row_without_calls_does_not_apply():
    with pytest.raises(RowProblem) as problem:
        single_call(read({"instruction": "a", "output": "b"}), "Call a tool.")
    assert problem.value.code == "no_tool_call"


def test_prompt_and_completion_are_one_question_and_answer():
    row = {"prompt": "hi", "completion": "hello"}
    assert read(row).messages == (Message("user", "hi"), Message("assistant", "hello"))


TURNS = (
    Message("user", "hi"),
    Message("assistant", "hello\nthere"),
    Message("user", "and?"),
    Message("assistant", "bye"),
)
TRANSCRIPTS = {
    "chatml": "<|im_start|>user\nhi<|im_end|>\n<|im_start|>assistant\nhello\nthere<|im_end|>\n"
    "<|im_start|>user\nand?<|im_end|>\n<|im_start|>assistant\nbye<|im_end|>\n",
    "llama 2": "<s>[INST] hi [/INST] hello\nthere </s><s>[INST] and? [/INST] bye </s>",
    "llama 2 without ends": "[INST] hi [/INST] hello\nthere [INST] and? [/INST] bye",
    "guanaco": "### Human: hi\n### Assistant: hello\nthere### Human: and?### Assistant: bye",
}


@pytest.mark.parametrize("name", TRANSCRIPTS)
def test_a_transcript_is_parsed_back_into_turns(name: str):
    assert read({"text": TRANSCRIPTS[name]}).messages == TURNS


def test_the_system_prompt_of_an_inst_transcript_is_found():
    text = "<s>[INST] <<SYS>>\nBe kind.\n<</SYS>>\n\nhi [/INST] hello </s>"
    assert read({"text": text}).messages[:2] == (Message("system", "Be kind."), Message("user", "hi"))


def test_a_turn_can_be_read_without_being_learnt():
    turns = [
        {"from": "human", "value": "hi"},
        {"from": "gpt", "value": "wrong", "train": False},
        {"from": "human", "value": "no"},
        {"from": "gpt", "value": "right"},
    ]
    assert [message.train for message in read({"conversations": turns}).messages] == [True, False, True, True]
