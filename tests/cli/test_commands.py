"""The commands as a user types them: real processes, a real store, a real (tiny) model."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
from contextlib import suppress
from pathlib import Path

import pytest
import tiny


def run(*arguments: str | Path, cwd: Path, code: int = 0, **environment: str) -> subprocess.CompletedProcess[str]:
    done = subprocess.run(
        [sys.executable, "-m", "loraloop", *map(str, arguments)],
        capture_output=True,
        text=True,
        cwd=cwd,
        env={**os.environ, "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1", **environment},
        check=False,
    )
    assert done.returncode == code, done.stdout + done.stderr
    return done


def chat_line(number: int) -> str:
    return json.dumps(
        {"messages": [{"role": "user", "content": f"question {number}"}, {"role": "assistant", "content": f"answer {number}"}]}
    )


@pytest.fixture(scope="module")
def workplace(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A directory with a file of chats, one bad line in it, and a tiny base model."""
    folder = tmp_path_factory.mktemp("workplace")
    lines = [chat_line(number) for number in range(20)]
    lines[7] = '{"messages": [}'
    (folder / "chats.jsonl").write_text("\n".join(lines) + "\n")
    tiny.make_model("llama", folder / "model")
    return folder


def test_from_a_file_to_an_adapter(workplace: Path) -> None:
    first = run("ingest", "chats.jsonl", "--license", "own", "--json", cwd=workplace)
    counts = json.loads(first.stdout)
    assert {key: counts[key] for key in ("format", "read", "stored", "duplicates", "refused")} == {
        "format": "openai",
        "read": 20,
        "stored": 19,
        "duplicates": 0,
        "refused": {"bad_json": 1},
    }
    assert "line 8" in first.stderr
    assert "Next: loraloop build" in first.stderr
    again = json.loads(run("ingest", "chats.jsonl", "--license", "own", "--json", cwd=workplace).stdout)
    assert (again["stored"], again["duplicates"]) == (0, 19)

    built = json.loads(run("build", "--json", cwd=workplace).stdout)
    assert {"dataset", "method", "episodes", "samples", "pairs", "held_out", "refused"} <= built.keys()
    assert built["episodes_used"] + built["episodes_held_out"] + built["episodes_refused"] == built["episodes"]
    assert built["licenses"] == {"own": 19}
    assert built["method"] == "sft"
    assert built["samples"] + built["held_out"] + sum(built["refused"].values()) == built["episodes"] == 19
    assert built["held_out"] > 0
    assert json.loads(run("build", "--json", cwd=workplace).stdout) == built

    trained = run(
        "train", "--base", "model", "--epochs", "2", "--lr", "1e-2", "--max-seq-length", "256", "--max-steps", "3", "--json", cwd=workplace
    )
    *events, model = [json.loads(line) for line in trained.stdout.splitlines()]
    assert model["sample_count"] == built["samples"] == len(model["episode_ids"])
    assert model["metrics"]["held_out_loss_after"] < model["metrics"]["held_out_loss_before"]
    assert model["metrics"]["gpu_memory_mb"] is None
    assert model["dataset"] == built["dataset"]
    (data,) = [event["data"] for event in events if event["event"] == "data"]
    assert (data["trained_by_role"]["system"], data["trained_by_role"]["user"]) == (0, 0)
    assert (data["calls_recorded"], data["calls_rendered"]) == (0, 0)
    assert (workplace / model["adapter_path"] / "adapter_model.safetensors").is_file()

    listed = [json.loads(line) for line in run("models", "list", "--json", cwd=workplace).stdout.splitlines()]
    assert [entry["id"] for entry in listed] == [model["id"]]
    shown = run("models", "show", "latest", cwd=workplace)
    assert model["id"] in shown.stdout
    shown_all = json.loads(run("models", "show", model["id"], "--json", cwd=workplace).stdout)
    assert shown_all == {**model, "history": [], "same_adapter": [], "judgement": None}


def test_tables_are_for_people_and_end_with_the_next_command(workplace: Path) -> None:
    for command in (
        ["ingest", "chats.jsonl", "--license", "own"],
        ["build"],
        ["episodes", "list"],
        ["datasets", "list"],
        ["models", "list"],
    ):
        done = run(*command, "--project", "other" if command[0] == "ingest" else "loraloop-project", cwd=workplace)
        assert done.stdout.strip()
        assert "Next: loraloop " in done.stderr


def test_episodes_are_listed_and_shown(workplace: Path) -> None:
    run("ingest", "chats.jsonl", "--license", "own", "--project", "third", cwd=workplace)
    listed = run("episodes", "list", "--limit", "2", "--json", "--project", "third", cwd=workplace)
    first = json.loads(listed.stdout.splitlines()[0])
    assert len(listed.stdout.splitlines()) == 2
    shown = json.loads(run("episodes", "show", first["id"], "--json", "--project", "third", cwd=workplace).stdout)
    assert shown["messages"][0]["content"].startswith("question ")
    assert "[assistant] answer" in run("episodes", "show", first["id"], "--project", "third", cwd=workplace).stdout


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["build"], "begin one with `loraloop ingest PATH`"),
        (["ingest", "nowhere.json"], "nowhere.json"),
        (["ingest", "model/config.json", "--format", "taubench"], "Did you mean tau-bench?"),
        (["train", "--base", "x", "--rank", "0"], "lora_rank=0: expected a whole number >= 1"),
        (["train", "--base", "x", "--dropout", "1"], "lora_dropout=1.0: expected a finite number >= 0 and < 1"),
        (["train", "--base", "x", "--dtype", "float16"], "dtype='float16': expected auto, float32 or bfloat16"),
        (["build", "--method", "ppo"], "method 'ppo': expected sft, weighted, dpo, kto"),
        (["build", "--held-out", "1"], "held_out_fraction=1.0: expected 0 <= share < 1"),
        (["build", "--secrets", "show"], "secrets='show': expected quarantine or allow"),
        (["build", "--outcome", "won"], "--outcome won: expected success, failure, timeout or unknown"),
        (["build", "--pairing", "random", "--method", "dpo"], "pairing='random': expected best_worst or divergence"),
        (["build", "--method", "kto", "--max-pairs", "3"], "max_pairs"),
        (["models", "show", "lora-1"], "no project"),
    ],
)
def test_mistakes_get_one_message_and_exit_code_1(workplace: Path, arguments: list[str], says: str) -> None:
    done = run(*arguments, "--project", f"empty-{arguments[0]}", cwd=workplace, code=1)
    assert says in done.stderr
    assert "Traceback" not in done.stderr
    assert done.stdout == ""


def test_a_terminated_command_ends_the_training_that_it_began(workplace: Path) -> None:
    run("ingest", "chats.jsonl", "--license", "own", "--project", "sixth", cwd=workplace)
    run("build", "--project", "sixth", cwd=workplace)
    (workplace / "slow.py").write_text(
        'import json, os, time\nprint(json.dumps({"event": "note", "message": f"pid {os.getpid()}"}), flush=True)\ntime.sleep(600)\n'
    )
    command = [sys.executable, "-m", "loraloop", "train", "--train-script", "slow.py", "--project", "sixth"]
    with subprocess.Popen(command, cwd=workplace, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True) as process:
        assert process.stderr is not None
        training = next(int(line.split()[1]) for line in process.stderr if line.startswith("pid "))
        try:
            assert is_running(training)
            process.terminate()
            assert "Traceback" not in process.stderr.read()
            assert process.wait() == 128 + signal.SIGTERM
            assert not is_running(training)
        finally:
            process.kill()
            with suppress(ProcessLookupError):
                os.kill(training, signal.SIGKILL)


def is_running(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    return True


def test_nothing_stored_and_nothing_known_is_a_failure(workplace: Path) -> None:
    (workplace / "bad.jsonl").write_text('{"messages": [}\n')
    done = run("ingest", "bad.jsonl", "--format", "openai", "--json", "--project", "fourth", cwd=workplace, code=1)
    assert json.loads(done.stdout)["refused"] == {"bad_json": 1}
    assert "nothing was stored" in done.stderr


def test_a_base_that_cannot_be_had_is_one_message(workplace: Path) -> None:
    run("ingest", "chats.jsonl", "--license", "own", "--project", "fifth", cwd=workplace)
    run("build", "--project", "fifth", cwd=workplace)
    done = run("train", "--base", "./nowhere", "--project", "fifth", cwd=workplace, code=1)
    assert "base model './nowhere': no such file or folder" in done.stderr
    assert "Traceback" not in done.stderr


def test_episodes_without_terms_are_refused_until_they_are_allowed(workplace: Path) -> None:
    """And the way out is told where it is needed."""
    ingested = run("ingest", "chats.jsonl", "--project", "seventh", cwd=workplace)
    assert "Next: loraloop build --unknown-license allow --project seventh" in ingested.stderr
    done = run("build", "--project", "seventh", cwd=workplace, code=1)
    assert "license_unknown" in done.stderr
    assert "none of 19 episodes gives a sample" in done.stderr
    assert "`--unknown-license allow`" in done.stderr
    assert json.loads(run("build", "--project", "seventh", "--json", "--unknown-license", "allow", cwd=workplace).stdout)["samples"] > 0
    built = run("build", "--project", "seventh", "--json", cwd=workplace, LORALOOP_UNKNOWN_LICENSE="allow")
    assert json.loads(built.stdout)["licenses"] == {"unknown": 19}


def test_nothing_left_is_an_error_with_a_table_of_reasons(workplace: Path) -> None:
    failed = {"task_id": 1, "reward": 0.0, "info": {}, "traj": json.loads(chat_line(1))["messages"], "trial": 0}
    (workplace / "failed.json").write_text(json.dumps([{**failed, "task_id": number} for number in range(4)]))
    run("ingest", "failed.json", "--license", "own", "--project", "eighth", cwd=workplace)
    done = run("build", "--project", "eighth", cwd=workplace, code=1)
    assert re.search(r"outcome_failure\W+4\b", done.stderr)
    assert done.stdout == ""
    built = run("build", "--method", "kto", "--project", "eighth", "--json", cwd=workplace)
    assert "every sample to train on is undesirable" in json.loads(built.stdout)["warnings"][0]


def test_a_dataset_is_shown_with_what_became_of_every_episode(workplace: Path) -> None:
    run("ingest", "chats.jsonl", "--license", "own", "--project", "ninth", cwd=workplace)
    built = run("build", "--max-per-source", "5", "--project", "ninth", cwd=workplace)
    for line in ("episodes: 5 used", "refused: cap_source", "licences, of episodes: own", "by source: openai 5 (100%)"):
        assert line in built.stdout
    dataset = json.loads(run("datasets", "list", "--json", "--project", "ninth", cwd=workplace).stdout)
    assert dataset["refused"] == dataset["samples_dropped"]
    shown = run("datasets", "show", dataset["id"], "--project", "ninth", cwd=workplace).stdout
    assert "episodes: 5 used" in shown
    assert "by source: openai 5 (100%)" in shown
    assert json.loads(run("datasets", "show", dataset["id"], "--json", "--project", "ninth", cwd=workplace).stdout) == dataset


def test_help_shows_an_example_for_every_verb(workplace: Path) -> None:
    for command in ("ingest", "build", "train"):
        assert f"loraloop {command} " in run(command, "--help", cwd=workplace).stdout.partition("Example")[2]


def test_version(workplace: Path) -> None:
    assert run("--version", cwd=workplace).stdout.startswith("loraloop ")
