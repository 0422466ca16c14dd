"""loraloop: recorded episodes of LLM agents in, LoRA adapters that are proven better out.

The file to read first is `pipeline.py`; the directory that holds everything is a `Project`.
"""

from typing import TYPE_CHECKING, Any

from loraloop.episode import Episode, EpisodeFilter, EpisodeId, EpisodeMetadata, Failure, Outcome, Success, Timeout, Unknown
from loraloop.errors import EmptyData, LoraLoopError, LoraTrainerError, ProcessFailed, ScriptNotFound, StoreError
from loraloop.learn.conversation import ConversationLearn
from loraloop.learn.worker_task import WorkerTaskLearn
from loraloop.lora.config import LoraTrainerConfig
from loraloop.lora.model import LoraModelId, TrainedModel, TrainingMetrics
from loraloop.lora.trainer import LoraTrainer
from loraloop.plugins import EpisodeStore, LearnModel
from loraloop.store.memory import InMemoryEpisodeStore
from loraloop.training_data import Conversation, ConversationRole, TrainingData

if TYPE_CHECKING:
    from loraloop.store.sql import SqlEpisodeStore

__all__ = [
    "Conversation",
    "ConversationLearn",
    "ConversationRole",
    "EmptyData",
    "Episode",
    "EpisodeFilter",
    "EpisodeId",
    "EpisodeMetadata",
    "EpisodeStore",
    "Failure",
    "InMemoryEpisodeStore",
    "LearnModel",
    "LoraLoopError",
    "LoraModelId",
    "LoraTrainer",
    "LoraTrainerConfig",
    "LoraTrainerError",
    "Outcome",
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
    "WorkerTaskLearn",
]


def __getattr__(name: str) -> Any:
    """SqlEpisodeStore on its first use: SQLAlchemy takes longer to import than all the rest."""
    if name == "SqlEpisodeStore":
        from loraloop.store.sql import SqlEpisodeStore

        return SqlEpisodeStore
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
