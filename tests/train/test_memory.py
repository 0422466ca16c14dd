"""The memory planner: less memory, a thriftier plan; what it says; what it refuses; and that real processes keep to it."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny import make_config, make_model
from train.tree_cases import make_row
from train.tree_models import Twins, make_twins

from loraloop.chat.render import Row
from loraloop.errors import LoraTrainerError
from loraloop.train.arithmetic import choose_arithmetic
from loraloop.train.buffers import Keep
from loraloop.train.engine import Plan
from loraloop.train.memory import Load, estimate, free_bytes, make_plan, resident_bytes

WIDE = {"hidden_size": 128, "intermediate_size": 1024, "num_hidden_layers": 4}
MB = 1 << 20


@pytest.fixture(scope="module")
def both() -> Twins:
    return make_twins(make_config("llama", vocab_size=64, **WIDE), torch.float32)


def rows(n_rows: int, length: int, shared: int = 0) -> list[Row]:
    """Samples that share their first `shared` tokens and nothing else, as far as 64 tokens tell them apart."""
    draw = torch.Generator().manual_seed(0)
    common = torch.randint(64, (shared,), generator=draw).tolist()
    return [
        make_row([*common, number % 64, *torch.randint(64, (length - shared - 1,), generator=draw).tolist()]) for number in range(n_rows)
    ]


# --- the plan ---------------------------------------------------------------------------------------------------------------


def test_as_the_limit_falls_less_is_kept_in_smaller_blocks_until_nothing_fits(both: Twins) -> None:
    plans = []
    most = estimate(both.architecture, make_plan(both.architecture, Load(3000, 12_000), 1 << 50)[0], 3000, 12_000).total
    for share in range(20, 0, -1):
        limit = resident_bytes() + most * share // 20
        try:
            plan, words = make_plan(both.architecture, Load(3000, 12_000), limit)
        except LoraTrainerError:
            break
        plans.append(plan)
        need = estimate(both.architecture, plan, 3000, 12_000).total
        assert need <= most * share // 20 + MB
        assert words.startswith(f"blocks of {plan.block_rows} tokens, ")
        assert words.endswith(f" MB of {limit >> 20} MB for rows of up to 3000 tokens")
    else:
        pytest.fail("a twentieth of the memory was enough")
    assert [plan.keep for plan in plans] == sorted((plan.keep for plan in plans), reverse=True)
    assert {plan.keep for plan in plans} == set(Keep)
    needs = [estimate(both.architecture, plan, 3000, 12_000).total for plan in plans]
    assert needs == sorted(needs, reverse=True)


def test_without_a_limit_four_fifths_of_what_is_free_are_used(both: Twins) -> None:
    words = make_plan(both.architecture, Load(50, 50), None)[1]
    limit = int(re.search(r"of (\d+) MB", words).group(1)) * MB
    assert limit == pytest.approx(resident_bytes() + 0.8 * free_bytes(), rel=0.1)


def test_a_row_that_cannot_fit_is_refused_with_the_numbers(both: Twins) -> None:
    with pytest.raises(LoraTrainerError) as caught:
        make_plan(both.architecture, Load(3000, 3000), resident_bytes() + 20 * MB)
    found = re.fullmatch(
        r"the longest row has 3000 tokens and needs (\d+) MB \((\d+) MB for the model, (\d+) MB for the row, (\d+) MB for a block of "
        r"\d+ tokens, (\d+) MB for the head\), and the limit is (\d+) MB; raise --max-memory, lower max_seq_length, or use a smaller base model",
        str(caught.value),
    )
    need, *parts, limit = (int(group) for group in found.groups())
    assert need > limit
    assert need == pytest.approx(sum(parts), abs=6)  # the optimizer's few, and rounding of each part


def test_more_samples_or_steps_need_no_more_memory_but_a_longer_one_does(both: Twins) -> None:
    plan = Plan(256, Keep.PRODUCTS)
    need = [estimate(both.architecture, plan, longest, largest).total for longest, largest in ((500, 2000), (500, 200_000), (1000, 2000))]
    assert need[0] == need[1] < need[2]


# --- what is really taken ---------------------------------------------------------------------------------------------------


def peak_bytes(both: Twins, samples: list[Row], plan: Plan) -> int:
    """The most memory that tensors held at one time during a step of a new engine, as torch's allocator counts it."""
    from torch.profiler import ProfilerActivity, profile

    both.fused.zero_grad(set_to_none=True)
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        engine = both.engine(plan, choose_arithmetic(both.architecture.dtype)[0])
        if plan.whole_rows:
            engine.add_gradient_by(samples, lambda losses: [1 / len(losses)] * len(losses))
        else:
            engine.backward(samples)
    held = peak = 0
    for event in sorted(profiler.profiler.kineto_results.events(), key=lambda event: event.start_ns()):
        if event.name() == "[memory]":
            held += event.nbytes()
            peak = max(peak, held)
    return peak


@pytest.mark.parametrize("keep", Keep)
def test_memory_is_flat_in_the_number_of_samples(both: Twins, keep: Keep) -> None:
    plan = Plan(64, keep)
    few, many = (peak_bytes(both, rows(n_rows, 200, shared=100), plan) for n_rows in (3, 24))
    assert few > MB
    assert many < 1.05 * few
    assert peak_bytes(both, rows(3, 600, shared=100), plan) > 1.2 * few  # it is counted: a longer path takes more


def test_what_is_kept_and_the_size_of_blocks_show_in_the_memory_taken(both: Twins) -> None:
    samples = rows(2, 400)
    taken = [peak_bytes(both, samples, Plan(64, keep)) for keep in Keep]
    assert taken == sorted(taken)
    assert taken[0] < 0.7 * taken[-1]
    assert peak_bytes(both, samples, Plan(64, Keep.INPUTS)) < 0.7 * peak_bytes(both, samples, Plan(400, Keep.INPUTS))


@pytest.fixture(params=["float32", "bfloat16", "lfm2 with dropout"])
def other(request: pytest.FixtureRequest, both: Twins) -> Twins:
    if request.param == "float32":
        return both
    if request.param == "bfloat16":
        return make_twins(make_config("qwen3", vocab_size=64, head_dim=32, **WIDE), torch.bfloat16)
    convolutions = {"layer_types": ["conv", "full_attention", "conv", "conv"], "block_auto_adjust_ff_dim": False}
    return make_twins(make_config("lfm2", vocab_size=64, **WIDE, **convolutions), torch.float32, lora_dropout=0.1)


@pytest.mark.parametrize("keep", Keep)
def test_the_estimate_is_above_what_is_taken_and_not_far(other: Twins, keep: Keep) -> None:
    for plan, samples in ((Plan(64, keep), rows(4, 400)), (Plan(256, keep), rows(2, 1000))):
        longest, largest = len(samples[0].ids), sum(len(row.ids) for row in samples)
        taken, need = peak_bytes(other, samples, plan), estimate(other.architecture, plan, longest, largest).total
        assert taken <= 1.05 * need
        assert need <= taken * 3


def test_the_largest_tree_that_is_held_as_a_whole_fits_the_limit_and_a_larger_one_is_not(both: Twins) -> None:
    samples = rows(6, 400, shared=100)
    n_rows, logical = 100 + 6 * 300 - 6, 6 * 400  # the last token of a sample is no input
    held = estimate(both.architecture, Plan(n_rows), n_rows, n_rows).total
    for share, fits in ((1.02, True), (0.9, False)):
        plan, _ = make_plan(both.architecture, Load(400, logical), resident_bytes() + (64 << 20) + int(held * share))
        assert (plan.whole_rows >= n_rows) == fits
        assert plan.whole_rows <= logical
    taken = peak_bytes(both, samples, Plan(64, whole_rows=n_rows))
    assert taken <= 1.05 * held
    assert held <= taken * 3
    assert taken > 1.2 * peak_bytes(both, samples, Plan(64)), "a tree that is held takes more than one that is walked"
    assert taken > 1.2 * peak_bytes(both, samples, Plan(64, whole_rows=n_rows - 1))


def test_the_peak_of_a_process_is_its_own_and_not_that_of_the_one_that_started_it() -> None:
    own = "from loraloop.train.loop import peak_memory_mb; print(peak_memory_mb())"
    large = f"import subprocess, sys; held = b'x' * (400 << 20); subprocess.run([sys.executable, '-c', {own!r}], check=True)"
    of_child = int(subprocess.run([sys.executable, "-c", large], capture_output=True, text=True, check=True).stdout)
    assert 5 < of_child < 300


@pytest.fixture(scope="module")
def training(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """A process that trains one step on a long sample, with a limit, and what it says about its memory."""
    folder = tmp_path_factory.mktemp("memory")
    model = make_model("llama", folder / "model", **WIDE)
    data = folder / "data.jsonl"
    turns = [("user", "Tell me a very long story."), ("assistant", "Once upon a time. " * 160)]
    data.write_text(json.dumps({"conversations": [{"role": role, "content": content} for role, content in turns]}) + "\n")

    def run(name: str, max_memory: int) -> tuple[subprocess.CompletedProcess[str], Path]:
        told = ["--data", data, "--output", folder / name, "--model", model, "--max-memory", str(max_memory), "--max-seq-length", "4096"]
        more = ["--dtype", "float32", "--max-steps", "1", "--dropout", "0"]
        command = [sys.executable, "-m", "loraloop.train", *map(str, told), *more]
        return subprocess.run(command, capture_output=True, text=True, timeout=240), folder / name

    return run


def test_a_real_process_keeps_to_its_limit_and_takes_more_where_it_may(training: Any) -> None:
    peaks: list[int] = []
    said: list[str] = []
    for name in ("roomy", "tight"):
        limit = int(peaks[0] * 0.8) * MB if peaks else 8 << 30
        process, output = training(name, limit)
        assert process.returncode == 0, process.stderr
        peaks.append(json.loads((output / "training_record.json").read_text())["peak_memory_mb"])
        said += re.findall(r"blocks of .* MB for rows", process.stdout)
        assert peaks[-1] * MB <= limit
    assert peaks[1] < 0.85 * peaks[0]
    assert len(set(said)) == 2


def test_a_real_process_that_cannot_fit_says_so_and_leaves_nothing(training: Any) -> None:
    process, output = training("refused", 1 << 20)
    assert process.returncode == 1
    assert re.search(r"LoraTrainerError: the longest row has \d+ tokens and needs \d+ MB .* and the limit is 1 MB", process.stderr)
    assert not output.exists()


def test_rows_that_are_measured_at_once_are_in_the_plan(both: Twins) -> None:
    alone, _ = make_plan(both.architecture, Load.of([[row] for row in rows(8, 60)], 1), 1 << 50)
    beside, words = make_plan(both.architecture, Load.of([[row] for row in rows(8, 60)], 1, rows(30, 100)), 1 << 50)
    assert alone.path_rows == 60
    assert beside.path_rows == 3000  # all of them are in one block
    assert words.endswith("for rows of up to 100 tokens")
