"""`loraloop build`."""

from __future__ import annotations

import shlex
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from loraloop.cli.report import check_report_options, make_report
from loraloop.cli.screen import DEFAULT_PROJECT, JsonOption, ProjectOption, by_reason, err, show_next, show_table, write_line, write_text
from loraloop.data_report.visible import one_line
from loraloop.dataset.settings import DatasetSettings
from loraloop.errors import EmptyData, SettingsError
from loraloop.files import json_line
from loraloop.lora.config import LoraTrainerConfig, TrainOptions

if TYPE_CHECKING:
    from loraloop.dataset import Dataset
    from loraloop.episode import EpisodeFilter
    from loraloop.plugins import LearnModel

DEFAULTS = DatasetSettings()
TRAINER = LoraTrainerConfig()
OPTIONS = TrainOptions()
EXAMPLES = """Examples:

loraloop build --min-score 0.5 --held-out 0.2

loraloop build --method dpo --min-quality-gap 0.3 --pairing divergence

loraloop build --method kto --learn-model worker_task --max-per-task 4 --json

loraloop build --base ./SmolLM2-135M-Instruct --show 3"""


def register(app: typer.Typer) -> None:
    """Add the command to `app`."""
    app.command(epilog=EXAMPLES)(build)


def _option(text: str, *names: str) -> Any:
    return typer.Option(*names, help=text)


Number = float | None
Count = int | None


def build(
    project: ProjectOption = DEFAULT_PROJECT,
    method: Annotated[str, _option("What the data is for: sft, weighted, dpo or kto.")] = "sft",
    learn_model: Annotated[str | None, _option("How episodes become samples; without it the one for the method.")] = None,
    min_score: Annotated[Number, _option("The least score of an episode that becomes likelier.")] = None,
    score_min: Annotated[Number, _option("The least score that the recorder gives; 0 without it.")] = None,
    score_max: Annotated[Number, _option("The greatest; 1 without it. A score outside is refused.")] = None,
    include_timeouts: Annotated[bool, _option("Use timeouts, too.", "--include-timeouts")] = False,
    failure_weight: Annotated[Number, _option("weighted: what a failure weighs, -1 to 0.")] = None,
    min_quality_gap: Annotated[Number, _option("dpo: how far apart a pair is, as a share of the scale.")] = None,
    max_pairs: Annotated[Count, _option("dpo: pairs of one group at most.")] = None,
    allow_reuse: Annotated[bool, _option("dpo: an episode may be in several pairs.", "--allow-reuse")] = False,
    pairing: Annotated[str | None, _option("dpo: best_worst, or divergence for the turn where two part.")] = None,
    held_out: Annotated[float, _option("Share of the tasks kept from training, 0 or more and below 1.")] = DEFAULTS.held_out_fraction,
    near_duplicate: Annotated[float, _option("Similarity from which one of two samples is left out, 0.5 to 1.")] = DEFAULTS.near_duplicate,
    max_per_task: Annotated[Count, _option("Samples of one task to train on, at most.")] = None,
    max_per_source: Annotated[Count, _option("Samples of one source to train on, at most.")] = None,
    secrets: Annotated[str, _option("Episodes with keys or passwords: quarantine or allow.")] = DEFAULTS.secrets,
    personal_data: Annotated[
        str, _option("Those with e-mail addresses, telephones …: report, quarantine or off.")
    ] = DEFAULTS.personal_data,
    unknown_license: Annotated[
        str, typer.Option(help="Those that say no terms: refuse or allow.", envvar="LORALOOP_UNKNOWN_LICENSE")
    ] = DEFAULTS.unknown_license,
    scenario: Annotated[str | None, _option("Only episodes of this scenario.")] = None,
    outcome: Annotated[str | None, _option("Only episodes that ended so: success, failure, timeout, unknown.")] = None,
    base: Annotated[str | None, _option("Report what a training of this base model would be shown.", "--base")] = None,
    show: Annotated[Count, _option("Print so many samples: who wrote what, and its weight.")] = None,
    html: Annotated[Path | None, _option("Where the report goes as a page; beside the dataset without it.")] = None,
    max_seq_length: Annotated[int, _option("Of the report: tokens of a row.")] = TRAINER.max_seq_length,
    long: Annotated[str, _option("Of the report: what is longer. window, elide or refuse.")] = OPTIONS.long,
    as_json: JsonOption = False,
) -> None:
    """Freeze a dataset, some tasks held out. Every episode is in a sample, or refused once for a reason that is counted."""
    from loraloop.learn.compose import compose

    settings = DatasetSettings(
        held_out_fraction=held_out,
        near_duplicate=near_duplicate,
        max_per_task=max_per_task,
        max_per_source=max_per_source,
        secrets=secrets,  # type: ignore[arg-type]  # checked there, as the other two
        personal_data=personal_data,  # type: ignore[arg-type]
        unknown_license=unknown_license,  # type: ignore[arg-type]
    )
    scale = None if score_min is None and score_max is None else (score_min or 0.0, 1.0 if score_max is None else score_max)
    pairs = {"min_quality_gap": min_quality_gap, "max_pairs": max_pairs, "allow_reuse": allow_reuse or None, "pairing": pairing}
    told = {"min_score": min_score, "score_range": scale, "include_timeouts": include_timeouts or None, "failure_weight": failure_weight}
    how = {name: value for name, value in (told | pairs).items() if value is not None}
    check_report_options(show, max_seq_length, long, html)
    dataset = _build(project, compose(method, learn_model, how), settings, _episode_filter(scenario, outcome))
    wanted_report = base is not None or show is not None or html is not None
    report = make_report(project, dataset.id, base, html, options=(show, max_seq_length, long)) if wanted_report else None
    if as_json:
        looked = {} if report is None else {"report": report.findings.model_dump(mode="json", exclude={"shown"}), "page": str(report.page)}
        write_line(json_line({**_to_json(dataset), **looked}))
    else:
        show_built(dataset)
    if report is not None:
        report.show(console=err() if as_json else None, n_samples=show or 0)
    show_next(f"loraloop train --base {shlex.quote(base) if base else 'MODEL'}", project)


def show_built(dataset: Dataset) -> None:
    """What a dataset holds, in tables on standard output: the counts, what was refused, and of what it consists."""
    manifest = dataset.manifest
    counts = [manifest.episodes, manifest.samples, manifest.pairs, manifest.held_out, manifest.episodes_refused]
    show_table(
        "", ["dataset", "episodes", "samples to train on", "of them pairs", "held out", "refused"], [[dataset.id, *map(str, counts)]]
    )
    used = f"{manifest.episodes_used} used, {manifest.episodes_held_out} held out, {manifest.episodes_refused} refused"
    write_text(f"episodes: {used} = {manifest.episodes}")
    write_text(f"tasks: {manifest.held_out_tasks} of {manifest.tasks} held out, for every later build, too")
    for what, found in (
        ("refused", manifest.refused),
        ("samples left out again", manifest.samples_dropped),
        ("secrets, in episodes", manifest.secrets),
        ("personal data, in episodes", manifest.personal_data),
        ("licences, of episodes", manifest.licenses),
    ):
        if found:
            write_text(f"{what}: {by_reason(found)}")
    for division, shares in manifest.balance:
        largest = ", ".join(f"{one_line(one.name)} {one.samples} ({one.share:.0%})" for one in shares[:3])
        write_text(f"by {division}: {largest}{', …' if len(shares) > 3 else ''}")
    write_text(f"the dataset is in {dataset.path}")
    for warning in manifest.warnings:
        err().print(f"warning: {warning}", markup=False)


def _build(project: Path, learn_model: LearnModel, settings: DatasetSettings, wanted: EpisodeFilter) -> Dataset:
    """The dataset; when there is none, what became of the episodes in a table on standard error before the error is raised."""
    from loraloop.project import Project

    with Project(project, create=False) as opened, err().status("reading episodes") as status:
        try:
            return opened.build(
                learn_model,
                episode_filter=wanted,
                settings=settings,
                on_progress=lambda step, n_episodes: status.update(f"{step} {n_episodes} episodes"),
            )
        except EmptyData as error:
            if error.refused:
                rows = [[reason, str(count)] for reason, count in error.refused.items()]
                show_table("", ["refused", "episodes"], rows, console=err())
            raise


def _episode_filter(scenario: str | None, outcome: str | None) -> EpisodeFilter:
    from pydantic import ValidationError

    from loraloop.episode import EpisodeFilter

    try:
        return EpisodeFilter.model_validate({"scenario": scenario, "outcome": outcome})
    except ValidationError as error:
        raise SettingsError(f"--outcome {outcome}: expected success, failure, timeout or unknown") from error


def _to_json(dataset: Dataset) -> dict[str, object]:
    """The manifest without what only its folder needs, under the dataset's id."""
    manifest = dataset.manifest.model_dump(mode="json", exclude={"id", "schema_version", "sha256"})
    return {"dataset": dataset.id, **manifest, "path": str(dataset.path)}
