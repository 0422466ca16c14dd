"""loraloop: recorded episodes of LLM agents in, LoRA adapters that are proven better out.

The file to read first is `pipeline.py`; the directory that holds everything is a `Project`.
"""

import importlib
from typing import TYPE_CHECKING, Any

from loraloop.episode import Episode, EpisodeFilter, EpisodeId, EpisodeMetadata, Failure, Outcome, Success, Timeout, Unknown
from loraloop.errors import EmptyData, LoraLoopError, LoraTrainerError, ProcessFailed, ScriptNotFound, StoreError
from loraloop.learn.conversation import ConversationLearn
from loraloop.learn.dependency_graph import DependencyGraphLearn
from loraloop.learn.kto import KtoLearn
from loraloop.learn.preference import PreferenceLearn
from loraloop.learn.weighted import WeightedLearn
from loraloop.learn.worker_decision import WorkerDecisionSequenceLearn
from loraloop.learn.worker_task import WorkerTaskLearn
from loraloop.lora.config import LoraTrainerConfig
from loraloop.lora.model import LoraModelId, TrainedModel, TrainingMetrics
from loraloop.plugins import EpisodeStore, LearnModel
from loraloop.store.memory import InMemoryEpisodeStore
from loraloop.training_data import Conversation, ConversationRole, TrainingData

if TYPE_CHECKING:
    from loraloop.lora.trainer import LoraTrainer
    from loraloop.store.sql import SqlEpisodeStore

__all__ = [
    "Conversation",
    "ConversationLearn",
    "ConversationRole",
    "DependencyGraphLearn",
    "EmptyData",
    "Episode",
    "EpisodeFilter",
    "EpisodeId",
    "EpisodeMetadata",
    "EpisodeStore",
    "Failure",
    "InMemoryEpisodeStore",
    "KtoLearn",
    "LearnModel",
    "LoraLoopError",
    "LoraModelId",
    "LoraTrainer",
    "LoraTrainerConfig",
    "LoraTrainerError",
    "Outcome",
    "PreferenceLearn",
    "ProcessFailed",
    "ScriptNotFound",
    "SqlEpisodeStore",
    "StoreError",
    "Success",
    "Timeout",
    "TrainedModel",
    "TrainingData",
    "TrainingMetrics",
    "Unknown",
    "WeightedLearn",
    "WorkerDecisionSequenceLearn",
    "WorkerTaskLearn",
]


_ON_FIRST_USE = {"LoraTrainer": "loraloop.lora.trainer", "SqlEpisodeStore": "loraloop.store.sql"}
"""What takes longest to import: asyncio and SQLAlchemy come with these."""


def __getattr__(name: str) -> Any:
    """LoraTrainer and SqlEpisodeStore, imported when they are first asked for."""
    if name in _ON_FIRST_USE:
        return getattr(importlib.import_module(_ON_FIRST_USE[name]), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    """The public names, for completion: also those that are not imported yet."""
    return __all__
