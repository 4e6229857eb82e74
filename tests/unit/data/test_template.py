import json

import numpy as np
import pytest
from transformers import PreTrainedTokenizerFast

from qlora_core.data.conversation import Call, Conversation, Message
from qlora_core.data.fit import Abilities
from qlora_core.data.reasons import RowProblem
from qlora_core.data.template import ChatTemplate, Rendered
from qlora_core.data.tokenize import tokenize
from qlora_core.errors import DataError

CHAT = Conversation(
    (
        Message("user", "What is 12 + 30?"),
        Message("assistant", "It is 42.\n"),
        Message("user", "谢谢"),
        Message("assistant", "🙂"),
    )
)
CALLING = Conversation(
    (
        Message("user", "Weather in Zürich?"),
        Message("assistant", "", (Call("get_weather", {"city": "Zürich"}),)),
        Message("tool", "rain"),
        Message("assistant", "It rains."),
    ),
    ({"name": "get_weather", "parameters": {}},),
)
THINKING = (
    "{% for t in tools or [] %}{{ t | tojson }}{% endfor %}"
    "{% for m in messages %}{{ '<|im_start|>' + m.role + '\n' }}{% if m.role == 'assistant' and loop.last %}"
    "{{ '<think>\n\n</think>\n\n' }}{% endif %}{{ m.content }}{% for c in m.tool_calls or [] %}"
    "{{ '<tool_call>' + c.function.name + ':' + c.function.arguments | tojson + '</tool_call>' }}{% endfor %}"
    "{{ '<|im_end|>\n' }}{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)


def trained_texts(tokenizer: PreTrainedTokenizerFast, conversation: Conversation) -> list[str]:
    """What each run of trained tokens decodes to."""
    tokens = tokenize(tokenizer, [ChatTemplate(tokenizer).render(conversation)])[0]
    runs = np.flatnonzero(np.diff(np.concatenate([[0], tokens.mask, [0]])))
    return [tokenizer.decode(tokens.ids[start:end]) for start, end in runs.reshape(-1, 2)]


def with_template(tokenizer: PreTrainedTokenizerFast, template: str) -> PreTrainedTokenizerFast:
    changed = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer.backend_tokenizer, eos_token=tokenizer.eos_token, bos_token=tokenizer.bos_token
    )
    changed.chat_template = template
    return changed


def test_chatml_trains_answers_and_turn_ends_but_not_the_newline_after(chatml):
    assert trained_texts(chatml, CHAT) == ["It is 42.\n<|im_end|>", "🙂<|im_end|>"]


def test_the_turn_end_is_trained_though_it_is_the_pad_token_too(chatml):
    tokens = tokenize(chatml, [ChatTemplate(chatml).render(CHAT)])[0]
    ends = tokens.ids == chatml.pad_token_id
    # system and two user turns end untrained, both answers end trained
    assert tokens.mask[ends].tolist() == [0, 0, 1, 0, 1]


def test_inst_trains_the_answer_with_its_end_of_text(inst):
    assert [text.strip() for text in trained_texts(inst, CHAT)] == ["It is 42. </s>", "🙂 </s>"]


def test_turns_that_are_not_to_be_learnt_carry_no_loss(chatml):
    first, second, *others = CHAT.messages
    conversation = CHAT._replace(messages=(first, second._replace(train=False), *others))
    assert trained_texts(chatml, conversation) == ["🙂<|im_end|>"]


def test_loss_can_be_limited_to_the_last_turn_or_spread_over_everything(chatml):
    template = ChatTemplate(chatml)
    last, everything = template.render(CHAT, "last_turn"), template.render(CHAT, "everything")
    assert [last.text[slice(*span)] for span in last.spans] == ["🙂<|im_end|>"]
    assert everything.spans == ((0, len(everything.text)),)


def test_a_token_that_starts_in_the_prompt_is_not_trained(inst):
    rendered = Rendered("what is 12 + 30?", ((6, 16),))
    tokens = tokenize(inst, [rendered])[0]
    starts = [start for start, _ in inst(rendered.text, return_offsets_mapping=True)["offset_mapping"]]
    assert tokens.mask.tolist() == [int(start >= 6) for start in starts]


def test_ids_are_those_of_the_tokenizers_own_chat_template(chatml, inst):
    turns = [{"role": m.role, "content": m.content} for m in CHAT.messages]
    for tokenizer in (chatml, inst):
        tokens = tokenize(tokenizer, [ChatTemplate(tokenizer).render(CHAT)])[0]
        assert tokens.ids.tolist() == tokenizer.apply_chat_template(turns, return_dict=False)


def test_a_turn_starts_where_the_generation_prompt_ends(chatml):
    thinking = with_template(chatml, THINKING)
    # the template writes an empty thought only in the last turn; both spans start after `assistant\n`
    assert trained_texts(thinking, CHAT) == ["It is 42.\n<|im_end|>", "<think>\n\n</think>\n\n🙂<|im_end|>"]


def test_calls_are_written_in_the_templates_own_form_when_it_has_one(chatml):
    template = ChatTemplate(with_template(chatml, THINKING))
    assert template.abilities == Abilities(system=True, tool_role=True, tools=True)
    texts = trained_texts(with_template(chatml, THINKING), CALLING)
    assert texts[0].startswith("<tool_call>get_weather:")
    assert texts[0].endswith("</tool_call><|im_end|>")
    assert len(texts) == 2


def test_calls_become_json_and_tools_join_the_system_prompt_when_the_template_has_none(chatml):
    rendered = ChatTemplate(chatml).render(CALLING)
    assert 'system\nTools: [{"name":"get_weather","parameters":{}}]<|im_end|>' in rendered.text
    assert trained_texts(chatml, CALLING)[0] == '{"name": "get_weather", "arguments": {"city": "Zürich"}}<|im_end|>'


def test_a_tools_answer_is_the_users_where_turns_must_alternate(inst):
    assert "[INST] rain [/INST]" in ChatTemplate(inst).render(CALLING).text


def test_a_template_that_alters_a_message_refuses_the_row(chatml):
    shouting = with_template(chatml, chatml.chat_template.replace("m['content']", "m['content'].replace('42', '43')"))
    with pytest.raises(RowProblem, match="alters the text 'It is 42"):
        ChatTemplate(shouting).render(CHAT)


def test_turns_that_the_template_refuses_are_a_row_problem(inst):
    backwards = CHAT._replace(messages=CHAT.messages[:1] * 2 + CHAT.messages[1:])
    with pytest.raises(RowProblem, match="turns must alternate"):
        ChatTemplate(inst).render(backwards)


def test_a_template_without_a_turn_end_is_an_error(chatml):
    endless = with_template(chatml, "{% for m in messages %}{{ m.role + ': ' + m.content + '\n' }}{% endfor %}")
    with pytest.raises(DataError, match="never learn to stop"):
        ChatTemplate(endless)


def test_a_tokenizer_without_a_template_is_an_error(chatml):
    with pytest.raises(DataError, match="no chat template"):
        ChatTemplate(PreTrainedTokenizerFast(tokenizer_object=chatml.backend_tokenizer))


def test_the_prompt_ends_with_the_generation_prompt_and_the_answer_has_no_turn_end(chatml):
    template = ChatTemplate(chatml)
    prompt = template.prompt(CHAT, template.render(CHAT))
    assert prompt.prompt.endswith("谢谢<|im_end|>\n<|im_start|>assistant\n")
    assert prompt.expected == "🙂"
    assert [turn["role"] for turn in json.loads(prompt.messages)] == ["user", "assistant", "user"]
