"""Say a conversation in the terms that a chat template understands: not every one knows tools or system prompts."""

from typing import Any, NamedTuple

from qlora_core.data.conversation import Conversation, Message, compact_json, spaced_json


class Abilities(NamedTuple):
    """What a chat template can write."""

    system: bool
    tool_role: bool
    """Turns by a tool."""
    tools: bool
    """Calls and the list of tools, in the form that the model was trained on."""


def fit(conversation: Conversation, abilities: Abilities) -> Conversation:
    """The same conversation in turns that the template can write.

    Without tools, calls become JSON text and the list of tools joins the system prompt; a tool's answer becomes the
    user's turn, and a system prompt the start of the first turn.
    """
    if not abilities.tools and _has_tools(conversation):
        conversation = _tools_as_text(conversation)
    messages = conversation.messages
    if not abilities.tool_role and any(message.role == "tool" for message in messages):
        messages = _join_users([m._replace(role="user") if m.role == "tool" else m for m in messages])
    if not abilities.system and messages[0].role == "system":
        messages = _join_users([m._replace(role="user") if m.role == "system" else m for m in messages], "\n\n")
    return conversation._replace(messages=messages)


def tool_schema(tool: dict[str, Any]) -> dict[str, Any]:
    """A tool in the form that templates expect, `{"type": "function", "function": {...}}`."""
    return tool if "function" in tool else {"type": "function", "function": tool}


def calls_as_text(message: Message) -> str:
    """What the assistant says, and its calls as JSON: one object, or a list if there are several."""
    written = [call._asdict() for call in message.calls]
    calls = spaced_json(written[0] if len(written) == 1 else written)
    return f"{message.content}\n{calls}" if message.content else calls


def _has_tools(conversation: Conversation) -> bool:
    return bool(conversation.tools) or any(message.calls for message in conversation.messages)


def _tools_as_text(conversation: Conversation) -> Conversation:
    messages = [m._replace(content=calls_as_text(m), calls=()) if m.calls else m for m in conversation.messages]
    if conversation.tools:
        tools = f"Tools: {compact_json(conversation.tools)}"
        if messages[0].role == "system":
            messages[0] = Message("system", f"{messages[0].content}\n{tools}")
        else:
            messages.insert(0, Message("system", tools))
    return conversation._replace(messages=tuple(messages), tools=())


def _join_users(messages: list[Message], separator: str = "\n") -> tuple[Message, ...]:
    """Neighbouring turns by the user as one, because templates without a tool's role want turns to alternate."""
    joined: list[Message] = []
    for message in messages:
        if joined and joined[-1].role == message.role == "user":
            joined[-1] = Message("user", f"{joined[-1].content}{separator}{message.content}")
        else:
            joined.append(message)
    return tuple(joined)
