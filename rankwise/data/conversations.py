"""Conversations as data sets write them → the messages that chat templates take, and what is wrong with them."""

import json
from collections.abc import Iterable, Mapping
from typing import Any

from rankwise.data.files import HALF_CHARACTER, has_half_character, parsed

Message = dict[str, Any]
Faults = list[str]

ROLES = ("system", "developer", "user", "assistant", "tool")
SHAREGPT_ROLES = {
    "human": "user",
    "user": "user",
    "gpt": "assistant",
    "chatgpt": "assistant",
    "assistant": "assistant",
    "model": "assistant",
    "system": "system",
    "tool": "tool",
    "observation": "tool",
    "function_response": "tool",
    "function_call": "assistant",
    "tool_call": "assistant",
}
_CALLS = ("function_call", "tool_call")
_OTHER_WEIGHTS = ("loss", "train", "trainable")
"""What other tools call a message's weight."""


def kind(value: Any) -> str:
    """The type of a value, in the words of a data file."""
    return "null" if value is None else type(value).__name__


def unreadable(text: str) -> str | None:
    """Why a string is no text: NUL characters, or halves of a surrogate pair, which no tokenizer takes."""
    if "\0" in text:
        return "holds a NUL character"
    return HALF_CHARACTER if has_half_character(text) else None


def messages_from(value: Any, faults: Faults, need_answer: bool = True) -> list[Message]:
    """OpenAI messages, checked: roles and their order, contents, tool calls. Writes what is wrong to `faults`."""
    value = parsed(value)
    if not isinstance(value, list) or not value:
        faults.append("messages must be a list that is not empty")
        return []
    messages = [_message(f"messages[{index}]", entry, faults) for index, entry in enumerate(value)]
    if not faults:
        faults += _order_faults(messages)
    if need_answer and not any(_says_something(m) for m in messages if m.get("role") == "assistant"):
        faults.append("no assistant message with content, so no token of this row would be trained")
    return messages


def messages_from_sharegpt(value: Any, faults: Faults, need_answer: bool = True) -> list[Message]:
    """`conversations` of {"from", "value"} turns (or of messages, as some data sets have them) → messages."""
    value = parsed(value)
    if not isinstance(value, list) or not value:
        faults.append("conversations must be a list that is not empty")
        return []
    if all(isinstance(turn, dict) and "role" in turn for turn in value):
        return messages_from(value, faults, need_answer)
    messages = []
    for index, turn in enumerate(value):
        name = f"conversations[{index}]"
        if not isinstance(turn, dict):
            faults.append(f"{name} must be an object, found {kind(turn)}")
        elif not isinstance(turn.get("from"), str) or turn["from"] not in SHAREGPT_ROLES:
            faults.append(f"{name}.from must be one of {', '.join(SHAREGPT_ROLES)}, found {turn.get('from')!r}")
        elif not isinstance(turn.get("value"), str):
            faults.append(f"{name}.value must be a string, found {kind(turn.get('value'))}")
        elif turn["from"] in _CALLS:
            calls = parsed(turn["value"])
            calls = calls if isinstance(calls, list) else [calls]
            messages.append({"role": "assistant", "content": "", "tool_calls": calls})
        else:
            messages.append({"role": SHAREGPT_ROLES[turn["from"]], "content": turn["value"]})
        if isinstance(turn, dict) and messages:
            messages[-1] |= {key: turn[key] for key in ("weight", *_OTHER_WEIGHTS) if key in turn}
    return messages if faults else messages_from(messages, faults, need_answer)


def tools_from(value: Any, faults: Faults) -> list[dict[str, Any]]:
    """Tool definitions: a list, or the JSON text of one; bare functions are wrapped as OpenAI writes them."""
    value = parsed(value)
    if value in (None, "", []):
        return []
    if not isinstance(value, list) or not all(isinstance(tool, dict) for tool in value):
        faults.append(f"tools must be a list of tool definitions, found {kind(value)}")
        return []
    tools = [tool if "function" in tool else {"type": "function", "function": tool} for tool in value]
    if not all(isinstance(tool["function"], dict) and isinstance(tool["function"].get("name"), str) for tool in tools):
        faults.append("each of tools must name its function")
    return tools


def _message(name: str, entry: Any, faults: Faults) -> Message:
    if not isinstance(entry, dict):
        faults.append(f"{name} must be an object, found {kind(entry)}")
        return {}
    # Parquet gives every message the fields of all messages, empty ones as null.
    message = {key: value for key, value in entry.items() if value is not None}
    role = message.get("role")
    if role == "function":  # OpenAI's older form, as is function_call.
        message["role"] = role = "tool"
    if "function_call" in message:
        message["tool_calls"] = [message.pop("function_call")]
    if role not in ROLES:
        faults.append(f"{name}.role must be one of {', '.join(ROLES)}, found {role!r}")
        return message
    if message.get("tool_calls"):
        message["tool_calls"] = list(_tool_calls(name, message["tool_calls"], faults))
        message.setdefault("content", "")
    message["content"] = content = _content(message.get("content"))
    if not isinstance(content, str):
        faults.append(f"{name}.content must be a string, found {kind(entry.get('content'))}")
    elif problem := unreadable(content):
        faults.append(f"{name}.content {problem}")
    elif role == "assistant" and not _says_something(message):
        faults.append(f"{name} is an assistant message without content, so nothing of it could be trained")
    if message.get("weight", 1) not in (0, 1):
        faults.append(f"{name}.weight must be 0 (not trained) or 1, found {message['weight']!r}")
    for other in _OTHER_WEIGHTS:
        if (found := message.pop(other, True)) not in (True, 1):
            faults.append(
                f'{name}.{other} is not read; a message that is not to be trained has "weight": 0. It may be true, or '
                f"left out, found {found!r}"
            )
    return message


def _content(content: Any) -> Any:
    """A content of several text parts, as OpenAI allows, as one text."""
    parts = content if isinstance(content, list) else []
    texts = [part.get("text") for part in parts if isinstance(part, dict) and part.get("type") == "text"]
    if parts and len(texts) == len(parts) and all(isinstance(text, str) for text in texts):
        return "".join(map(str, texts))
    return content


def _tool_calls(name: str, calls: Any, faults: Faults) -> Iterable[dict[str, Any]]:
    """Calls with their arguments as an object, which is what most templates take; OpenAI writes them as JSON text."""
    if not isinstance(calls, list):
        faults.append(f"{name}.tool_calls must be a list, found {kind(calls)}")
        return
    for index, call in enumerate(calls):
        whole = f"{name}.tool_calls[{index}]"
        function = call.get("function", call) if isinstance(call, Mapping) else None
        if not isinstance(function, Mapping) or not isinstance(function.get("name"), str) or not function["name"]:
            faults.append(f"{whole} must name the function that is called")
            continue
        written = function.get("arguments") or {}
        arguments = parsed(written)
        if not isinstance(arguments, dict):
            faults.append(f"{whole}: the arguments must be a JSON object, found {arguments!r}")
        elif isinstance(written, str):
            arguments = Arguments(arguments)
            arguments.written = written
        given = {key: value for key, value in call.items() if value is not None} if "function" in call else {}
        yield {"type": "function", **given, "function": {**function, "arguments": arguments}}


class Arguments(dict[str, Any]):
    """The arguments of a call, of which the row has a text."""

    written: str


def arguments_text(arguments: dict[str, Any]) -> str:
    """The JSON text of a call's arguments: the row's own, where it has one."""
    if isinstance(arguments, Arguments) and arguments:
        return arguments.written
    return json.dumps(arguments, ensure_ascii=False, default=str)


def with_text_arguments(messages: list[Message]) -> list[Message]:
    """The messages with the arguments of tool calls as JSON text, for templates that join them to other text."""
    changed = []
    for message in messages:
        calls = [
            {**call, "function": {**call["function"], "arguments": arguments_text(call["function"]["arguments"])}}
            for call in message.get("tool_calls", [])
        ]
        changed.append({**message, "tool_calls": calls} if calls else message)
    return changed


def _says_something(message: Message) -> bool:
    content = message.get("content")
    return bool(message.get("tool_calls")) or (isinstance(content, str) and bool(content.strip()))


def _order_faults(messages: list[Message]) -> Iterable[str]:
    for index, message in enumerate(messages):
        before = messages[index - 1]["role"] if index else None
        if message["role"] in ("system", "developer") and index:
            yield f"messages[{index}]: a {message['role']} message may only come first"
        elif message["role"] == "tool" and before not in ("assistant", "tool"):
            yield f"messages[{index}]: a tool's result must follow an assistant message, which calls the tool"
