"""What a model thinks of episodes that it never saw: loss, the agent's next actions, and which of two conversations is the better one.

For each held-out sample, on those that ended well and those that failed apart: the loss per trained token; of the agent's own turns the
share whose action the model names (the tool) and gets exactly (name and arguments) by greedy decoding behind the recorded prompt; and
of each held-out pair whether the better side is likelier per token. Every figure is of one sample, so that two models are paired by it.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from loraloop.chat.row import Row
from loraloop.chat.rows import build_units
from loraloop.episode import Frozen
from loraloop.errors import EmptyData, RenderError
from loraloop.evaluate.action import actions_of, read_actions
from loraloop.evaluate.result import SideName
from loraloop.evaluate.rollout import Opening, Player, speak
from loraloop.files import append_jsonl, content_hash, locked_directory, read_jsonl
from loraloop.training_data import TrainingData

Measure = Callable[[Sequence[Row]], Sequence[float]]
"""Each row's summed loss, w * nll of its trained tokens, in nats."""
Ending = Literal["success", "failure", "pair"]
SAMPLES_FILE = "samples.jsonl"
MAX_LENGTH = 2048
"""Tokens of a row; what is longer is measured in windows."""
MAX_ACTIONS = 4
"""Turns of a sample whose actions are asked for, spread over it."""
ROOM = 24
"""Tokens that a turn may have more than the recorded one, before it is cut off."""
FIGURES: dict[str, tuple[str, bool]] = {
    "action_exact": ("next action exact", True),
    "action_named": ("next action named", True),
    "loss": ("loss per token", False),
    "preferred": ("better side likelier", True),
}
"""Of each figure, in the order of a report: its words, and whether more is better."""


@dataclass(frozen=True)
class HeldOutSample:
    """One sample to measure, how it ended, and a name that tells it from the others."""

    key: str
    ending: Ending
    sample: TrainingData
    """Of kind dpo for a pair, else a conversation."""


class SampleFigures(Frozen):
    """What one side makes of one sample; figures that do not apply to it are left out."""

    side: SideName
    key: str
    ending: Ending
    figures: dict[str, float]
    refused: str | None = None
    """Why there are none."""


class MeasuredSamples:
    """The samples that are measured already, in `samples.jsonl` of the evaluation's folder."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.path = folder / SAMPLES_FILE
        found = [SampleFigures.model_validate(line) for line in read_jsonl(self.path, skip_torn=True)] if self.path.exists() else []
        self.known = {(one.side, one.key): one for one in found}

    def add(self, measured: SampleFigures) -> None:
        """Keep one."""
        with locked_directory(self.folder):
            append_jsonl(self.path, measured.model_dump(mode="json"))
        self.known[measured.side, measured.key] = measured


def measure_samples(
    side: tuple[SideName, Callable[[], tuple[Player, Measure]]],
    samples: Sequence[HeldOutSample],
    kept: MeasuredSamples,
    on_measured: Callable[[], None] = lambda: None,
) -> None:
    """Measure what is not measured yet of `samples` with one side, which is loaded when it is first needed."""
    name, load = side
    loaded: tuple[Player, Measure] | None = None
    for one in samples:
        if (name, one.key) in kept.known:
            continue
        loaded = loaded or load()
        try:
            figures, refused = _measure(loaded, one), None
        except (EmptyData, RenderError) as error:
            figures, refused = {}, str(error)
        kept.add(SampleFigures(side=name, key=one.key, ending=one.ending, figures=figures, refused=refused))
        on_measured()


def pair_figures(samples: Sequence[HeldOutSample], kept: MeasuredSamples) -> list[tuple[str, bool, list[tuple[str, float, float]]]]:
    """(name, whether more is better, (key, candidate, opponent) of each sample that both sides measured) of each figure and ending."""
    paired: dict[tuple[str, Ending], list[tuple[str, float, float]]] = {}
    for one in samples:
        first, second = kept.known["candidate", one.key].figures, kept.known["opponent", one.key].figures
        for figure in FIGURES:
            if figure in first and figure in second:
                paired.setdefault((figure, one.ending), []).append((one.key, first[figure], second[figure]))
    endings: Mapping[Ending, str] = {"success": " (successes)", "failure": " (failures)", "pair": " (pairs)"}
    ordered = [(figure, ending) for ending in endings for figure in FIGURES if (figure, ending) in paired]
    return [(f"{FIGURES[figure][0]}{endings[ending]}", FIGURES[figure][1], paired[figure, ending]) for figure, ending in ordered]


def hash_samples(samples: Sequence[HeldOutSample]) -> str:
    """32 hex digits over keys, endings and contents, in order."""
    return content_hash([[one.key, one.ending, one.sample.to_line()] for one in samples])


def _measure(loaded: tuple[Player, Measure], one: HeldOutSample) -> dict[str, float]:
    player, measure = loaded
    is_pair = one.ending == "pair"
    units = build_units([one.sample], player.template, MAX_LENGTH, method="dpo" if is_pair else "sft").units
    if is_pair:
        better = _loss([row for unit in units for row in unit.better], measure)
        worse = _loss([row for unit in units for row in unit.worse], measure)
        return {"preferred": 1.0 if better < worse else 0.5 if better == worse else 0.0}
    loss = _loss([row for unit in units for row in unit.rows], measure)
    return {"loss": loss, **_measure_actions(player, one.sample)}


def _loss(rows: Sequence[Row], measure: Measure) -> float:
    """Per trained token, by weight."""
    return float(sum(measure(rows))) / sum(sum(row.weights[1:]) for row in rows)


def _measure_actions(player: Player, sample: TrainingData) -> dict[str, float]:
    """The shares of the agent's turns whose action is named and is exact; none where no turn's prompt fits MAX_LENGTH."""
    has_tools = bool(sample.tools) or any(message.tool_calls for message in sample.messages)
    own = [place for place, message in enumerate(sample.messages) if message.is_agent and message.weight > 0 and place]
    openings, limits, wanted = [], [], []
    for place in _spread(own, MAX_ACTIONS):
        before, turn = sample.messages[:place], sample.messages[place]
        turns, tools = player.template.prepare(sample.messages[: place + 1], sample.tools)
        whole = player.template.encode(player.template.text(turns, tools))[0]
        prompt = player.template.encode(player.template.text(turns[:-1], tools, generation_prompt=True))[0]
        if len(whole) > MAX_LENGTH:
            continue
        openings.append(Opening(before, sample.tools))
        limits.append(max(1, len(whole) - len(prompt)) + ROOM)
        wanted.append(actions_of(turn, has_tools=has_tools))
    said = [read_actions(text, has_tools=has_tools) for text in speak(player, openings, limits)]
    if not wanted:
        return {}
    named = [[action.name for action in one] == [action.name for action in other] for one, other in zip(said, wanted, strict=True)]
    exact = [one == other for one, other in zip(said, wanted, strict=True)]
    return {"action_named": sum(named) / len(named), "action_exact": sum(exact) / len(exact)}


def _spread(places: Sequence[int], n: int) -> list[int]:
    """At most `n` of `places`, the first and the last among them, evenly between."""
    if len(places) <= n:
        return list(places)
    return [places[round(step * (len(places) - 1) / (n - 1))] for step in range(n)]
