"""What each method makes of real recordings; every episode is in a sample or refused once, with these reasons."""

from __future__ import annotations

from collections import Counter
from functools import cache
from pathlib import Path

import pytest

from loraloop.episode import Episode, Success
from loraloop.importers.ingest import ingest_file, iter_files
from loraloop.learn.compose import compose
from loraloop.plugins import convert_all
from loraloop.store.memory import InMemoryEpisodeStore
from loraloop.training_data import METHODS, Refusal


@cache
def read_episodes(folder: Path) -> list[Episode]:
    store = InMemoryEpisodeStore()
    for file in iter_files([folder]):
        ingest_file(store, file)
    return store.query()


def convert(episodes: list[Episode], method: str, **settings) -> tuple[int, dict[str, int]]:
    """(number of samples, refusals by reason), after the accounts were checked."""
    converted = list(convert_all(compose(method, None, settings), episodes))
    samples = [one for one in converted if not isinstance(one, Refusal)]
    refused = [one for one in converted if isinstance(one, Refusal)]
    used = {episode_id for sample in samples for episode_id in sample.episode_ids}
    assert len(used) + len(refused) == len(episodes)
    assert used.isdisjoint(refusal.episode_id for refusal in refused)
    return len(samples), dict(Counter(refusal.reason for refusal in refused))


def test_tau_bench_by_every_method(shared_data):
    episodes = read_episodes(shared_data / "tau_bench")
    assert len(episodes) == 140
    assert convert(episodes, "sft") == (43, {"outcome_failure": 97})
    assert convert(episodes, "weighted") == (43, {"outcome_failure": 97})
    assert convert(episodes, "weighted", failure_weight=-0.1) == (140, {})
    assert convert(episodes, "kto") == (140, {})
    assert convert(episodes, "dpo") == (23, {"no_partner": 78, "gap_too_small": 16})
    assert convert(episodes, "dpo", allow_reuse=True) == (57, {"no_partner": 56, "gap_too_small": 16})
    # the simulated user's first words differ between attempts, so none of them part at the agent's turn
    assert convert(episodes, "dpo", pairing="divergence")[1].keys() == {"no_divergence", "no_partner", "gap_too_small"}


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("source", ["intercode", "swe_agent", "who_and_when", "sharegpt", "openai_ft"])
def test_the_accounts_of_other_recordings_add_up(shared_data, source, method):
    convert(read_episodes(shared_data / source), method)


def test_recordings_that_all_failed_give_nothing_to_sft_and_undesirable_samples_to_kto(shared_data):
    episodes = read_episodes(shared_data / "who_and_when")
    assert convert(episodes, "sft") == (0, {"outcome_failure": len(episodes)})
    assert {sample.desirable for sample in convert_all(compose("kto"), episodes)} == {False}


@pytest.mark.parametrize("method", METHODS)
def test_rewards_beyond_the_scale_are_refused_until_the_scale_is_declared(shared_data, method):
    episodes = read_episodes(shared_data / "verifiers")
    assert convert(episodes, method)[1]["score_outside_scale"] == 11
    assert "score_outside_scale" not in convert(episodes, method, score_range=(0, 5))[1]


def test_demonstrations_are_never_learned(shared_data):
    solved = [episode.model_copy(update={"outcome": Success()}) for episode in read_episodes(shared_data / "swe_agent")]
    demos = {turn.content for episode in solved for turn in episode.messages if turn.is_demo}
    assert demos, "these recordings have demonstrations"
    samples = [sample for sample in convert_all(compose("sft"), solved) if not isinstance(sample, Refusal)]
    assert samples
    for sample in samples:
        assert not any(turn.is_agent and turn.weight and turn.content in demos for turn in sample.messages)
