"""Turn a conversation with tools into one question and one call: the smallest form in which calling is learnt."""

from qlora_core.data.conversation import Conversation, Message, compact_json
from qlora_core.data.fit import calls_as_text
from qlora_core.data.reasons import RowProblem


def single_call(conversation: Conversation, system_prompt: str) -> Conversation:
    """System prompt with the compact list of tools, what the user said up to the first call, and that call as JSON.

    What the user said becomes one turn, one line each, because most templates want turns to alternate.

    Raises:
        RowProblem: the conversation has no tools or calls none.
    """
    if not conversation.tools:
        raise RowProblem("no_tool_call", "the row has no tools")
    at = next((at for at, message in enumerate(conversation.messages) if message.calls), None)
    if at is None:
        raise RowProblem("no_tool_call", "no turn of the row calls a function")
    said = [message.content for message in conversation.messages[:at] if message.role == "user"]
    call = conversation.messages[at].calls[:1]
    messages = (
        Message("system", f"{system_prompt}\n{compact_json(conversation.tools)}"),
        Message("user", "\n".join(said)),
        Message("assistant", calls_as_text(conversation.messages[at]._replace(content="", calls=call))),
    )
    return conversation._replace(messages=messages, tools=())
