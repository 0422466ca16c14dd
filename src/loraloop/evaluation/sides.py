"""The two sides of an evaluation, found by name: a model of the project, what is live, the base model, or one that is served."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from loraloop.base_model import BaseModel, Dtype, resolve_base
from loraloop.dataset import Dataset
from loraloop.errors import EvaluationError, SettingsError
from loraloop.evaluate.result import Side, SideName
from loraloop.evaluate.rollout import Player, load_player
from loraloop.evaluation.options import EvaluationOptions
from loraloop.lora.model import TrainedModel
from loraloop.lora.registry import LoraModelRegistry
from loraloop.lora.states import ModelState
from loraloop.plugins import EpisodeStore


@dataclass(frozen=True)
class Contender:
    """One side, and how to have it."""

    side: Side
    base: BaseModel | None = None
    adapter: Path | None = None
    model: TrainedModel | None = None

    def load(self, dtype: Dtype) -> Player:
        """Its weights in this process. Raises EvaluationError for one that is served."""
        if self.base is None:
            raise EvaluationError(f"{self.side.name} is served; what needs its weights cannot be measured")
        return load_player(self.base, str(self.adapter) if self.adapter else None, dtype)


@dataclass(frozen=True)
class Sources:
    """What an evaluation needs of a project."""

    registry: LoraModelRegistry
    store: EpisodeStore
    find_base: Callable[[TrainedModel], str]
    """Where the base model of a model was when it was trained."""
    get_dataset: Callable[[str | None], Dataset]


class Sides:
    """Finds sides in one project."""

    def __init__(self, sources: Sources) -> None:
        self.sources = sources
        self.registry = sources.registry

    def find_pair(self, model: str, against: str, options: EvaluationOptions) -> tuple[dict[SideName, Contender], tuple[str, ...]]:
        """(both sides, notes on how they were chosen). Raises SettingsError, LoraTrainerError, BaseModelError, EvaluationError."""
        candidate = self._find(model, options, None)
        notes: tuple[str, ...] = ()
        if against == "live":
            live = self._find_live(candidate)
            against = live.id if live else "base"
            notes = () if live else ("no model is promoted, so the opponent is the base model",)
        opponent = self._find(against, options, candidate)
        if candidate.side == opponent.side:
            raise SettingsError(f"both sides are {candidate.side.name}; choose two that differ")
        return {"candidate": candidate, "opponent": opponent}, notes

    def find_one(self, model: str, options: EvaluationOptions) -> Contender:
        """A side by itself. Raises as `find_pair` does."""
        return self._find(model, options, None)

    def _find_live(self, candidate: Contender) -> TrainedModel | None:
        """The model that was promoted last, of the candidate's learn model where that is known."""
        of = candidate.model.learn_model_name if candidate.model else None
        live = [found for found in self.registry.list_models() if found.state is ModelState.PROMOTED]
        live = [
            found for found in live if of in (None, found.learn_model_name) and not (candidate.model and found.id == candidate.model.id)
        ]
        return max(live, key=lambda found: self.registry.get_history(found.id)[-1].at, default=None)

    def _find(self, name: str, options: EvaluationOptions, other: Contender | None) -> Contender:
        if "@" in name:
            served, _, url = name.partition("@")
            if not url.startswith(("http://", "https://")):
                raise SettingsError(f"{name!r}: expected NAME@URL with a URL that begins with http:// or https://")
            return Contender(Side(name=served, url=url))
        if name == "base":
            base = other.base if other and other.base else None
            if base is None and options.base is None:
                raise SettingsError("the base model of a side that is served is not known; give --base, or NAME@URL for it, too")
            base = base or resolve_base(str(options.base))
            return Contender(Side(name="base", base_model=base.name, base_sha256=base.sha256), base)
        model = self.registry.get(name)
        model = self.registry.verify(model.id)
        base = resolve_base(options.base or self.sources.find_base(model))
        if model.base_sha256 not in (None, base.sha256):
            raise EvaluationError(
                f"{model.id} was trained on another base model than {base.path} (hash {base.sha256[:12]}, expected "
                f"{(model.base_sha256 or '')[:12]}); give the right one with --base"
            )
        side = Side(name=model.id, base_model=base.name, base_sha256=base.sha256, adapter_sha256=model.adapter_sha256)
        return Contender(side, base, model.adapter_path, model)
