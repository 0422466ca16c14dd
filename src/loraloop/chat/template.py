"""A model's own chat template, and what to do where it cannot render tools.

Templates differ: some render tool schemas, tool calls and tool results, some silently leave them out (SmolLM2's), some want call
arguments as an object, some as text. `ChatTemplate` finds out by rendering probes, and puts messages into the form that the template
keeps whole. Where it keeps nothing, the fallback writes plain text into the turn, in the widespread form of Hermes and Qwen:

    tools         at the end of the system turn, one JSON schema a line between <tools> and </tools>
    tool calls    in the agent's turn: <tool_call>{"name": …, "arguments": …}</tool_call>, one a line
    tool results  as a user turn: <tool_response>…</tool_response>

It needs a fast tokenizer with a chat template, and never runs code from a model's folder.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Literal, Protocol

from loraloop.episode import Message, ToolCall
from loraloop.errors import RenderError

Turn = dict[str, Any]


class Tokenizer(Protocol):
    """The part of a transformers fast tokenizer that rendering needs."""

    chat_template: Any
    is_fast: bool
    all_special_tokens: list[str]
    added_tokens_decoder: dict[int, Any]

    def apply_chat_template(self, conversation: list[Turn], **options: Any) -> Any:
        """Text (tokenize=False) of the conversation."""
        ...

    def decode(self, ids: list[int], **options: Any) -> Any:
        """The text of token ids."""
        ...

    def __call__(self, text: str, **options: Any) -> Any:
        """Token ids and offsets of a text."""
        ...


@dataclass(frozen=True)
class Abilities:
    """What a template keeps of what it is given; everything else goes through the fallback."""

    tools: bool
    tool_role: bool
    arguments: Literal["object", "text"] | None
    """How it wants call arguments; None when it drops tool calls."""
    parallel_calls: bool
    content_with_calls: bool
    """Whether what an agent says beside its calls is kept."""
    users_in_a_row: bool
    """Whether one user turn may follow another."""
    agent_opens_bare: bool
    agent_opens_with_tools: bool

    def agent_opens(self, *, with_tools: bool) -> bool:
        """Whether an agent turn may come first and is then still rendered as the agent's; some put tools into the first turn, whoever's."""
        return self.agent_opens_with_tools if with_tools else self.agent_opens_bare


@dataclass(frozen=True)
class Words:
    """Where an agent's words stand in the rendering that ends with them: characters [start, end), the stop token included."""

    text: str
    start: int
    end: int


class ChatTemplate:
    """One tokenizer's template. Raises RenderError when there is none, or when the tokenizer gives no offsets."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        if not getattr(tokenizer, "chat_template", None):
            raise RenderError(
                "this base model's tokenizer has no chat template; use an instruct model, or put a chat_template.jinja into its folder"
            )
        if not tokenizer.is_fast:
            raise RenderError("this base model has no tokenizer.json (a fast tokenizer); token offsets, and so exact masks, need one")
        self.tokenizer = tokenizer

    @cached_property
    def abilities(self) -> Abilities:
        """Found by rendering probes once."""
        return _probe(self._render)

    @cached_property
    def stop_texts(self) -> tuple[str, ...]:
        """The special tokens, any of which may end a turn, longest first."""
        special = {str(token) for token in self.tokenizer.added_tokens_decoder.values() if token.special}
        return tuple(sorted(special | set(self.tokenizer.all_special_tokens), key=lambda text: (-len(text), text)))

    @cached_property
    def _special(self) -> re.Pattern[str]:
        return re.compile("(" + "|".join(map(re.escape, self.stop_texts)) + ")")

    @cached_property
    def _can_cut(self) -> bool:
        """Whether what stands between special tokens is tokenised by itself, as it is by nearly all tokenizers."""
        text = self.text([_ASK, {"role": "assistant", "content": " probe  answer"}, _ASK])
        return sum(len(self.encode(piece)[0]) for piece in self._special.split(text)) == len(self.encode(text)[0])

    @cached_property
    def own_words(self) -> str:
        """What the template says itself at the beginning of a conversation that has no system turn; "" when nothing."""
        opening = self.text([_ASK]).partition(str(_ASK["content"]))[0]
        between = self.text([_ASK, {"role": "assistant", "content": "probe answer"}, _ASK]).rpartition(str(_ASK["content"]))[0]
        markers = set(self._special.sub(" ", between.rpartition("probe answer")[2]).split())
        words = [word for word in self._special.sub(" ", opening).split() if word not in markers]
        return " ".join(words[words[:1] == ["system"] :])

    @cached_property
    def is_dated(self) -> bool:
        """Whether the template may write the date of the day on which it renders, so that rows differ from day to day."""
        return "strftime_now" in str(self.tokenizer.chat_template)

    def text(self, turns: Sequence[Turn], tools: Sequence[Any] = (), *, generation_prompt: bool = False) -> str:
        """The template's rendering of prepared turns; raises RenderError with the template's own complaint."""
        try:
            return self._render(list(turns), list(tools) or None, generation_prompt)
        except Exception as error:  # a template may raise anything; it comes with the model, not with us
            raise RenderError(f"the chat template refuses this conversation: {error}") from error

    def encode(self, text: str) -> tuple[list[int], list[tuple[int, int]]]:
        """Token ids of a rendered text, and each one's (start, end) in characters."""
        try:
            encoded = self.tokenizer(text, add_special_tokens=False, return_offsets_mapping=True)
        except (TypeError, UnicodeError) as error:
            raise RenderError("the text holds a lone surrogate (half of a character), which no tokenizer reads") from error
        return list(encoded["input_ids"]), [tuple(pair) for pair in encoded["offset_mapping"]]

    def pieces(self, text: str) -> list[str]:
        """A rendered text cut before and behind its special tokens, where that leaves the number of tokens as it is."""
        return [piece for piece in self._special.split(text) if piece] if self._can_cut else [text]

    def decode(self, ids: Sequence[int], *, keep_special: bool = False) -> str:
        """The text of token ids, special tokens left out unless told otherwise."""
        return str(self.tokenizer.decode(list(ids), skip_special_tokens=not keep_special))

    def find_words(self, turns: Sequence[Turn], tools: Sequence[Any] = ()) -> Words | None:
        """The agent's words in the last of `turns`, behind the prompt that the model would be given, through the stop token.

        None when the template renders what precedes the turn otherwise once the turn is there, so that no model ever sees it so.
        Raises RenderError when no special token ends the turn.
        """
        text = self.text(turns, tools)
        start = self._find_start(text, turns[:-1], tools)
        if start is None:
            return None
        return self._words(text, start)

    def splice_words(self, turns: Sequence[Turn], tools: Sequence[Any] = ()) -> Words | None:
        """The agent's words in the last of `turns` behind the prompt that the model would be given, where that is not how the template
        renders what precedes them once they are there (see `find_words`): the prompt itself, and the words as the template has them.

        None when it cannot be told where in the template's rendering the words begin.
        """
        before = turns[:-1]
        if not before:
            return None
        text = self.text(turns, tools)
        prompt = self.text(before, tools, generation_prompt=True)
        opening = prompt[_n_common(prompt, self.text(before, tools)) :]
        if not opening:  # no prompt of its own: the words follow the special token at the end of what precedes them
            opening = next((special for special in self.stop_texts if prompt.endswith(special)), "")
        marked = self.text([*before, {"role": "assistant", "content": _unused_mark(text)}], tools)
        start = text.rfind(opening, 0, _n_common(text, marked)) if opening else -1
        if start < 0:
            return None
        return self._words(prompt + text[start + len(opening) :], len(prompt))

    def _words(self, text: str, start: int) -> Words:
        words = text[start:].rstrip()
        stop = next((special for special in self.stop_texts if words.endswith(special)), None)
        if stop is None:
            raise RenderError("the template ends an agent turn without a special token, so the model would never learn to stop")
        if words.count(stop) > 1:
            raise RenderError(f"the template ends an agent turn more than once ({stop}), so the model would learn to go on behind its end")
        return Words(text, start, start + len(words))

    def special_text_in(self, turn: Turn) -> str | None:
        """A special token whose text stands in what `turn` says, where it would be read as the token itself; else None."""
        said = [turn["content"], *(json.dumps(call["function"], ensure_ascii=False) for call in turn.get("tool_calls", ()))]
        return next((special for special in self.stop_texts if any(special in words for words in said)), None)

    def prepare(self, messages: Sequence[Message], tools: Sequence[dict[str, Any]] = ()) -> tuple[list[Turn], list[dict[str, Any]]]:
        """(turns, tools) in the form that this template keeps whole, one turn for each message.

        Tools that the template cannot render go into the system turn; a conversation without one gets one, so that there is then
        one turn more than messages, at the front. Raises RenderError for call arguments that the template could only garble.
        """
        turns = [self._prepare_turn(message) for message in messages]
        if tools and not self.abilities.tools:
            note = _tools_as_text(tools)
            if turns and turns[0]["role"] == "system":
                turns[0] = {**turns[0], "content": turns[0]["content"] + "\n\n" + note}
            else:
                turns.insert(0, {"role": "system", "content": note})
            return turns, []
        return turns, list(tools)

    def _prepare_turn(self, message: Message) -> Turn:
        content = message.content or ""
        if message.role == "tool":
            if self.abilities.tool_role:
                ids = {"tool_call_id": message.tool_call_id} if message.tool_call_id else {}
                return {"role": "tool", "content": content, **ids, **({"name": message.name} if message.name else {})}
            return {"role": "user", "content": f"<tool_response>\n{content}\n</tool_response>"}
        turn: Turn = {"role": message.role, "content": content}
        if message.tool_calls:
            if self._keeps_calls(message):
                turn["tool_calls"] = [self._prepare_call(call) for call in message.tool_calls]
            else:
                calls = "\n".join(_call_as_text(call) for call in message.tool_calls)
                turn["content"] = f"{content}\n{calls}" if content else calls
        return turn

    def _keeps_calls(self, message: Message) -> bool:
        """Whether the template renders the message's calls, all of them, and what is said beside them."""
        can = self.abilities
        return bool(
            can.arguments
            and (can.parallel_calls or len(message.tool_calls) == 1)
            and (can.content_with_calls or not (message.content or "").strip())
        )

    def _find_start(self, text: str, before: Sequence[Turn], tools: Sequence[Any]) -> int | None:
        """Where the agent's words begin in `text`, which renders `before` and its turn."""
        if before:
            prompt = self.text(before, tools, generation_prompt=True)
            if text.startswith(prompt):
                return len(prompt)
            if not text.startswith(self.text(before, tools)):
                return None
        # nothing precedes the turn, or the prompt opens what this turn does not have, such as a thought: see where a marker goes
        marker = _unused_mark(text)
        marked = self.text([*before, {"role": "assistant", "content": marker}], tools)
        head = marked.partition(marker)[0]
        return len(head) if marker in marked and text.startswith(head) else None

    def _prepare_call(self, call: ToolCall) -> Turn:
        arguments: Any = call.function.arguments
        if self.abilities.arguments == "object":
            arguments = parse_arguments(call)
        function = {"name": call.function.name, "arguments": arguments}
        return {"type": "function", "function": function, **({"id": call.id} if call.id else {})}

    def _render(self, turns: list[Turn], tools: list[Any] | None, generation_prompt: bool) -> str:
        return str(self.tokenizer.apply_chat_template(turns, tools=tools, add_generation_prompt=generation_prompt, tokenize=False))


def _n_common(first: str, second: str) -> int:
    """How many characters two texts have in common at their beginning."""
    pairs = zip(first, second, strict=False)
    return next((number for number, (one, other) in enumerate(pairs) if one != other), min(len(first), len(second)))


def _unused_mark(text: str) -> str:
    """Invisible characters that do not stand in `text`."""
    marker = "\u2063"
    while marker in text:
        marker += "\u2063"
    return marker


def parse_arguments(call: ToolCall) -> dict[str, Any]:
    """The call's arguments as an object; raises RenderError when the recorded text is not one."""
    try:
        arguments = json.loads(call.function.arguments or "{}")
    except json.JSONDecodeError as error:
        raise RenderError(f"the call of {call.function.name} has arguments that are not JSON ({error.msg})") from error
    if not isinstance(arguments, dict):
        raise RenderError(f"the call of {call.function.name} has arguments that are {type(arguments).__name__}, not an object")
    return arguments


def _call_as_text(call: ToolCall) -> str:
    """The fallback form; the arguments stand as the agent wrote them."""
    name = json.dumps(call.function.name, ensure_ascii=False)
    return f'<tool_call>{{"name": {name}, "arguments": {call.function.arguments or "{}"}}}</tool_call>'


def _tools_as_text(tools: Sequence[dict[str, Any]]) -> str:
    schemas = "\n".join(json.dumps(tool, ensure_ascii=False) for tool in tools)
    return (
        "You can call these tools, given as JSON schemas:\n"
        f"<tools>\n{schemas}\n</tools>\n"
        'To call one, write <tool_call>{"name": …, "arguments": …}</tool_call>, one call a line.'
    )


_PROBE_TOOL = {
    "type": "function",
    "function": {
        "name": "probe_tool",
        "description": "A probe.",
        "parameters": {"type": "object", "properties": {"probe_key": {"type": "string", "description": "A key."}}},
    },
}
_ASK: Turn = {"role": "user", "content": "probe question"}


def _probe(render: Callable[[list[Turn], list[Any] | None, bool], str]) -> Abilities:
    def rendered(turns: list[Turn], tools: list[Any] | None = None) -> str:
        try:
            return render(turns, tools, False)
        except Exception:  # noqa: BLE001  a template that raises on a probe does not have the ability
            return ""

    def calls(arguments: object, content: str = "", names: tuple[str, ...] = ("probe_one",)) -> list[Turn]:
        made = [
            {"type": "function", "id": f"probecal{i}", "function": {"name": name, "arguments": arguments}} for i, name in enumerate(names)
        ]
        return [_ASK, {"role": "assistant", "content": content, "tool_calls": made}]

    plain = rendered([_ASK, {"role": "assistant", "content": "probe words"}])
    end = plain.rstrip().rpartition("probe words")[2]

    def keeps(text: str, *parts: str) -> bool:
        whole = all(part in text for part in parts) and '\\"probe_key' not in text
        return whole and (not end or text.count(end) <= plain.count(end))  # one that ends the turn twice would teach to go on

    def opens(tools: list[Any] | None) -> bool:
        first = rendered([{"role": "assistant", "content": "probe opening"}], tools)
        return "probe opening" in first and first != rendered([{"role": "user", "content": "probe opening"}], tools)

    arguments: Literal["object", "text"] | None = None
    given: object = {"probe_key": "probe_value"}
    shown = ("probe_one", "probe_key", "probe_value")
    if keeps(rendered(calls(given)), *shown):
        arguments = "object"
    elif keeps(rendered(calls(as_text := '{"probe_key": "probe_value"}')), *shown):
        arguments, given = "text", as_text
    answer: Turn = {"role": "tool", "content": "probe_result", "tool_call_id": "probecal0", "name": "probe_one"}
    called = calls(given)
    return Abilities(
        tools="probe_tool" in rendered([_ASK], [_PROBE_TOOL]),
        tool_role="probe_result" in rendered([*(called if arguments else [_ASK, {"role": "assistant", "content": "probe call"}]), answer]),
        arguments=arguments,
        parallel_calls=keeps(rendered(calls(given, "", ("probe_one", "probe_two"))), *shown, "probe_two"),
        content_with_calls=keeps(rendered(calls(given, "probe words")), *shown, "probe words"),
        users_in_a_row=bool(rendered([_ASK, _ASK])),
        agent_opens_bare=opens(None),
        agent_opens_with_tools=opens([_PROBE_TOOL]),
    )
