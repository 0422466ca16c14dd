"""A small corpus in every kind, and the template that it is rendered with."""

from __future__ import annotations

import tiny

from loraloop.chat.template import ChatTemplate
from loraloop.data_report.findings import Findings, ReportOptions, Subject, inspect
from loraloop.episode import EpisodeId, FunctionCall, Message, ToolCall
from loraloop.training_data import Method, TrainingData

TOOL = {"type": "function", "function": {"name": "look", "description": "Look.", "parameters": {"type": "object", "properties": {}}}}
SPEAKING = (
    "{% if messages[0].role != 'system' %}{{ '<|im_start|>system\nYou are Tiny, made for tests.<|im_end|>\n' }}{% endif %}" + tiny.CHATML
)
"""A template that says something itself, as SmolLM2's does."""


def say(role: str, content: str | None, **flags) -> Message:
    return Message(role=role, content=content, **flags)


def look(**flags) -> Message:
    return Message(role="assistant", tool_calls=(ToolCall(function=FunctionCall(name="look", arguments='{"box":1}')),), **flags)


def sample(*turns: Message, number: int = 1, **fields) -> TrainingData:
    return TrainingData(messages=turns, episode_id=EpisodeId(f"ep-{number}"), **fields)


WORKED = (say("system", "Be §brief§."), say("user", "What?"), look(), say("tool", "a ball"), say("assistant", "A ball."))
SFT = (
    sample(*WORKED, number=1, tools=(TOOL,)),
    sample(say("user", "Hi"), say("assistant", "Shown.", is_demo=True), say("user", "You"), say("assistant", "Mine."), number=2),
)
WEIGHTED = tuple(
    sample(say("user", f"q{number}"), say("assistant", "a"), number=number, kind="weighted", weight=weight)
    for number, weight in enumerate((1.0, 0.25, -0.5), 1)
)
PAIR = (
    sample(
        say("user", "Choose"),
        say("assistant", "Well chosen."),
        kind="dpo",
        rejected_messages=(say("assistant", "Badly chosen."),),
        rejected_episode_id=EpisodeId("ep-9"),
    ),
)
KTO = tuple(
    sample(say("user", f"q{number}"), say("assistant", "a"), number=number, kind="kto", desirable=number % 3 == 0) for number in range(1, 7)
)


def make_template(text: str = tiny.CHATML) -> ChatTemplate:
    return ChatTemplate(tiny.make_tokenizer(text))


def look_at(
    samples: tuple[TrainingData, ...] = SFT,
    method: Method = "sft",
    template: ChatTemplate | None = None,
    refused: dict[str, int] | None = None,
    **options,
) -> Findings:
    """The findings; with the plain template unless told otherwise."""
    subject = Subject(dataset="d0", method=method, samples=samples, held_out=1, refused=refused or {})
    return inspect(subject, ReportOptions(**options), ("tiny", template or make_template()))


def look_without_base(samples: tuple[TrainingData, ...] = SFT, method: Method = "sft", **options) -> Findings:
    return inspect(Subject(dataset="d0", method=method, samples=samples), ReportOptions(**options))
