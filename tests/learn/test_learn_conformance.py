"""Every learn model does what the protocol promises, and check_learn_model finds one that does not."""

from __future__ import annotations

import pytest

from loraloop.episode import Success
from loraloop.learn.compose import compose
from loraloop.learn.conversation import ConversationLearn
from loraloop.learn.kto import KtoLearn
from loraloop.learn.preference import PreferenceLearn
from loraloop.learn.worker_task import WorkerTaskLearn
from loraloop.plugins import find, list_names
from loraloop.testing import check_learn_model, make_episode
from loraloop.training_data import METHODS, Refusal

SETTINGS = [
    ("preference", {"allow_reuse": True}),
    ("preference", {"max_pairs": 1, "min_quality_gap": 0.0}),
    ("preference", {"pairing": "divergence"}),
    ("weighted", {"failure_weight": -0.5}),
    ("kto", {"include_timeouts": True, "of": "worker_task"}),
    ("conversation", {"include_timeouts": True}),
]


@pytest.mark.parametrize("name", list_names("learn_models"))
def test_every_learn_model_that_is_listed_conforms(name):
    check_learn_model(find("learn_models", name))


@pytest.mark.parametrize(("name", "settings"), SETTINGS)
def test_learn_models_conform_with_other_settings(name, settings):
    check_learn_model(lambda: find("learn_models", name)(**settings))


@pytest.mark.parametrize("form", ["worker_task", "worker_decision", "dependency_graph", "conversation"])
@pytest.mark.parametrize("method", METHODS)
def test_every_form_goes_with_every_method(form, method):
    learn = compose(method, form)
    assert learn.method == method
    check_learn_model(lambda: compose(method, form))


def converts(change):
    """A conversation learn model whose converted samples are changed."""

    def convert_group(self, episodes):
        return [
            one if isinstance(one, Refusal) else one.model_copy(update=change) for one in ConversationLearn.convert_group(self, episodes)
        ]

    return {"convert_group": convert_group}


def remember(self, episodes):
    """Only the first time."""
    seen = self.__dict__.setdefault("seen", set())
    fresh = [episode for episode in episodes if episode.id not in seen]
    seen.update(episode.id for episode in episodes)
    return ConversationLearn.convert_group(self, fresh)


def tell_outcome(self, episodes):
    told = []
    for one in ConversationLearn.convert_group(self, episodes):
        if isinstance(one, Refusal):
            told.append(one)
        else:
            first = one.messages[0].model_copy(update={"content": f"score {one.outcome_score}"})
            told.append(one.model_copy(update={"messages": (first, *one.messages[1:])}))
    return told


def claim_all_turns(self, episodes):
    own = [
        episode.model_copy(
            update={"messages": tuple(turn.model_copy(update={"is_demo": False, "author": None}) for turn in episode.messages)}
        )
        for episode in episodes
    ]
    return ConversationLearn.convert_group(self, own)


def learn_everything(self, episodes):
    solved = [episode.model_copy(update={"outcome": Success()}) for episode in episodes]
    return ConversationLearn.convert_group(self, solved)


def learn_open(self, episodes):
    return ConversationLearn.convert_group(self, [episode.model_copy(update={"is_open": False}) for episode in episodes])


def twice(self, episodes):
    return [*ConversationLearn.convert_group(self, episodes), Refusal(episode_id=episodes[0].id, reason="again")]


def forget_open(self, records, open_episodes=()):
    return WorkerTaskLearn.build_episodes(self, records)


def new_ids(self, records, open_episodes=()):
    fresh = make_episode().id
    return [episode.model_copy(update={"id": fresh}) for episode in WorkerTaskLearn.build_episodes(self, records, open_episodes)]


BROKEN = {
    "no split key": (ConversationLearn, converts({"split_key": None})),
    "no episode id": (ConversationLearn, converts({"episode_id": None})),
    "another kind": (ConversationLearn, converts({"kind": "weighted"})),
    "no weight": (ConversationLearn, {"convert_group": lambda self, _: []}),
    "remembers": (ConversationLearn, {"convert_group": remember}),
    "tells the score": (ConversationLearn, {"convert_group": tell_outcome}),
    "takes demonstrations for its own": (ConversationLearn, {"convert_group": claim_all_turns}),
    "learns whatever the outcome": (ConversationLearn, {"convert_group": learn_everything}),
    "learns what is still open": (ConversationLearn, {"convert_group": learn_open}),
    "refuses what it learned": (ConversationLearn, {"convert_group": twice}),
    "cuts tasks at the end of a batch": (WorkerTaskLearn, {"build_episodes": forget_open}),
    "gives other ids each time": (WorkerTaskLearn, {"build_episodes": new_ids}),
    "depends on the order": (PreferenceLearn, {"convert_group": lambda self, e: PreferenceLearn.convert_group(self, e[:2])}),
    "one group for each episode": (PreferenceLearn, {"convert_group": lambda self, e: []}),
    "has no such method": (KtoLearn, {"method": "ppo"}),
    "lacks a method": (KtoLearn, {"build_episodes": None}),
}


@pytest.mark.parametrize(("kind", "methods"), BROKEN.values(), ids=BROKEN.keys())
def test_check_learn_model_finds_a_broken_one(kind, methods):
    with pytest.raises(AssertionError):
        check_learn_model(type("Broken", (kind,), methods))


def test_check_learn_model_lets_through_what_a_learn_model_raises():
    class Raises(ConversationLearn):
        def transcripts(self, episode):
            return super().transcripts(episode.model_copy(update={"messages": episode.messages[:-1] or episode.messages[0]}))

    with pytest.raises(IndexError):
        check_learn_model(Raises)
