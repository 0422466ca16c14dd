"""The benchmark's rows, counts and JSON, on a tiny model: every shape is what it says, and engines are compared on equal work only."""

from __future__ import annotations

import json
import math
import random
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import safetensors.torch
import torch
from tiny import make_tokenizer

from bench.counts import count_separate, count_shared
from bench.machine import Machine
from bench.recordings import read_samples, write_generated
from bench.steps import BETA, EngineResult, adapter_parameters, reset_adapter
from bench.table import Disagreement, Report, check_agreement, describe_step, make_rows
from bench.train import ENGINES, Budget, save_adapter
from bench.train import main as run_bench
from bench.worker import load
from bench.workload import SHAPES, BenchRow, NoRows, Shape, Sizes, Workload, make_workload
from loraloop import base_model
from loraloop.chat.template import ChatTemplate
from loraloop.training_data import TrainingData

pytestmark = pytest.mark.filterwarnings("ignore:.*gradient_checkpointing.* is deprecated:FutureWarning")

REPO = Path(__file__).parents[2]
Samples = list[tuple[str, TrainingData]]
CONTRACT = {
    "shape",
    "engine",
    "logical_tokens_per_s",
    "computed_tokens_per_s",
    "token_ratio",
    "peak_rss_mb",
    "gemm_share",
    "first_loss",
}


@pytest.fixture(scope="module")
def template() -> ChatTemplate:
    return ChatTemplate(make_tokenizer())


@pytest.fixture(scope="module")
def samples(tmp_path_factory: pytest.TempPathFactory) -> Samples:
    path = tmp_path_factory.mktemp("bench") / "generated.json"
    write_generated(path, n_tasks=4, n_trials=2)
    return read_samples(path)


def make(shape: Shape, samples: Samples, template: ChatTemplate, **changes: int) -> Workload:
    return make_workload(shape, samples, template, Sizes(**{"n_episodes": 4, "max_length": 12_000, "check_tokens": 0, **changes}))


def make_row(*ids: int, trained: tuple[int, ...] = ()) -> BenchRow:
    return BenchRow(ids=ids, weights=tuple(float(index in trained) for index in range(len(ids))))


def trained_spans(row: BenchRow) -> list[tuple[int, int]]:
    """(begin, end) of every run of trained tokens."""
    edges = [
        index
        for index in range(len(row.ids) + 1)
        if (index > 0 and row.weights[index - 1] > 0) != (index < len(row.ids) and row.weights[index] > 0)
    ]
    return list(zip(edges[::2], edges[1::2], strict=True))


# --- shapes -----------------------------------------------------------------------------------------------------------------


def test_calls_have_one_row_for_each_agent_turn_with_the_loss_on_that_turn_alone(samples: Samples, template: ChatTemplate) -> None:
    [whole] = make("episodes", samples, template, n_episodes=1).rows
    calls = make("calls", samples, template, n_episodes=1).rows
    turns = trained_spans(whole)
    assert len(calls) == len(turns) == sum(message.is_agent for message in samples[0][1].messages) > 2
    for call, (begin, end) in zip(calls, turns, strict=True):
        assert call.ids == whole.ids[: len(call.ids)]
        assert trained_spans(call) == [(begin, end)]
        assert len(call.ids) - end <= 1  # the template's line end behind the stop token is all that follows


def test_pairs_are_two_different_attempts_at_the_same_task(samples: Samples, template: ChatTemplate) -> None:
    rows = make("pairs-sft", samples, template).rows
    episodes = dict(zip([row.ids for row in make("episodes", samples, template, n_episodes=99).rows], samples, strict=True))
    tasks = [episodes[row.ids][0] for row in rows]
    assert len(rows) == 4
    assert tasks[0] == tasks[1] != tasks[2] == tasks[3]
    for one, other in (rows[:2], rows[2:]):
        assert one.ids != other.ids
        shared = next(index for index, (a, b) in enumerate(zip(one.ids, other.ids, strict=False)) if a != b)
        assert shared > 1000  # policy and opening words of the generated tasks


def test_pairs_for_dpo_are_attempts_at_the_same_task_trained_behind_what_they_share(samples: Samples, template: ChatTemplate) -> None:
    workload = make("pairs", samples, template)
    whole = {row.ids: row for row in make("episodes", samples, template, n_episodes=99).rows}
    episodes = dict(zip(whole, samples, strict=True))
    assert workload.is_preference
    assert workload.n_episodes == len(workload.rows) == 4
    for better, worse in zip(workload.rows[::2], workload.rows[1::2], strict=True):
        (task, one), (other_task, other) = episodes[better.ids], episodes[worse.ids]
        assert task == other_task
        assert one.messages != other.messages
        shared = next(index for index, (a, b) in enumerate(zip(better.ids, worse.ids, strict=False)) if a != b)
        for row in (better, worse):
            turns = trained_spans(whole[row.ids])
            assert trained_spans(row) == [turn for turn in turns if turn[1] > shared]  # none of an equal turn
            assert len(trained_spans(row)) > 2  # whole episodes, the user and tools between the agent's turns
    assert len({row.ids for row in workload.rows}) == 4


def test_the_check_of_pairs_holds_both_sides_of_each(samples: Samples, template: ChatTemplate) -> None:
    workload = make("pairs", samples, template, n_episodes=8, check_tokens=10)
    longest, shortest = (
        choose(range(0, 8, 2), key=lambda index: sum(len(row.ids) for row in workload.rows[index : index + 2])) for choose in (max, min)
    )
    assert set(workload.check) == {longest, longest + 1, shortest, shortest + 1}
    assert list(workload.check) == sorted(workload.check)
    assert len(workload.warm_up_rows) == 2


def test_an_attempt_without_another_is_counted(samples: Samples, template: ChatTemplate) -> None:
    assert make("pairs", samples[:3], template).left_out == {"episode_without_partner": 1}
    assert make("pairs", [*samples[:2], samples[0]], template).n_episodes == 2


def test_control_shares_nothing_and_holds_the_episodes_otherwise(samples: Samples, template: ChatTemplate) -> None:
    control, episodes = make("control", samples, template), make("episodes", samples, template)
    assert count_shared(control.rows).token_ratio == 1.0
    assert count_shared(episodes.rows).token_ratio > 1.2
    assert [row.ids[1:] for row in control.rows] == [row.ids for row in episodes.rows]
    assert [row.weights[1:] for row in control.rows] == [row.weights for row in episodes.rows]
    assert all(row.weights[0] == 0 for row in control.rows)


@pytest.mark.parametrize("shape", SHAPES)
def test_nothing_is_truncated_and_what_is_too_long_is_counted(samples: Samples, template: ChatTemplate, shape: Shape) -> None:
    everything = {row.ids: row for row in make(shape, samples, template, n_episodes=99).rows}
    limit = sorted(map(len, everything))[len(everything) // 2]
    limited = make(shape, samples, template, n_episodes=99, max_length=limit)
    assert max(len(row.ids) for row in limited.rows) <= limit
    if shape == "control":
        assert {row.ids[1:] for row in limited.rows} <= {ids[1:] for ids in everything}
    else:
        assert all(everything[row.ids] == row for row in limited.rows)
    if shape == "pairs":
        assert limited.left_out == {"too_long": (len(everything) - len(limited.rows)) // 2}
    elif shape != "pairs-sft":
        assert limited.left_out == {"too_long": len(everything) - len(limited.rows)}
    else:
        assert limited.left_out["too_long"] + len(limited.rows) <= len(samples)
    with pytest.raises(NoRows, match=r"left out: \{'too_long'"):
        make(shape, samples, template, max_length=16)


def test_check_rows_are_the_longest_the_shortest_and_some_between(samples: Samples, template: ChatTemplate) -> None:
    workload = make("calls", samples, template, n_episodes=8, check_tokens=12_000)
    lengths = sorted(len(row.ids) for row in workload.rows)
    check = sorted(len(row.ids) for row in workload.check_rows)
    assert 2 <= len(check) < len(lengths)
    assert check[-1] == lengths[-1]
    assert check[0] == lengths[0]
    assert workload.timed_rows(shares=True) == list(workload.rows)
    assert workload.timed_rows(shares=False) == workload.check_rows
    assert len(make("episodes", samples, template, n_episodes=1, check_tokens=10).check) == 1
    assert make("calls", samples, template).check_rows == list(make("calls", samples, template).rows)


def test_a_workload_file_gives_the_same_workload(samples: Samples, template: ChatTemplate, tmp_path: Path) -> None:
    workload = make("calls", samples, template)
    workload.save(tmp_path / "step.json")
    assert Workload.load(tmp_path / "step.json") == workload


def test_tools_reach_every_sample(tmp_path: Path, template: ChatTemplate) -> None:
    write_generated(tmp_path / "runs.json", n_tasks=1)
    tool = {"type": "function", "function": {"name": "get_reservation_details", "parameters": {}}}
    plain, with_tools = (make("episodes", read_samples(tmp_path / "runs.json", tools), template) for tools in ([], [tool]))
    assert len(plain.rows) == len(with_tools.rows) == 2
    assert all(len(two.ids) > len(one.ids) for one, two in zip(plain.rows, with_tools.rows, strict=True))


# --- counts -----------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("seed", range(20))
def test_counts_equal_those_over_the_set_of_all_prefixes(seed: int) -> None:
    draw = random.Random(seed)
    rows = [make_row(*draw.choices(range(3), k=draw.randint(1, 9)), trained=tuple(draw.sample(range(9), 3))) for _ in range(8)]
    prefixes = {row.ids[: end + 1] for row in rows for end in range(len(row.ids))}
    predicting = {row.ids[:end] for row in rows for end in range(1, len(row.ids)) if row.weights[end] > 0}
    counts = count_shared(rows)
    assert counts.computed_tokens == len(prefixes)
    assert counts.pairs == sum(map(len, prefixes))
    assert counts.head_rows == len(predicting)
    assert counts.token_ratio == sum(len(row.ids) for row in rows) / len(prefixes)
    alone = [count_shared([row]) for row in rows]
    separate = count_separate(rows)
    assert separate.computed_tokens == sum(count.computed_tokens for count in alone) == separate.logical_tokens
    assert (separate.pairs, separate.head_rows) == (sum(c.pairs for c in alone), sum(c.head_rows for c in alone))


def test_duplicates_and_nested_rows_cost_nothing() -> None:
    rows = [make_row(1, 2, 3, trained=(2,)), make_row(1, 2, 3, trained=(2,)), make_row(1, 2, trained=(1,))]
    assert count_shared(rows).computed_tokens == 3
    assert count_shared(rows).head_rows == 2


# --- results ----------------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def measured(
    samples: Samples, template: ChatTemplate, tiny_model: Callable[[str], Path], tmp_path_factory: pytest.TempPathFactory
) -> tuple[Workload, EngineResult, Path]:
    """One dense run of a real worker process."""
    folder = tmp_path_factory.mktemp("run")
    workload = make("calls", samples, template, n_episodes=1, check_tokens=5000)
    workload.save(folder / "step.json")
    save_adapter(base_model.resolve_base(str(tiny_model("llama"))), folder / "adapter.safetensors")
    files = ["step.json", "adapter.safetensors", str(tiny_model("llama")), "result.json"]
    command = [sys.executable, "-m", "bench.worker", "dense", *(str(folder / name) for name in files)]
    subprocess.run([*command, "--plan", '{"steps": 2, "min_seconds": 0}'], cwd=REPO, check=True, capture_output=True, timeout=120)
    return workload, EngineResult.model_validate_json((folder / "result.json").read_bytes()), folder / "result.safetensors"


def test_a_worker_measures_steps_that_learn(measured: tuple[Workload, EngineResult, Path]) -> None:
    workload, result, gradient = measured
    assert len(result.losses) == len(result.step_seconds) == 2
    assert result.first_loss == result.losses[0] > result.losses[1] > 0
    assert result.step_tokens == sum(len(row.ids) for row in workload.check_rows)
    assert result.peak_rss_mb > 100
    values = safetensors.torch.load_file(gradient)
    assert all(bool(value.abs().sum() > 0) for value in values.values())  # of A as well as of B
    assert result.gradient_norm == pytest.approx(float(torch.cat([value.flatten() for value in values.values()]).norm()), rel=1e-4)


def test_json_keeps_the_contract(measured: tuple[Workload, EngineResult, Path]) -> None:
    workload, dense, gradient = measured
    slower = dense.model_copy(update={"engine": "trl-tuned", "step_seconds": [4 * seconds for seconds in dense.step_seconds]})
    rows = make_rows(workload, [dense, slower, slower], {"dense": gradient, "trl-tuned": gradient}, 100.0)
    machine = Machine(processor="p", cores=2, threads=2, memory_gb=1, gemm_gflops=100, gemm_shape=(1, 1, 1), versions={}, load_average=0)
    report = Report(rows=rows, machine=machine, workloads={"calls": describe_step(workload)}, flops_rule="rule")
    document = json.loads(report.model_dump_json())
    assert [row["engine"] for row in document["rows"]] == ["dense", "trl-tuned"]
    assert all(row.keys() >= CONTRACT for row in document["rows"])
    assert rows[0].speedup == pytest.approx(4, rel=0.01)
    assert (rows[0].gradient_distance, rows[1].gradient_distance) == (0.0, None)
    assert rows[0].token_ratio == pytest.approx(workload.n_tokens / count_shared(workload.rows).computed_tokens, abs=1e-3)
    assert rows[0].computed_tokens_per_s == rows[0].logical_tokens_per_s


@pytest.mark.parametrize(
    "engine", ["tree", "trl-tuned", *(pytest.param(engine, marks=pytest.mark.slow) for engine in ("dense", "trl-default"))]
)
def test_engines_train_pairs_by_the_same_loss(tiny_model: Callable[[str], Path], tmp_path: Path, engine: str) -> None:
    if engine.startswith("trl"):
        pytest.importorskip("trl", reason="TRL is not installed; it comes with the extra `bench`")
    workload = make_pair()
    base = base_model.resolve_base(str(tiny_model("llama")))
    workload.save(tmp_path / "step.json")
    save_adapter(base, tmp_path / "adapter.safetensors")
    files = [tmp_path / "step.json", tmp_path / "adapter.safetensors", base.path, tmp_path / "result.json"]
    plan = ["--dtype", "float32", "--plan", '{"steps": 1, "min_seconds": 0}']
    subprocess.run(
        [sys.executable, "-m", "bench.worker", engine, *map(str, files), *plan], cwd=REPO, check=True, capture_output=True, timeout=300
    )
    result = EngineResult.model_validate_json((tmp_path / "result.json").read_bytes())
    expected = take_step_of_definition(base, workload, safetensors.torch.load_file(tmp_path / "adapter.safetensors"))
    assert result.first_loss == pytest.approx(expected, rel=0.02 if engine == "trl-default" else 1e-3)  # the one has bf16 autocast
    assert result.first_loss != pytest.approx(math.log(2), rel=2e-3)  # which it would be if the reference had the adapter on
    assert (result.reference_seconds is None) == (engine == "trl-default")


def make_pair() -> Workload:
    """Two rows with a common beginning; the tokens after it are the agent's and others' in turn."""
    draw = random.Random(0)
    prompt, sides = draw.choices(range(256), k=90), [draw.choices(range(256), k=length) for length in (80, 130)]
    rows = [make_row(*prompt, *side, trained=tuple(index for index in range(90, 170) if index % 9 < 5)) for side in sides]
    return Workload(shape="pairs", source="", max_length=300, n_episodes=2, rows=tuple(rows), check=(0, 1), left_out={})


def take_step_of_definition(base: base_model.BaseModel, workload: Workload, adapter: dict[str, torch.Tensor]) -> float:
    """The loss of dpo over one pair, from all logits."""
    model = load(base, "float32")
    reset_adapter(adapter_parameters(model), adapter)

    @torch.no_grad()
    def log_p(row: BenchRow) -> float:
        ids, weights = torch.tensor(row.ids), torch.tensor(row.weights[1:])
        scores = torch.log_softmax(model(input_ids=ids[None]).logits[0, :-1].double(), -1)
        return float(scores[torch.arange(len(ids) - 1), ids[1:]] @ weights.double())

    with_adapter = [log_p(row) for row in workload.rows]
    with model.disable_adapter():
        better, worse = (own - log_p(row) for own, row in zip(with_adapter, workload.rows, strict=True))
    return math.log1p(math.exp(-BETA * (better - worse)))


@pytest.mark.parametrize("change", [{"first_loss": 1.03}, {"gradient_norm": 0.97}, {"gradient_norm": float("nan")}])
def test_engines_that_did_other_work_are_not_compared(measured: tuple[Workload, EngineResult, Path], change: dict[str, float]) -> None:
    workload, dense, _ = measured
    same = dense.model_copy(update={"engine": "tree"})
    name, factor = next(iter(change.items()))
    other = same.model_copy(update={name: getattr(dense, name) * factor})
    check_agreement("calls", [dense, same])
    with pytest.raises(Disagreement, match="did not do the same work"):
        make_rows(workload, [dense, other], {}, 100.0)


# --- command line -----------------------------------------------------------------------------------------------------------


def test_absent_trl_is_said_before_anything_runs(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setitem(sys.modules, "trl", None)
    assert run_bench(["--engines", "dense,trl-tuned"]) == 1
    assert "TRL is not installed" in capsys.readouterr().err


def test_unknown_engine_is_refused_with_the_known_ones(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stop:
        run_bench(["--engines", "dens"])
    assert stop.value.code == 2
    assert all(engine in capsys.readouterr().err for engine in ("tree",))
    assert len(ENGINES) == 5


def test_no_round_is_begun_that_would_end_too_late() -> None:
    budget = Budget(time.monotonic() + 100, {"tree": 20, "trl-tuned": 60})
    assert budget.allows("tree")
    assert budget.allows("trl-tuned")
    assert budget.allows("trl-tuned-malloc")
    assert not budget.allows("trl-default")  # guessed to take three times trl-tuned's time
    budget.seconds["trl-tuned"] = 101
    assert not budget.allows("trl-tuned")
    assert not Budget(time.monotonic() - 1).allows("tree")
