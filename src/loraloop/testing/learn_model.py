"""The conformance check of learn models."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable, Iterable, Sequence

from loraloop.episode import AnyRecord, Episode, Failure, Outcome, Success, Timeout
from loraloop.plugins import GroupLearnModel, LearnModel, convert_all
from loraloop.testing.episodes import expect, make_episode, make_odd_episodes, make_records
from loraloop.training_data import METHODS, Refusal, TrainingData

Converted = list[TrainingData | Refusal]


def check_learn_model(
    make_learn_model: Callable[[], LearnModel], episodes: Iterable[Episode] = (), records: Sequence[AnyRecord] | None = None
) -> None:
    """Check that a learn model does all that `plugins.LearnModel` promises, and `GroupLearnModel` where it has groups.

    `make_learn_model` gives a new one at every call. It is tried on odd episodes and on attempts at a few tasks, and on `episodes`;
    `records` are a stream to cut into batches, one of every kind of record by default.
    """
    learn_model = make_learn_model()
    expect(isinstance(learn_model, LearnModel), f"{type(learn_model).__name__} has not all methods of loraloop.plugins.LearnModel")
    name = learn_model.name
    expect(bool(name) and name == make_learn_model().name, "it has a name, always the same")
    expect(learn_model.objective.endswith("."), "its objective is a sentence")
    expect(learn_model.method in METHODS, f"its method is one of {', '.join(METHODS)}, not {learn_model.method!r}")
    all_episodes = [*make_odd_episodes(), *_make_attempts(), *episodes]
    _check_conversion(make_learn_model, all_episodes)
    _check_each(learn_model, all_episodes)
    _check_nothing_of_the_outcome_is_told(learn_model)
    _check_batches(make_learn_model, list(records) if records is not None else make_records())


def _make_attempts() -> list[Episode]:
    """Three tasks, each tried several times, by talk: solved well, less well, not, and not in time."""
    outcomes: list[Outcome] = [Success(1.0), Success(0.5), Failure("wrong"), Timeout(0.25)]
    attempts = []
    for task in range(3):
        for number, outcome in enumerate(outcomes):
            messages = [
                {"role": "user", "content": f"Task {task}"},
                {"role": "assistant", "content": f"Step {number}."},
                {"role": "user", "content": "Go on."},
                {"role": "assistant", "content": f"End {number % 3}."},
            ]
            episode_id = f"ep-{10**6 + 10 * task + number:013d}-00000000"
            attempts.append(make_episode(id=episode_id, task_id=f"task-{task}", messages=messages, outcome=outcome))
    return attempts


def _check_conversion(make_learn_model: Callable[[], LearnModel], episodes: Sequence[Episode]) -> None:
    learn_model = make_learn_model()
    converted = list(convert_all(learn_model, episodes))
    expect(_sorted(converted) == _sorted(convert_all(learn_model, episodes)), "converting again gives the same")
    expect(_sorted(converted) == _sorted(convert_all(make_learn_model(), episodes[::-1])), "the order of episodes tells nothing")
    interleaved = [*episodes[1::2], *episodes[::2]]
    expect(_sorted(converted) == _sorted(convert_all(make_learn_model(), interleaved)), "the order of episodes tells nothing")
    for sample in converted:
        if isinstance(sample, TrainingData):
            expect(sample.kind == learn_model.method, f"a sample has the kind {learn_model.method}, not {sample.kind}")
            expect(sample.episode_id is not None, "a sample names its episode")
            expect(sample.kind != "dpo" or sample.rejected_episode_id is not None, "a pair names both of its episodes")
            expect(bool(sample.split_key), "a sample has a split_key: without one, attempts at a task may lie on both sides")
        else:
            expect(sample.episode_id is not None and bool(sample.reason), "a refusal names its episode and a reason")
    _check_accounts(converted, episodes)
    _check_weights(converted, {episode.id: episode for episode in episodes})


def _check_accounts(converted: Converted, episodes: Sequence[Episode]) -> None:
    """Every episode is in a sample or refused once, and no other is."""
    used = {episode_id for sample in converted if isinstance(sample, TrainingData) for episode_id in sample.episode_ids}
    refused = Counter(refusal.episode_id for refusal in converted if isinstance(refusal, Refusal))
    for episode in episodes:
        count = refused.pop(episode.id, 0)
        place = "is in a sample" if episode.id in used else "is in no sample"
        known = f"{episode.id} {place} and has {count} refusals"
        expect(count == (episode.id not in used), f"an episode is in a sample or refused exactly once; {known}")
        expect(not (episode.is_open and episode.id in used), f"{episode.id} is still open, and was learned")
        expect(not (episode.outcome.is_unknown and episode.id in used), f"how {episode.id} ended is not known, and it was learned")
    expect(not refused and used <= {episode.id for episode in episodes}, "only episodes that were given are named")


def _check_weights(converted: Converted, episodes: dict[str, Episode]) -> None:
    """Nobody else's turn is turned into the agent's, and each side has one to learn."""
    for sample in converted:
        if not isinstance(sample, TrainingData):
            continue
        foreign = {
            message.content
            for episode_id in sample.episode_ids
            for message in episodes[episode_id].messages
            if message.role == "assistant" and not message.is_agent and message.content
        }
        for side in sample.sides:
            own = [message for message in side.messages if message.is_agent and message.weight > 0]
            expect(bool(own), f"{sample.episode_id}: no turn to learn")
            expect(
                not {message.content for message in own} & foreign,
                f"a turn of {sample.episode_id} that is not its agent's would be learned",
            )


def _check_each(learn_model: LearnModel, episodes: Sequence[Episode]) -> None:
    """`convert` and `evaluate` take any episode."""
    for episode in episodes:
        converted = learn_model.convert(episode)
        expect(isinstance(converted, TrainingData | Refusal), "convert() gives TrainingData or a Refusal")
        expect(converted.episode_id == episode.id, "what convert() gives names the episode")
        expect(isinstance(learn_model.evaluate(episode.records), Outcome), "evaluate() gives an Outcome")
        if isinstance(learn_model, GroupLearnModel):
            expect(learn_model.group_key(episode) == learn_model.group_key(episode), "group_key() is always the same")
    expect(learn_model.evaluate(()).is_unknown, "evaluate() of no records is Unknown")
    expect(learn_model.build_episodes([]) == [], "no records give no episodes")


def _check_nothing_of_the_outcome_is_told(learn_model: LearnModel) -> None:
    """Neither a score nor a reason is in the text of a sample."""
    outcomes = {"success": Success(0.8125), "failure": Failure("zeugma"), "timeout": Timeout(0.3125)}
    told = [episode.model_copy(update={"outcome": outcomes[episode.outcome.kind]}) for episode in _make_attempts()]
    for sample in convert_all(learn_model, told):
        if isinstance(sample, TrainingData):
            text = json.dumps([message.to_openai() for side in sample.sides for message in side.messages])
            found = [mark for mark in ("0.8125", "zeugma", "0.3125") if mark in text]
            expect(not found, f"no text about the outcome is in a sample, such as {found}")


def _check_batches(make_learn_model: Callable[[], LearnModel], records: Sequence[AnyRecord]) -> None:
    """However a stream is cut, and open episodes are given back, the same episodes come of it."""
    whole = make_learn_model().build_episodes(records)
    expect(len({episode.id for episode in whole}) == len(whole), "episodes have ids of their own")
    expect(
        [_told(episode) for episode in make_learn_model().build_episodes(records)] == [_told(e) for e in whole], "ids come from the records"
    )
    for size in (1, 2, 3, 5, 8):
        kept: dict[str, Episode] = {}
        learn_model = make_learn_model()
        for start in range(0, len(records), size):
            still_open = [episode for episode in kept.values() if episode.is_open]
            for episode in learn_model.build_episodes(records[start : start + size], still_open):
                kept[episode.id] = episode
        same = sorted(map(_told, kept.values())) == sorted(map(_told, whole))
        expect(same, f"a stream cut into batches of {size} gives the episodes of the whole stream")


def _told(episode: Episode) -> str:
    """All of it but when it was made."""
    metadata = episode.metadata.model_copy(update={"created_at": 0})
    return str(episode.id) + json.dumps(episode.model_copy(update={"metadata": metadata}).model_dump())


def _sorted(converted: Iterable[TrainingData | Refusal]) -> list[str]:
    """As texts, in an order of their own: `convert_all` gives those of single episodes in the order of the episodes."""
    return sorted(json.dumps(one.model_dump()) for one in converted)
