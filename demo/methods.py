"""`python -m demo.methods`: what each training method makes of the same mixed outcomes, by goals that were never trained on.

For every goal there are recordings of an expert, who reaches it, and of a player who picks commands blindly, who mostly does not. The
score of a play that reached its goal is how few commands it took beside the expert's. The same episodes are built for each method,
trained, and played; so is the base model. One line a run, then a table.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import shutil
import time
import warnings
from dataclasses import dataclass
from pathlib import Path

os.environ.setdefault("HF_HUB_OFFLINE", "1")  # everything that is needed is on this machine

from rich.console import Console
from rich.table import Table

from demo import textcraft
from demo.__main__ import SYSTEM, find_smollm2
from loraloop.base_model import BaseModel, resolve_base, tune_process
from loraloop.cli.screen import by_reason
from loraloop.dataset import DatasetSettings
from loraloop.evaluate.environment import PlayLimits
from loraloop.evaluate.interval import compare_paired, success_rate
from loraloop.evaluate.rollout import load_player, play
from loraloop.files import write_json
from loraloop.learn.compose import compose
from loraloop.lora.config import LoraTrainerConfig, TrainOptions
from loraloop.project import Project
from loraloop.training_data import METHODS, Method

MAX_COMMANDS = 6
"""Of every player; an expert needs three for most goals of one level."""
GOOD = 0.6
"""The least score that is learned from where scores are no weights: a play of at most five commands where the expert took three."""
LIMITS = PlayLimits(max_turns=MAX_COMMANDS, max_turn_tokens=24, max_tokens=300)
console = Console(highlight=False)


@dataclass(frozen=True)
class Recipe:
    """How a method is trained here."""

    learning_rate: float
    epochs: int
    options: TrainOptions
    learn: dict[str, float]
    """Settings of the learn model."""


RECIPES: dict[Method, Recipe] = {
    "sft": Recipe(6e-4, 1, TrainOptions(), {"min_score": GOOD}),
    "weighted": Recipe(6e-4, 1, TrainOptions(), {}),
    "dpo": Recipe(6e-4, 1, TrainOptions(beta=0.05), {"min_score": GOOD}),
    "kto": Recipe(6e-4, 1, TrainOptions(beta=0.05), {"min_score": GOOD}),
}


@dataclass(frozen=True)
class Result:
    """One player's plays of the held-out goals."""

    player: str
    seed: int
    wins: tuple[bool, ...]
    seconds: float
    samples: int = 0


def main() -> None:
    """Run every method with every seed, and print the table."""
    parser = argparse.ArgumentParser(
        prog="python -m demo.methods", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--methods", nargs="+", choices=METHODS, default=list(METHODS), help="which to train (all)")
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2], help="of goals, recordings and training (0 1 2)")
    parser.add_argument("--held-out", type=int, default=30, help="goals to play that are never trained on (30)")
    parser.add_argument("--directory", type=Path, default=Path("demo-run") / "methods", help="where everything goes (demo-run/methods)")
    parser.add_argument("--json", type=Path, help="write the results there, after every run")
    parser.add_argument("--table", nargs="+", type=Path, help="run nothing: the table of results that --json wrote")
    arguments = parser.parse_args()
    if arguments.table:
        show([Result(**entry) for path in arguments.table for entry in json.loads(path.read_bytes())])
        return
    tune_process()
    warnings.filterwarnings("ignore", category=FutureWarning, module="transformers")  # its own deprecations, not ours
    base = resolve_base(str(find_smollm2()), console.print)
    results: list[Result] = []
    for seed in arguments.seeds:
        bench = Bench(base, arguments.directory / f"seed-{seed}", seed, arguments.held_out)
        for method in (None, *arguments.methods):
            results.append(bench.run(method))
            if arguments.json:
                write_json(arguments.json, [vars(result) for result in results])
    show(results)


class Bench:
    """The recordings and held-out goals of one seed."""

    def __init__(self, base: BaseModel, directory: Path, seed: int, n_held_out: int) -> None:
        self.base = base
        self.seed = seed
        self.directory = directory
        self.tree = textcraft.load_tree()
        tasks = textcraft.list_tasks(self.tree, (1,))
        random.Random(seed).shuffle(tasks)
        self.held_out, self.training = tasks[:n_held_out], tasks[n_held_out:]
        shutil.rmtree(directory, ignore_errors=True)
        directory.mkdir(parents=True)
        recorded = directory / "recorded.json"
        write_json(recorded, self.record())
        with Project(directory / "project") as project:
            for report in project.ingest([recorded]):
                console.print(f"seed {seed}: {report.stored} episodes of {len(self.training)} goals")

    def record(self) -> list[dict[str, object]]:
        """What the players did, in tau-bench's results format."""
        environment, entries = textcraft.TextCraftEnvironment(self.tree), []
        for task in self.training:
            expert = textcraft.play_expert(environment, task, MAX_COMMANDS)
            entries.append(textcraft.to_tau_bench(task, expert, SYSTEM, trial=0))
            blind = textcraft.play_random(environment, task, random.Random(f"{self.seed}:{task.task_id}"), MAX_COMMANDS)
            blind.reward = min(1.0, len(expert.turns) / len(blind.turns)) if blind.reward else 0.0
            entries.append(textcraft.to_tau_bench(task, blind, SYSTEM, trial=1))
        return entries

    def run(self, method: Method | None) -> Result:
        """Train by `method`, without one not at all, and play."""
        started, player = time.monotonic(), method or "base"
        adapter, samples = self.train(method) if method else (None, 0)
        loaded = load_player(self.base, adapter)
        environments = [textcraft.TextCraftEnvironment(self.tree) for _ in self.held_out]
        played = play(loaded, environments, self.held_out, system=SYSTEM, limits=LIMITS)
        wins = tuple(one.reward > 0 for one in played)
        write_json(self.directory / f"plays-{player}.json", [[m.to_openai() for m in one.messages] for one in played])
        result = Result(player, self.seed, wins, time.monotonic() - started, samples)
        console.print(f"seed {self.seed}, {player}: {sum(wins)} of {len(wins)} goals, {result.seconds:.0f} s")
        return result

    def train(self, method: Method) -> tuple[str, int]:
        """(the adapter's folder, samples trained on)."""
        recipe = RECIPES[method]
        config = LoraTrainerConfig(
            base_model=str(find_smollm2()),
            lora_dropout=0.0,
            epochs=recipe.epochs,
            batch_size=4,
            gradient_accumulation=1,
            learning_rate=recipe.learning_rate,
            max_seq_length=896,
        )
        options = TrainOptions(**{**vars(recipe.options), "seed": self.seed})
        settings = DatasetSettings(held_out_fraction=0.05, unknown_license="allow")
        with Project(self.directory / "project") as project:
            dataset = project.build(compose(method, settings=recipe.learn), settings=settings)
            console.print(f"seed {self.seed}, {method}: {dataset.manifest.samples} samples, refused {by_reason(dataset.manifest.refused)}")
            model = project.train(config, dataset=dataset.id, options=options)
        console.print(json.dumps(model.metrics.model_dump(exclude_none=True) if model.metrics else {}))
        return str(model.adapter_path), model.sample_count


def show(results: list[Result]) -> None:
    """Every method over all seeds beside the base model on the same goals."""
    table = Table(title="Goals never trained on, all seeds", title_justify="left")
    for column in ("player", "by seed", "goals reached", "exact 95 % interval", "only it / only the base", "McNemar p"):
        table.add_column(column)
    by_player: dict[str, list[Result]] = {}
    for result in results:
        by_player.setdefault(result.player, []).append(result)
    base = [win for result in by_player["base"] for win in result.wins]
    for player, runs in by_player.items():
        wins = [win for result in runs for win in result.wins]
        rate, paired = success_rate(wins), compare_paired(wins, base)
        table.add_row(
            player,
            ", ".join(str(sum(result.wins)) for result in runs),
            f"{rate.wins} of {rate.n} = {rate.rate:.0%}",
            f"{rate.low:.0%} to {rate.high:.0%}",
            "" if player == "base" else f"{paired.only_first} / {paired.only_second}",
            "" if player == "base" else f"{paired.p_value:.2g}",
        )
    console.print(table)


if __name__ == "__main__":
    main()
