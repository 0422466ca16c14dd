"""What a dataset will teach, found before any training: by whom each token was written, how much it weighs, and what is left out.

`inspect` renders with the same functions and checks as the training process, so what it says is what is trained. Without a base model
there are no tokens yet; then it tells of characters, and `Findings.data` is None. Quarantined episodes give no samples, and so none of
their text is here. Nothing is random: the same dataset and base model give the same findings.
"""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from pydantic import Field

from loraloop.chat.authors import author_of
from loraloop.chat.length import LongPolicy
from loraloop.chat.rows import build_units
from loraloop.chat.template import ChatTemplate
from loraloop.data_report.shown import ShownSample, show_rendered, show_sample
from loraloop.episode import Frozen
from loraloop.errors import EmptyData, RenderError
from loraloop.files import json_line
from loraloop.training_data import Method, Refusal, TrainingData
from loraloop.training_record import DataReport

AUTHORS = ("system", "user", "tool", "assistant", "demonstration", "other", "template")
MAX_EXAMPLES = 3
"""Refusals of each reason that are told in full."""


@dataclass(frozen=True)
class ReportOptions:
    """What to look at, and how."""

    max_length: int = 2048
    """Tokens of a row, as in the training."""
    long: LongPolicy = "window"
    n_show: int = 3
    """Samples to show whole."""


class AuthorShare(Frozen):
    """How much of all that is rendered one author wrote, and how much of it is trained."""

    author: str
    size: int
    """Tokens; characters where there is no base model."""
    trained: int


class TemplateFacts(Frozen):
    """What the base model's chat template does with recorded conversations."""

    tools_by: str
    """`template` or `fallback`, as the two below."""
    calls_by: str
    results_by: str
    stop_is_trained: bool | None
    """None when no turn is trained at all."""
    own_words: str
    """What it says itself where a recording has no system turn."""
    is_dated: bool
    """It may write the day's date, so that rows made on another day differ."""


class Drift(Frozen):
    """Where training shows the model something else than the recording: what can be known of it.

    Recordings hold messages, not the text or token ids of their prompts; what another template made of those messages at the time
    cannot be compared.
    """

    tools_not_recorded: int
    """Samples with tool calls and no tool schemas: the prompt shows no tools, where the one that is served will show them."""
    template_speaks: int
    """Samples without a system turn, where the template puts in words of its own."""
    turns_reworded: int
    """Trained turns whose words are trimmed, or lack a thought."""
    tools_in_system_turn: int
    """Samples whose tools are written into the system turn, as the template cannot show them."""
    calls_as_text: int
    """Samples whose tool calls are written as text."""
    results_as_user: int
    """Samples whose tool results are shown as user turns."""


class Findings(Frozen):
    """Everything that the report tells."""

    dataset: str
    method: Method
    base: str | None
    max_length: int
    long: str
    samples: int
    held_out: int
    refused_by_build: dict[str, int]
    characters: int
    shares: tuple[AuthorShare, ...]
    kinds: dict[str, int]
    """Samples by kind; of kto by desirable and undesirable."""
    weights: tuple[float, ...]
    """Of the samples."""
    data: DataReport | None = None
    template: TemplateFacts | None = None
    drift: Drift | None = None
    lengths: tuple[int, ...] = ()
    """Tokens of each row."""
    refusals: dict[str, tuple[str, ...]] = Field(default_factory=dict)
    """Of rendering: the first few of each reason in words."""
    failure: str | None = None
    """Why a training on this data would stop at once; None when it would not."""
    shown: tuple[ShownSample, ...] = ()


class Subject(Frozen):
    """The dataset that is looked at."""

    dataset: str
    method: Method
    samples: tuple[TrainingData, ...]
    """Those to train on."""
    held_out: int = 0
    refused: dict[str, int] = Field(default_factory=dict)


def inspect(
    subject: Subject,
    options: ReportOptions,
    base: tuple[str, ChatTemplate] | None = None,
    on_progress: Callable[[int], None] = lambda _: None,
) -> Findings:
    """Look at a dataset, with a base model's name and template where there is one."""
    chosen = _choose(subject.samples, options.n_show)
    plain = Findings(
        dataset=subject.dataset,
        method=subject.method,
        base=base[0] if base else None,
        max_length=options.max_length,
        long=options.long,
        samples=len(subject.samples),
        held_out=subject.held_out,
        refused_by_build=subject.refused,
        characters=sum(_count_characters(subject.samples)[0].values()),
        shares=_character_shares(subject.samples),
        kinds=dict(sorted(Counter(map(_kind, subject.samples)).items())),
        weights=tuple(sample.weight for sample in subject.samples),
    )
    if base is None:
        return plain.model_copy(update={"shown": tuple(show_sample(number, sample) for number, sample in chosen)})
    template = base[1]
    shown = [show_rendered(template, number, sample, options.max_length, options.long) for number, sample in chosen]
    told = plain.model_copy(update={"shown": tuple(one for one in shown if one is not None)})
    try:
        units = build_units(
            subject.samples, template, options.max_length, method=subject.method, long=options.long, on_progress=on_progress
        )
    except EmptyData as error:
        return told.model_copy(update={"failure": str(error), "refusals": dict.fromkeys(error.refused, ()), "shares": ()})
    except RenderError as error:
        return told.model_copy(update={"failure": str(error), "shares": ()})
    return told.model_copy(
        update={
            "data": units.report,
            "template": _template_facts(template, units.report),
            "drift": _find_drift(template, subject.samples, units.report),
            "shares": _token_shares(units.report),
            "lengths": tuple(len(row.ids) for row in units.rows),
            "refusals": _examples(units.refusals),
        }
    )


def _choose(samples: Sequence[TrainingData], count: int) -> list[tuple[int, TrainingData]]:
    """(number, sample) of those to show: by a hash of their content, one of each kind in turn."""
    queues: dict[str, list[tuple[int, TrainingData]]] = {}
    for number, sample in sorted(enumerate(samples, 1), key=lambda pair: _digest(pair[1])):
        queues.setdefault(_kind(sample), []).append((number, sample))
    in_turn = [queue[turn] for turn in range(count) for _, queue in sorted(queues.items()) if turn < len(queue)]
    return in_turn[:count]


def _digest(sample: TrainingData) -> bytes:
    return hashlib.sha256(json_line(sample.to_line()).encode("utf-8", "surrogatepass")).digest()


def _kind(sample: TrainingData) -> str:
    if sample.kind != "kto":
        return sample.kind
    return "kto desirable" if sample.desirable else "kto undesirable"


def _count_characters(samples: Sequence[TrainingData]) -> tuple[Counter[str], Counter[str]]:
    """(characters by author, those that are trained); the prompt of a pair once."""
    written: Counter[str] = Counter()
    trained: Counter[str] = Counter()
    for sample in samples:
        for message in (*sample.sides[0].messages, *sample.rejected_messages):
            said = (message.content or "", *(call.function.name + call.function.arguments for call in message.tool_calls))
            size = sum(map(len, said))
            written[author_of(message)] += size
            if message.is_agent and message.weight > 0 and sample.weight != 0:
                trained[author_of(message)] += size
    return written, trained


def _character_shares(samples: Sequence[TrainingData]) -> tuple[AuthorShare, ...]:
    written, trained = _count_characters(samples)
    return tuple(AuthorShare(author=author, size=written[author], trained=trained[author]) for author in AUTHORS if written[author])


def _token_shares(report: DataReport) -> tuple[AuthorShare, ...]:
    """Trained tokens are those that the data check found, by its own proof and not by the stretches of the report."""
    sizes, trained = report.tokens_by_author, report.trained_by_role
    return tuple(
        AuthorShare(author=author, size=sizes.get(author, 0), trained=trained.get(author, 0))
        for author in AUTHORS
        if sizes.get(author) or trained.get(author)
    )


def _template_facts(template: ChatTemplate, report: DataReport) -> TemplateFacts:
    can = template.abilities
    return TemplateFacts(
        tools_by="template" if can.tools else "fallback",
        calls_by="template" if can.arguments else "fallback",
        results_by="template" if can.tool_role else "fallback",
        stop_is_trained=report.stops_trained == report.turns if report.turns else None,
        own_words=template.own_words,
        is_dated=template.is_dated,
    )


def _find_drift(template: ChatTemplate, samples: Sequence[TrainingData], report: DataReport) -> Drift:
    can = template.abilities
    turns = [(*sample.messages, *sample.rejected_messages) for sample in samples]
    has_calls = sum(any(message.tool_calls for message in messages) for messages in turns)
    return Drift(
        tools_not_recorded=sum(
            any(message.tool_calls for message in messages) and not sample.tools for sample, messages in zip(samples, turns, strict=True)
        ),
        template_speaks=sum(sample.system is None for sample in samples) if template.own_words else 0,
        turns_reworded=report.turns_reworded,
        tools_in_system_turn=0 if can.tools else sum(bool(sample.tools) for sample in samples),
        calls_as_text=0 if can.arguments else has_calls,
        results_as_user=0 if can.tool_role else sum(any(message.role == "tool" for message in messages) for messages in turns),
    )


def _examples(refusals: Sequence[Refusal]) -> dict[str, tuple[str, ...]]:
    found: dict[str, list[str]] = {}
    for refusal in refusals:
        told = found.setdefault(refusal.reason, [])
        if len(told) < MAX_EXAMPLES:
            told.append(f"{refusal.episode_id or 'a sample'}: {refusal.detail}")
    return {reason: tuple(told) for reason, told in sorted(found.items())}
