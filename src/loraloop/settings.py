"""What is set for a project, each setting declared once, and where each value comes from.

A value is the command line's, else the environment's (`LORALOOP_<SECTION>_<NAME>`), else that of `loraloop.toml` in the project's
directory, else the default. A name that there is not is an error, in the file and in the environment.
"""

from __future__ import annotations

import dataclasses
import difflib
import json
import os
import tomllib
import typing
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BaseModel, Field, JsonValue, TypeAdapter, ValidationError
from pydantic.fields import FieldInfo

from loraloop.dataset.settings import DatasetSettings
from loraloop.episode import EpisodeFilter, Frozen
from loraloop.errors import SettingsError
from loraloop.evaluate.verdict import Policy
from loraloop.evaluation import EvaluationOptions, GivenTrigger, ProbeOptions
from loraloop.lora.config import LoraTrainerConfig, TrainOptions
from loraloop.serve.orders import ServiceSettings
from loraloop.training_data import Method
from loraloop.trigger import Count, Trigger

FILE = "loraloop.toml"
PREFIX = "LORALOOP_"
DEFAULT = "default"


class StoreSettings(Frozen):
    """Where the episodes are."""

    url: str | None = None
    """Such as `postgresql+psycopg://USER@HOST/DATABASE`; None is `episodes.db` in the project's directory."""


class BuildSettings(Frozen):
    """How episodes become samples."""

    method: Method = "sft"
    """How the samples are to be trained."""
    learn_model: str | None = None
    """What to learn; None is what the method takes."""


class ScenarioSettings(Frozen):
    """One loop: what it learns from, what it makes of that, and the alias that it keeps getting better."""

    alias: str = Field(default="agent", pattern=r"^[a-z0-9][a-z0-9._-]{0,47}$")
    """The name that is served, and the loop's own."""
    scenario: str | None = None
    """Only episodes of this scenario."""
    outcome: Literal["success", "failure", "timeout", "unknown"] | None = None
    """Only episodes that ended so."""
    learn_model: str | None = None
    """What to learn; None is what the method takes."""
    method: Method = "sft"
    """How to train."""
    sources: tuple[str, ...] = ()
    """Files and folders to take in, besides what the router records; a path is from the project's directory."""
    license: str | None = None
    """The terms of episodes of the sources that say none."""
    trigger: Trigger = Trigger(when=Count(episodes=50))
    """When to begin another round, and the limits of that."""
    evaluate: dict[str, JsonValue] = Field(default_factory=dict)
    """What a candidate is measured on, as `EvaluationOptions` has it; without any every candidate is held."""
    gate: Policy = Policy()
    """What has to be shown before a candidate goes live."""
    probes: ProbeOptions = ProbeOptions()
    """What a candidate is probed for."""
    observe_seconds: float = Field(default=600.0, ge=0)
    """How long a model that was applied is observed, before the next round."""
    max_attempts: int = Field(default=5, ge=1)
    """How often a stage is tried before the round is given up."""
    retry_seconds: float = Field(default=10.0, gt=0)
    """The pause after a first failure; each further one doubles it."""
    retry_max_seconds: float = Field(default=3600.0, gt=0)
    """The longest pause."""
    train: dict[str, JsonValue] = Field(default_factory=dict)
    """Settings of `[train]` that are otherwise here."""
    build: dict[str, JsonValue] = Field(default_factory=dict)
    """Settings of `[build]` that are otherwise here."""

    @property
    def evaluation_options(self) -> EvaluationOptions:
        """What to measure. Raises SettingsError for a name that there is not, or a value out of its range."""
        for name in self.evaluate:
            _check_name(
                f"the scenario {self.alias!r}, evaluate",
                name,
                [known for known in fields_of(EvaluationOptions) if known not in _NOT_SET["evaluate"]],
            )
        told = {name: Path(value) if name == "tasks" and isinstance(value, str) else value for name, value in self.evaluate.items()}
        try:
            options = EvaluationOptions(**told)  # type: ignore[arg-type]  # checked there
            options.check()
        except TypeError as error:
            raise SettingsError(f"the scenario {self.alias!r}, evaluate: {error}") from error
        return options

    @property
    def episode_filter(self) -> EpisodeFilter:
        """Which episodes are this scenario's."""
        return EpisodeFilter(scenario=self.scenario, outcome=self.outcome)


class WatchSettings(Frozen):
    """The loop that runs by itself."""

    interval_seconds: float = Field(default=30.0, gt=0)
    """Between two looks for what is new."""
    scenario: tuple[ScenarioSettings, ...] = (ScenarioSettings(),)
    """`[[watch.scenario]]`, one for each alias."""


SECTIONS: dict[str, tuple[type, ...]] = {
    "store": (StoreSettings,),
    "build": (BuildSettings, DatasetSettings),
    "train": (LoraTrainerConfig, TrainOptions),
    "serve": (ServiceSettings,),
    "watch": (WatchSettings,),
}
"""What may be set in which section; a name is unique within its section."""
_NOT_SET = {"train": {"output_dir", "data_dir"}, "serve": {"token"}, "evaluate": {"on_progress", "policy", "token", "left_out"}}
"""Where a project keeps its files is not for a file of it to say, what decides is `gate`, what is left out follows from what was trained
on, and secrets stand in no file."""


@dataclass(frozen=True)
class Setting:
    """One value and where it comes from: `default`, the path of the file, or the name of a variable of the environment."""

    section: str
    name: str
    value: Any
    origin: str


class Settings:
    """The settings of one project. Those that stand in the file or the environment have been checked."""

    def __init__(self, found: Mapping[tuple[str, str], Setting]) -> None:
        self._found = dict(found)

    def __iter__(self) -> Iterator[Setting]:
        """Every setting, in the order of the sections and of their declarations."""
        return iter(self._found.values())

    def get(self, section: str, name: str) -> Any:
        """The value of a setting."""
        return self._found[section, name].value

    def given(self, section: str) -> dict[str, Any]:
        """The values of a section that are not defaults."""
        return {one.name: one.value for one in self if one.section == section and one.origin != DEFAULT}

    def trainer_settings(self, scenario: ScenarioSettings | None = None) -> tuple[LoraTrainerConfig, TrainOptions]:
        """What a training is told, for a scenario what is its own first. A training of the loop waits for the device."""
        told = {**self.given("train"), **(scenario.train if scenario else {})}
        config, options = fields_of(LoraTrainerConfig), fields_of(TrainOptions)
        waits = {"wait": True} if scenario else {}
        return (
            LoraTrainerConfig(**{name: value for name, value in told.items() if name in config}),
            TrainOptions(**{**waits, **{name: value for name, value in told.items() if name in options}}),
        )

    def dataset_settings(self, scenario: ScenarioSettings | None = None) -> DatasetSettings:
        """What a dataset is built by, for a scenario what is its own first."""
        told = {**self.given("build"), **(scenario.build if scenario else {})}
        return DatasetSettings(**{name: value for name, value in told.items() if name in fields_of(DatasetSettings)})

    @property
    def service_settings(self) -> ServiceSettings:
        """What is served, and where."""
        return ServiceSettings(**self.given("serve"))

    @property
    def scenarios(self) -> tuple[ScenarioSettings, ...]:
        """The loops of the project."""
        scenarios: tuple[ScenarioSettings, ...] = self.get("watch", "scenario")
        return scenarios


def load_settings(directory: Path, environment: Mapping[str, str] | None = None) -> Settings:
    """The settings of the project in `directory`, from its file, if it has one, and the environment (that of this process).

    Raises SettingsError for a file that cannot be read, a section or name that there is not, naming the nearest, and a value of the
    wrong kind or out of its range.
    """
    environment = os.environ if environment is None else environment
    found = {(section, name): Setting(section, name, default, DEFAULT) for section, name, _, default in _declared()}
    kinds = {(section, name): kind for section, name, kind, _ in _declared()}
    path = directory / FILE
    for setting in (*_read_file(path), *_read_environment(environment)):
        key = setting.section, setting.name
        found[key] = dataclasses.replace(setting, value=_check(setting, kinds[key]))
    settings = Settings(found)
    _check_ranges(settings, path)
    return settings


def describe() -> Iterator[tuple[str, type]]:
    """Every section with the types that declare it, for the documents."""
    return ((section, owner) for section, owners in SECTIONS.items() for owner in owners)


def variable(section: str, name: str) -> str:
    """The variable of the environment that a setting has."""
    return f"{PREFIX}{section}_{name}".upper()


def nearest(name: str, known: Sequence[str]) -> str:
    """` Did you mean …?`, or nothing when no known name is near."""
    near = difflib.get_close_matches(name, known, n=1)
    return f" Did you mean {near[0]}?" if near else ""


@lru_cache
def _declared() -> tuple[tuple[str, str, Any, Any], ...]:
    """(section, name, type, default) of every setting."""
    return tuple(
        (section, name, kind, default)
        for section, owner in describe()
        for name, (kind, default) in fields_of(owner).items()
        if name not in _NOT_SET.get(section, set())
    )


@lru_cache
def fields_of(owner: type) -> dict[str, tuple[Any, Any]]:
    """By name (type, default) of a section's declaration."""
    if issubclass(owner, BaseModel):
        model = owner()
        return {name: (_type_of(field), getattr(model, name)) for name, field in owner.model_fields.items()}
    hints = typing.get_type_hints(owner)
    return {
        field.name: (hints[field.name], field.default if field.default_factory is dataclasses.MISSING else field.default_factory())
        for field in dataclasses.fields(owner)  # type: ignore[arg-type]
    }


def _type_of(field: FieldInfo) -> Any:
    """The type of a field with its limits."""
    return Annotated[(field.annotation, *field.metadata)] if field.metadata else field.annotation


def _known(section: str) -> list[str]:
    return [name for one, name, _, _ in _declared() if one == section]


def _read_file(path: Path) -> Iterator[Setting]:
    try:
        document = tomllib.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return
    except (OSError, ValueError) as error:  # tomllib's own error is a ValueError
        raise SettingsError(f"{path} cannot be read as TOML: {error}; put it right, or move it away") from error
    for section, values in document.items():
        if section not in SECTIONS:
            raise SettingsError(f"{path}: there is no section [{section}]; known: {', '.join(SECTIONS)}.{nearest(section, list(SECTIONS))}")
        if not isinstance(values, dict):
            raise SettingsError(f"{path}: {section} is a section: write [{section}] and its settings below")
        for name, value in values.items():
            _check_name(f"{path}: [{section}]", name, _known(section))
            yield Setting(section, name, value, str(path))


def _read_environment(environment: Mapping[str, str]) -> Iterator[Setting]:
    names = {variable(section, name): (section, name) for section, name, _, _ in _declared() if (section, name) != ("watch", "scenario")}
    sections = tuple(f"{PREFIX}{section}_".upper() for section in SECTIONS)
    for text in sorted(environment):
        if text in names and environment[text]:
            yield Setting(*names[text], environment[text], text)
        elif text.startswith(sections) and text not in names:
            raise SettingsError(f"the environment has {text}, and there is no such setting.{nearest(text, list(names))}")


def _check_name(where: str, name: str, known: list[str]) -> None:
    if name not in known:
        raise SettingsError(f"{where} has no setting {name!r}; known: {', '.join(known)}.{nearest(name, known)}")


def _check(setting: Setting, kind: Any) -> Any:
    """The value as its type has it. Raises SettingsError naming it."""
    adapter: TypeAdapter[Any] = TypeAdapter(kind)
    where = f"{setting.origin}: {setting.name}"
    try:
        if not isinstance(setting.value, str) or setting.origin.endswith(FILE):
            return adapter.validate_json(json.dumps(setting.value), strict=True)
        if isinstance(origin := typing.get_origin(kind), type) and issubclass(origin, Mapping):
            return adapter.validate_json(setting.value, strict=True)
        if origin is tuple:
            return adapter.validate_python(tuple(setting.value.split(",")))
        return adapter.validate_strings(setting.value)
    except TypeError as error:  # a date of TOML
        raise SettingsError(f"{where}={setting.value!r}: expected a text, a number, true, false or a list") from error
    except ValidationError as error:
        raise SettingsError(_explain(where, setting, error)) from error


def _explain(where: str, setting: Setting, error: ValidationError) -> str:
    first = error.errors(include_url=False)[0]
    place = ".".join(str(part) for part in first["loc"])
    if first["type"] == "extra_forbidden" and setting.section == "watch":
        kinds: dict[object, type[BaseModel]] = {"trigger": Trigger, "gate": Policy, "probes": ProbeOptions}
        kind = GivenTrigger if "triggers" in first["loc"] else kinds.get(first["loc"][1], ScenarioSettings)
        known = list(kind.model_fields)
        name = str(first["loc"][-1])
        return f"{where}: there is no setting {name!r}; known: {', '.join(known)}.{nearest(name, known)}"
    return f"{where}{f' ({place})' if place else ''}={first['input']!r}: {first['msg']}"


def _check_ranges(settings: Settings, path: Path) -> None:
    """What only the declaration of a whole section can check. Raises SettingsError."""
    scenarios = settings.scenarios
    _ = settings.service_settings
    aliases = [scenario.alias for scenario in scenarios]
    if twice := next((alias for alias in aliases if aliases.count(alias) > 1), None):
        raise SettingsError(f"{path}: two scenarios have the alias {twice!r}; an alias is the loop's name, so each needs its own")
    for scenario in (None, *scenarios):
        where = f"{path}: the scenario {scenario.alias!r}" if scenario else ""
        for section, own in (("train", scenario.train), ("build", scenario.build)) if scenario else ():
            for name in own:
                _check_name(f"{where}, {section}", name, _known(section))
        try:
            settings.trainer_settings(scenario)
            settings.dataset_settings(scenario)
            _ = scenario.evaluation_options if scenario else None
        except (SettingsError, TypeError) as error:
            origins = sorted({one.origin for one in settings if one.origin != DEFAULT and one.section in ("train", "build")})
            raise SettingsError(f"{where or ', '.join(origins)}: {error}") from error
