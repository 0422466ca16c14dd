"""From the names that a command line or a file of settings has to a learn model: what to learn, and by which method."""

from __future__ import annotations

import difflib
import inspect
from collections.abc import Mapping
from typing import Any

from loraloop.errors import SettingsError
from loraloop.learn.form import Form
from loraloop.plugins import LearnModel, find
from loraloop.training_data import METHODS, Method

DEFAULT_LEARN_MODELS: dict[Method, str] = {"sft": "conversation", "weighted": "weighted", "dpo": "preference", "kto": "kto"}
"""Which learn model makes the samples of a method unless another is named."""


def learn_model_for(method: str) -> str:
    """The name of the learn model that makes samples of `method`. Raises SettingsError for a method that there is not."""
    for known, name in DEFAULT_LEARN_MODELS.items():
        if known == method:
            return name
    raise SettingsError(f"method {method!r}: expected {', '.join(METHODS)}")


def compose(method: str = "sft", learn_model: str | None = None, settings: Mapping[str, Any] | None = None) -> LearnModel:
    """The learn model named `learn_model`, its samples of kind `method`; without a name, the one for that method.

    A learn model that says what to learn (method sft) goes with every method: `compose("kto", "worker_task")` learns tasks by kto.
    `settings` are keyword arguments of their constructors; where both know one, the method's counts, as it judges outcomes.
    Raises SettingsError for a method, name, setting or value that there is not, and for a learn model of another method.
    """
    name = learn_model or learn_model_for(method)
    by_method = find("learn_models", learn_model_for(method))
    kind, given = find("learn_models", name), dict(settings or {})
    plain: LearnModel = kind()
    if plain.method == method:
        _check_known(given, _settings_of(kind), name)
        return _make(kind, given)
    if plain.method != "sft":
        raise SettingsError(f"learn model {name!r} makes samples of method {plain.method}, not {method}; leave out one of the two")
    if not isinstance(plain, Form):
        raise SettingsError(f"learn model {name!r} has no transcripts(), so it cannot be combined with method {method}")
    how = _settings_of(by_method)
    _check_known(given, how | _settings_of(kind), f"{name} by {method}")
    form = _make(kind, {key: value for key, value in given.items() if key not in how})
    return _make(by_method, {**{key: value for key, value in given.items() if key in how}, "of": form})


def _make(kind: Any, settings: dict[str, Any]) -> LearnModel:
    try:
        made: LearnModel = kind(**settings)
    except TypeError as error:  # a text where a number is compared
        raise SettingsError(f"{settings}: {error}") from error
    return made


def _settings_of(kind: Any) -> set[str]:
    """What may be set by name; `of` is set by naming a learn model."""
    return set(inspect.signature(kind).parameters) - {"of"}


def _check_known(given: Mapping[str, Any], known: set[str], what: str) -> None:
    for name in given:
        if name not in known:
            near = difflib.get_close_matches(name, known, n=1)
            hint = f" Did you mean {near[0]}?" if near else ""
            raise SettingsError(f"{what} has no setting {name!r}; expected {', '.join(sorted(known))}.{hint}")
