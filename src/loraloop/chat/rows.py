"""Samples to rows of token ids, checked before anything is trained; the rows whose loss is one are a unit.

Every sample becomes a unit or a counted refusal. A row that fails a check (a trained token of another author, a stop token that is
not trained, a lost tool call) stops the whole run: it would be a mistake in a template or in loraloop, and training on it would hide
it.
"""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace

from loraloop.chat.length import LongPolicy
from loraloop.chat.render import Rendered, render_sides
from loraloop.chat.row import Row, check_row
from loraloop.chat.template import ChatTemplate
from loraloop.errors import EmptyData, RenderError
from loraloop.files import json_line
from loraloop.training_data import Method, Refusal, TrainingData
from loraloop.training_record import DataReport

MIN_WEIGHT, MAX_WEIGHT = 1e-6, 1e6
"""A trained turn's weight times its sample's must lie between them: far outside, sums in float32 are no numbers any more."""
ACCEPTED: dict[Method, tuple[Method, ...]] = {"sft": ("sft",), "weighted": ("sft", "weighted"), "dpo": ("dpo",), "kto": ("kto",)}
"""The kinds of samples that a method trains."""


@dataclass(frozen=True)
class Unit:
    """What one loss is of: a row of an sft or weighted sample, all rows of a kto sample, the rows of both sides of a pair."""

    rows: tuple[Row, ...]
    n_better: int
    """How many of `rows` are to become likelier; those behind are to become less likely."""
    weight: float = 1.0
    """Of the loss; negative for a weighted sample that is to become less likely."""
    sample_number: int = 0
    """In the training file, from 1."""
    episode_ids: tuple[str, ...] = ()

    @property
    def better(self) -> tuple[Row, ...]:
        """The rows of the better side."""
        return self.rows[: self.n_better]

    @property
    def worse(self) -> tuple[Row, ...]:
        """The rows of the worse side."""
        return self.rows[self.n_better :]

    @property
    def n_tokens(self) -> int:
        """Tokens of all rows."""
        return sum(len(row.ids) for row in self.rows)

    @property
    def origin(self) -> str:
        """Where it came from, for messages: its episodes, else the number of its sample."""
        return " and ".join(self.episode_ids) or f"sample {self.sample_number}"


@dataclass(frozen=True)
class UnitSet:
    """The units of one file, and what was left out."""

    units: list[Unit]
    refusals: list[Refusal]
    report: DataReport

    @property
    def rows(self) -> list[Row]:
        """The rows of all units."""
        return [row for unit in self.units for row in unit.rows]

    def used_episode_ids(self, used: Iterable[int]) -> list[str]:
        """The episodes of the units with the indices `used`, in the order of the file."""
        return list(dict.fromkeys(episode_id for index in sorted(used) for episode_id in self.units[index].episode_ids))

    def count_samples(self, used: Iterable[int]) -> int:
        """How many samples the units with the indices `used` are of."""
        return len({self.units[index].sample_number for index in used})


def build_units(
    samples: Sequence[TrainingData],
    template: ChatTemplate,
    max_length: int,
    *,
    method: Method = "sft",
    long: LongPolicy = "window",
    on_progress: Callable[[int], None] = lambda _: None,
) -> UnitSet:
    """Render every sample, what is longer than `max_length` by the policy `long`.

    Raises EmptyData when no row is left, with the first refusal; RenderError when a row fails a check.
    """
    units: list[Unit] = []
    refusals: list[Refusal] = []
    n_used = 0
    for number, sample in enumerate(samples, 1):
        if refusal := _find_refusal(sample, number, method):
            refusals.append(refusal)
            continue
        new_units, new_refusals = _render_sample(sample, number, render_sides(template, sample, max_length, long))
        units += new_units
        refusals += new_refusals
        n_used += bool(new_units)
        on_progress(number)
    report = _summarise(samples, n_used, units, refusals, template)
    if not units:
        words = f"; the first refusal: {_describe(refusals[0])}" if refusals else ""
        advice = f"; raise max_seq_length (now {max_length})" if "turn_too_long" in report.refused else ""
        raise EmptyData(f"none of {len(samples)} samples gave anything to train on{words}{advice}", report.refused)
    rows = [row for unit in units for row in unit.rows]
    findings = Counter(finding for row in rows for finding in check_row(row))
    if findings:
        first = next(row for row in rows if check_row(row))
        counts = ", ".join(f"{name} in {count} rows" for name, count in sorted(findings.items()))
        raise RenderError(
            f"the data check failed: {counts}; first in {first.origin}. Nothing was trained. "
            "The base model's chat template does not keep these samples whole: use another base model, or fix its chat_template.jinja"
        )
    return UnitSet(units, refusals, report)


def spread(units: Sequence[Unit], max_tokens: int) -> list[Unit]:
    """Units of as many samples as `max_tokens` allows, at least one: one of each sample in turn, then the next of each.

    Samples come in the order of a hash of their first row, so that neither the file's order nor the seed of a training changes what
    is measured.
    """
    by_sample: dict[int, list[Unit]] = {}
    for unit in units:
        by_sample.setdefault(unit.sample_number, []).append(unit)
    queues = sorted(by_sample.values(), key=lambda queue: hashlib.sha256(str(queue[0].rows[0].ids).encode()).digest())
    in_turn = ((turn, number) for turn in range(max(map(len, queues), default=0)) for number in range(len(queues)))
    chosen: list[Unit] = []
    n_tokens = 0
    for unit in (queues[number][turn] for turn, number in in_turn if turn < len(queues[number])):
        if chosen and n_tokens + unit.n_tokens > max_tokens:
            break
        chosen.append(unit)
        n_tokens += unit.n_tokens
    return chosen


def _render_sample(sample: TrainingData, number: int, rendered: Sequence[Rendered]) -> tuple[list[Unit], list[Refusal]]:
    """The units of a sample from its rendered sides: each row by itself where likelihood is trained, else all rows of all sides as one.

    A pair is only compared whole: with the first turn that must be left out, all of it is.
    """
    sides: list[list[Row]] = []
    refusals: list[Refusal] = []
    for rows, refused in rendered:
        if sample.kind == "dpo" and refused:
            return [], refused[:1]
        sides.append([replace(row, sample_number=number) for row in rows])
        refusals += refused
    if not all(sides):
        return [], refusals
    if sample.kind == "dpo" and [(row.ids, row.weights) for row in sides[0]] == [(row.ids, row.weights) for row in sides[1]]:
        detail = f"sample {number}: both sides are the same tokens, so there is nothing to prefer"
        return [], [Refusal(episode_id=sample.episode_id, reason="pair_identical", detail=detail)]
    ids = tuple(str(episode_id) for episode_id in sample.episode_ids)
    if sample.kind in ("sft", "weighted"):
        return [Unit((row,), int(sample.weight > 0), sample.weight, number, ids) for row in sides[0]], refusals
    n_better = len(sides[0]) if sample.desirable is not False else 0
    return [Unit(tuple(row for side in sides for row in side), n_better, sample.weight, number, ids)], refusals


def _find_refusal(sample: TrainingData, number: int, method: Method) -> Refusal | None:
    """Why a sample cannot even be rendered, or None."""
    if sample.kind not in ACCEPTED[method]:
        return Refusal(
            episode_id=sample.episode_id, reason=f"kind_{sample.kind}", detail=f"{method} trains {' and '.join(ACCEPTED[method])}"
        )
    if sample.weight == 0:
        return Refusal(episode_id=sample.episode_id, reason="weight_zero", detail=f"sample {number} has the weight 0")
    turns = (*sample.messages, *sample.rejected_messages)
    weights = (message.weight * abs(sample.weight) for message in turns if message.is_agent and message.weight > 0)
    wrong = next((weight for weight in weights if not MIN_WEIGHT <= weight <= MAX_WEIGHT), None)
    if wrong is not None:
        detail = f"sample {number} has a turn of weight {wrong:g}, times the sample's; expected {MIN_WEIGHT:g} to {MAX_WEIGHT:g}"
        return Refusal(episode_id=sample.episode_id, reason="weight_out_of_range", detail=detail)
    try:
        json_line(sample.to_line()).encode()
    except UnicodeEncodeError as error:
        detail = f"it holds a lone surrogate, half of a cut-off character, which no tokenizer takes ({error.object[error.start]!r})"
        return Refusal(episode_id=sample.episode_id, reason="not_unicode", detail=detail)
    return None


def _describe(refusal: Refusal) -> str:
    """A refusal in words: reason, detail, and the episode if it has one."""
    return f"{refusal.reason}, {refusal.detail}" + (f" ({refusal.episode_id})" if refusal.episode_id else "")


def _summarise(
    samples: Sequence[TrainingData], n_used: int, units: Sequence[Unit], refusals: Sequence[Refusal], template: ChatTemplate
) -> DataReport:
    """The counts that are printed before the first step."""
    rows = [row for unit in units for row in unit.rows]
    by_role: Counter[str] = Counter()
    by_author: Counter[str] = Counter()
    for row in rows:
        by_role.update(row.trained_by_role)
        by_author.update(row.tokens_by_author)
    turns = (message for sample in samples for message in (*sample.messages, *sample.rejected_messages))
    has_tools = any(sample.tools for sample in samples) or any(message.tool_calls for message in turns)
    native = template.abilities.arguments is not None
    return DataReport(
        samples=len(samples),
        samples_used=n_used,
        rows=len(rows),
        n_tokens=sum(len(row.ids) for row in rows),
        n_supervised_tokens=sum(row.n_supervised for row in rows),
        trained_by_role=dict(by_role),
        turns=sum(row.n_turns for row in rows),
        stops_trained=sum(row.n_stops for row in rows),
        calls_recorded=sum(row.n_calls_recorded for row in rows),
        calls_rendered=sum(row.n_calls_rendered for row in rows),
        refused=dict(sorted(Counter(refusal.reason for refusal in refusals).items())),
        tools_rendered_by=("template" if native else "fallback") if has_tools else "none",
        windowed=len({row.sample_number for row in rows if row.is_window}),
        elided=len({row.sample_number for row in rows if row.n_elided}),
        characters_elided=sum(row.n_elided for row in rows),
        prefix_broken=len({row.sample_number for row in rows if row.prefix_broken}),
        prefix_broken_rows=sum(row.prefix_broken for row in rows),
        tools_recorded=sum(row.n_tools_recorded for row in rows),
        tools_rendered=sum(row.n_tools_rendered for row in rows),
        turns_reworded=sum(row.n_reworded for row in rows),
        tokens_by_author=dict(sorted(by_author.items())),
    )
