"""The episodes the benchmark is run on: a tau-bench results file, or a small generated one in the same form where there is none.

Every run of the file is used, failures too: this measures speed, and an adapter trained here is thrown away.
"""

from __future__ import annotations

import json
import random
from collections.abc import Iterable
from pathlib import Path

from loraloop.episode import Episode, Success
from loraloop.importers.tau_bench import TauBenchImporter
from loraloop.learn.conversation import ConversationLearn
from loraloop.training_data import TrainingData

DEFAULT_DATA = Path(__file__).resolve().parent.parent.parent / "shared" / "data" / "tau_bench" / "gpt-4o-airline.json"
"""Real recordings are kept beside the repository, never in it."""

_TEXT = """
    the passenger may change cancel or book a flight only if its fare class is business or economy with insurance that was bought
    within one day of booking and the agent must ask the user for an id and a reservation number before any refund certificate
    payment method or piece of baggage is used added or removed
"""
_WORDS = tuple(dict.fromkeys(_TEXT.split()))


def read_samples(path: Path, tools: Iterable[dict[str, object]] = ()) -> list[tuple[str, TrainingData]]:
    """(task, sample) of every run in a tau-bench results file that has a turn of the agent, in order.

    A broken run is left out as the importer says; `tools` are given to every sample. Raises ImportFailed for another kind of file.
    """
    learn, samples = ConversationLearn(), []
    for episode in TauBenchImporter().read(path):
        if not isinstance(episode, Episode):
            continue
        sample = learn.convert(episode.model_copy(update={"outcome": Success(1.0)}))
        if isinstance(sample, TrainingData):
            samples.append((episode.task_id or "", sample.model_copy(update={"tools": tuple(tools)})))
    return samples


def write_generated(path: Path, n_tasks: int = 24, n_trials: int = 2) -> None:
    """A results file of made-up runs: one policy, some tasks, different attempts at each. Always the same bytes."""
    draw = random.Random(0)
    policy = "# Policy\n\n" + "\n\n".join(_sentence(draw, 40) for _ in range(16))
    runs = []
    for task in range(n_tasks):
        opening = _sentence(draw, 30)
        for trial in range(n_trials):
            turns = [{"role": "system", "content": policy}, {"role": "user", "content": opening}]
            for number in range(draw.randint(3, 9)):
                turns += _exchange(draw, f"call_{number}")
            runs.append({"task_id": task, "trial": trial, "reward": float(trial), "info": {}, "traj": turns})
    path.write_text(json.dumps(runs), encoding="utf-8")


def _exchange(draw: random.Random, call_id: str) -> list[dict[str, object]]:
    """A call and its result, or an answer and the user's next words."""
    if draw.random() < 0.5:
        arguments = json.dumps({"reservation_id": f"{draw.randrange(16**6):06X}"})
        call = {"id": call_id, "type": "function", "function": {"name": "get_reservation_details", "arguments": arguments}}
        result = json.dumps({word: draw.randrange(10_000) for word in draw.sample(_WORDS, 20)})
        return [
            {"role": "assistant", "content": None, "tool_calls": [call]},
            {"role": "tool", "tool_call_id": call_id, "name": "get_reservation_details", "content": result},
        ]
    return [{"role": "assistant", "content": _sentence(draw, 50)}, {"role": "user", "content": _sentence(draw, 20)}]


def _sentence(draw: random.Random, n_words: int) -> str:
    return " ".join(draw.choices(_WORDS, k=n_words)).capitalize() + "."
