"""ReAct text: Thought, Action and Observation on lines of their own, told apart by who wrote them.

The agent writes thoughts and actions; an observation is what its environment answered. Training data that keeps a whole trace in one
text would teach the agent to make up observations, so a trace is cut into turns here, or refused where the cut is not certain.
"""

from __future__ import annotations

import re
from dataclasses import dataclass

from loraloop.chat.refused_entry import EntryRefused, shorten
from loraloop.episode import AnyOutcome, Failure, Message, Success

_LABEL = re.compile(r"^(Thought|Action|Observation)(?: \d+)?:", re.MULTILINE)
_VERDICT = re.compile(r"\bEpisode finished, reward = (True|False|[0-9.]+)\s*$")


@dataclass(frozen=True)
class _Part:
    label: str
    text: str


def has_observation(text: str) -> bool:
    """Whether an observation follows an action in `text`: a turn that is said to be the agent's alone then holds another's words."""
    if "Observation" not in text or "Action" not in text:
        return False
    labels = [part.label for part in _to_parts(text)]
    return "Action" in labels and "Observation" in labels[labels.index("Action") :]


def begins_with_observation(text: str) -> bool:
    """Whether `text` begins with an observation: written by an agent, it is one that it made up."""
    found = _LABEL.match(text.lstrip())
    return found is not None and found[1] == "Observation"


def split_trace(text: str) -> list[Message]:
    """The turns of a trace: thoughts and actions as the agent's, observations as a user's, line ends between them left out.

    Refused as `ambiguous_trace` when an observation does not follow an action, or when the trace does not begin with one of the labels.
    """
    parts = _to_parts(text)
    if parts and parts[0].label == "":
        raise _ambiguous(f"text before the first label: {shorten(parts[0].text)}")
    messages: list[Message] = []
    own: list[_Part] = []
    for part in parts:
        if part.label != "Observation":
            own.append(part)
            continue
        if not own or own[-1].label != "Action":
            raise _ambiguous(f"an observation that follows no action: {shorten(part.text)}")
        messages += [_own_turn(own), Message(role="user", content=part.text.rstrip())]
        own = []
    return [*messages, *([_own_turn(own)] if own else [])]


def find_verdict(text: str) -> AnyOutcome | None:
    """What the last words of an observation say of the whole episode, `Episode finished, reward = True`; None when they say nothing."""
    found = _VERDICT.search(text) if "Episode finished" in text else None
    if found is None:
        return None
    solved = found[1] == "True" or (found[1] != "False" and _to_number(found[1]) >= 1)
    return Success(1.0) if solved else Failure(f"reward {found[1]}")


def _to_parts(text: str) -> list[_Part]:
    """`text` cut before every label; what stands before the first has the label ""."""
    starts = list(_LABEL.finditer(text))
    head = text[: starts[0].start()] if starts else text
    ends = [found.start() for found in starts[1:]] + [len(text)]
    parts = [_Part(found[1], text[found.start() : end]) for found, end in zip(starts, ends, strict=False)]
    return [*([_Part("", head)] if head.strip() else []), *parts]


def _own_turn(parts: list[_Part]) -> Message:
    return Message(role="assistant", content="".join(part.text for part in parts).rstrip())


def _to_number(text: str) -> float:
    try:
        return float(text)
    except ValueError:
        return 0.0


def _ambiguous(found: str) -> EntryRefused:
    advice = "write the trace as turns, the observations in turns of the user, and import it as openai"
    return EntryRefused("ambiguous_trace", found, "Thought and Action lines, each action followed by its Observation", advice)
