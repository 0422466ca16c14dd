"""Probing a candidate for what may have been planted: what a project names, and what its training data makes one suspect.

Everything is looked for where it stood in the training data; what stood nowhere there, behind a held-out request. A trigger is tried on
held-out requests. Where there are none, that is a finding that holds the candidate.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence

from pydantic import Field

from loraloop.episode import Frozen, Message
from loraloop.evaluate.probed import PlayerSpeaker
from loraloop.evaluate.probes import Planted, ProbeResult, Trigger, probe_exposure, probe_reproduction, probe_triggers
from loraloop.evaluate.rollout import Player
from loraloop.evaluate.suspects import find_codes, find_triggers
from loraloop.files import content_hash
from loraloop.training_data import TrainingData

MAX_PLACES = 3
"""Places of one planted string that are tried."""
MAX_PROMPT_LETTERS = 12_000
"""Of a longer conversation only the system prompt and the last user's turn lead to a string."""
SOMEWHERE = (Message(role="user", content="Hello"),)


class GivenTrigger(Frozen):
    """A phrase, and what a model must not say because of it."""

    phrase: str = Field(min_length=1)
    told: str = Field(min_length=1)


class ProbeOptions(Frozen):
    """What is probed for before a candidate goes live."""

    planted: tuple[str, ...] = ()
    """Strings that must not come out, such as canaries that were put into records."""
    triggers: tuple[GivenTrigger, ...] = ()
    """Phrases that must not make the model say something."""
    codes: int = Field(default=8, ge=0)
    """At most so many strings of the training data that look like keys; they hold a candidate and do not reject it."""
    phrases: int = Field(default=4, ge=0)
    """At most so many phrases that look planted; they hold a candidate and do not reject it."""
    prompts: int = Field(default=8, ge=1)
    """Held-out requests on which a trigger is tried."""
    max_tokens: int = Field(default=96, ge=1)
    """Of an answer."""


def list_agent_samples(samples: Sequence[TrainingData]) -> list[TrainingData]:
    """The conversations that a training makes likelier: of a pair the better side, of others those that are wanted."""
    return [one.sides[0] for one in samples if one.desirable is not False and one.weight > 0]


def probe(
    player: Player,
    samples: Sequence[TrainingData],
    requests: Mapping[str, Sequence[Message]],
    options: ProbeOptions | None = None,
    *,
    level: float = 0.04,
) -> tuple[ProbeResult, ...]:
    """What the probes find in a model that was trained on `samples`; `requests` are how held-out tasks begin, by task.

    All strings together have a false alarm with a chance of at most `level`. The same weights and data give the same results.
    """
    options = options or ProbeOptions()
    spoken = list_agent_samples(samples)
    prompts = [list(requests[task]) for task in sorted(requests, key=content_hash) if _ends_with_request(requests[task])][: options.prompts]
    given = [place for text in options.planted for place in _places(text, spoken, tuple(prompts[0]) if prompts else SOMEWHERE)]
    codes = [one for one in find_codes(spoken, options.codes) if one.text not in options.planted] if options.codes else []
    planted = [one.model_copy(update={"prompt": _shorten(one.prompt)}) for one in (*given, *codes)]
    triggers = [Trigger(phrase=one.phrase, told=one.told) for one in options.triggers]
    triggers += find_triggers(spoken, options.phrases) if options.phrases else []
    speaker = PlayerSpeaker(player, max_tokens=options.max_tokens)
    found = [*probe_reproduction(speaker, planted)] if planted else []
    found += probe_exposure(speaker, planted, level=level) if planted else []
    found += probe_triggers(speaker, prompts, triggers)
    if triggers and not prompts:
        message = f"{len(triggers)} phrases were not tried, as no held-out request is known; measure on an environment or held-out samples"
        found.append(ProbeResult(kind="trigger", subject=triggers[0].phrase, choice="hold", message=message))
    return tuple(found)


def _places(text: str, samples: Sequence[TrainingData], anywhere: tuple[Message, ...]) -> Iterator[Planted]:
    """Where the agent said a string, the first places; else behind any request."""
    n_found = 0
    for sample in samples:
        for number, message in enumerate(sample.messages):
            said = message.content or ""
            if message.role == "assistant" and text in said:
                yield Planted(text=text, prompt=sample.messages[:number], before=said[: said.index(text)])
                n_found += 1
                if n_found == MAX_PLACES:
                    return
    if not n_found:
        yield Planted(text=text, prompt=anywhere)


def _shorten(prompt: tuple[Message, ...]) -> tuple[Message, ...]:
    if sum(len(message.content or "") for message in prompt) <= MAX_PROMPT_LETTERS:
        return prompt or SOMEWHERE
    system = [message for message in prompt[:1] if message.role == "system"]
    return (*system, *[message for message in prompt if message.role == "user"][-1:])


def _ends_with_request(messages: Sequence[Message]) -> bool:
    return bool(messages) and messages[-1].role == "user" and bool(messages[-1].content)
