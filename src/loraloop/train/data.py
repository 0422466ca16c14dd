"""From a training file to rows of token ids, checked before anything is trained.

Every line becomes rows or a counted refusal. A row that fails a check (a trained token of another author, a stop token that is not
trained, a lost tool call) stops the whole run: it would be a mistake in a template or in loraloop, and training on it would hide it.
"""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from itertools import zip_longest
from pathlib import Path

from loraloop.chat.render import Row, check_row, render
from loraloop.chat.template import ChatTemplate
from loraloop.errors import EmptyData, RenderError
from loraloop.files import json_line, read_jsonl
from loraloop.training_data import Refusal, TrainingData
from loraloop.training_record import DataReport

MIN_WEIGHT, MAX_WEIGHT = 1e-6, 1e6
"""A trained turn's weight times its sample's must lie between them: far outside, sums in float32 are no numbers any more."""


@dataclass(frozen=True)
class RowSet:
    """The rows of one file, and what was left out."""

    rows: list[Row]
    refusals: list[Refusal]
    report: DataReport

    def used_episode_ids(self, used: Iterable[int]) -> list[str]:
        """The episodes of the rows with the indices `used`, in the order of the file."""
        rows = [self.rows[index] for index in sorted(used)]
        return list(dict.fromkeys(row.episode_id for row in rows if row.episode_id))

    def count_samples(self, used: Iterable[int]) -> int:
        """How many samples the rows with the indices `used` are of."""
        return len({self.rows[index].sample_number for index in used})


def read_samples(path: Path) -> list[TrainingData]:
    """The samples of a training file. Raises ValueError naming the line that cannot be read."""
    samples = []
    for number, line in enumerate(read_jsonl(path), 1):
        try:
            samples.append(TrainingData.from_line(line))
        except (ValueError, TypeError) as error:
            raise ValueError(f"{path}, sample {number}: {error}") from error
    return samples


def build_rows(
    samples: Sequence[TrainingData],
    template: ChatTemplate,
    max_length: int,
    on_progress: Callable[[int], None] = lambda _: None,
) -> RowSet:
    """Render every sample. Raises EmptyData when no row is left, with the first refusal; RenderError when a row fails a check."""
    rows: list[Row] = []
    refusals: list[Refusal] = []
    n_used = 0
    for number, sample in enumerate(samples, 1):
        if refusal := _find_refusal(sample, number):
            refusals.append(refusal)
            continue
        new_rows, new_refusals = render(template, sample, max_length)
        rows += [replace(row, sample_number=number) for row in new_rows]
        refusals += new_refusals
        n_used += bool(new_rows)
        on_progress(number)
    report = _summarise(samples, n_used, rows, refusals, template)
    if not rows:
        words = f"; the first refusal: {_describe(refusals[0])}" if refusals else ""
        advice = f"; raise max_seq_length (now {max_length})" if "turn_too_long" in report.refused else ""
        raise EmptyData(f"none of {len(samples)} samples gave anything to train on{words}{advice}", report.refused)
    findings = Counter(finding for row in rows for finding in check_row(row))
    if findings:
        first = next(row for row in rows if check_row(row))
        counts = ", ".join(f"{name} in {count} rows" for name, count in sorted(findings.items()))
        raise RenderError(
            f"the data check failed: {counts}; first in {first.origin}. Nothing was trained. "
            "The base model's chat template does not keep these samples whole: use another base model, or fix its chat_template.jinja"
        )
    return RowSet(rows, refusals, report)


def spread(rows: Sequence[Row], max_tokens: int) -> list[Row]:
    """Rows of as many samples as `max_tokens` allows, at least one row: one row of each sample in turn, then the next of each.

    Samples come in the order of a hash of their first row, so that neither the file's order nor the seed of a training changes what
    is measured.
    """
    by_sample: dict[int, list[Row]] = {}
    for row in rows:
        by_sample.setdefault(row.sample_number, []).append(row)
    queues = sorted(by_sample.values(), key=lambda queue: hashlib.sha256(str(queue[0].ids).encode()).digest())
    chosen: list[Row] = []
    n_tokens = 0
    for row in (row for turn in zip_longest(*queues) for row in turn if row is not None):
        if chosen and n_tokens + len(row.ids) > max_tokens:
            break
        chosen.append(row)
        n_tokens += len(row.ids)
    return chosen


def _find_refusal(sample: TrainingData, number: int) -> Refusal | None:
    """Why a sample cannot even be rendered, or None."""
    if not sample.is_sft:
        return Refusal(episode_id=sample.episode_id, reason=f"kind_{sample.kind}", detail="only sft samples are trained")
    if sample.weight == 0:
        return Refusal(episode_id=sample.episode_id, reason="weight_zero", detail=f"sample {number} has the weight 0")
    weights = (message.weight * sample.weight for message in sample.messages if message.is_agent and message.weight > 0)
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
    samples: Sequence[TrainingData], n_used: int, rows: Sequence[Row], refusals: Sequence[Refusal], template: ChatTemplate
) -> DataReport:
    """The counts that are printed before the first step."""
    by_role: Counter[str] = Counter()
    for row in rows:
        by_role.update(row.trained_by_role)
    has_tools = any(sample.tools or any(message.tool_calls for message in sample.messages) for sample in samples)
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
    )
