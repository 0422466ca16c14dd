"""LoraModelId: its form, and that no two are ever the same."""

from __future__ import annotations

import inspect
import re
import subprocess
import sys
import threading
import time
from collections import Counter

import pytest

from loraloop.lora.model import LoraModelId

PER_WORKER = 2_000


def make_many() -> list[str]:
    """Many ids over some fifty milliseconds, so that workers that begin together share each of them."""
    made: list[str] = []
    while len(made) < PER_WORKER:
        made += [LoraModelId.new() for _ in range(50)]
        time.sleep(0.001)
    return made


IN_A_PROCESS = f"""
import sys, time
from loraloop.lora.model import LoraModelId
PER_WORKER = {PER_WORKER}
{inspect.getsource(make_many)}
print("ready", flush=True)
sys.stdin.readline()
print(*make_many())
"""


def test_id_has_the_form_of_the_system_that_it_implements() -> None:
    assert re.fullmatch(r"lora-[0-9]{13}-[0-9a-f]{8}", str(LoraModelId.new()))


def test_ids_of_eight_threads_and_six_processes_never_coincide() -> None:
    command = [sys.executable, "-c", IN_A_PROCESS]
    processes = [subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) for _ in range(6)]
    for process in processes:
        assert process.stdout is not None
        assert process.stdout.readline() == "ready\n"
    made: list[list[str]] = [[] for _ in range(8)]
    threads = [threading.Thread(target=lambda own=own: own.extend(make_many())) for own in made]
    for process in processes:
        assert process.stdin is not None
        process.stdin.write("go\n")
        process.stdin.flush()
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    made += [process.communicate(timeout=60)[0].split() for process in processes]
    assert [len(own) for own in made] == [PER_WORKER] * 14
    milliseconds = Counter(ms for own in made[8:] for ms in {one.split("-")[1] for one in own})
    assert max(milliseconds.values()) > 1, "processes made ids in one and the same millisecond"
    assert len({one for own in made for one in own}) == 14 * PER_WORKER


def test_later_ids_are_greater() -> None:
    made = [LoraModelId.new() for _ in range(3_000)]
    assert made == sorted(made)


def test_parse_gives_back_what_str_gave() -> None:
    made = LoraModelId.new()
    again = LoraModelId.parse(str(made))
    assert again == made
    assert hash(again) == hash(made)
    assert {made, again} == {made}
    assert again.timestamp_ms == made.timestamp_ms


@pytest.mark.parametrize("text", ["", "latest", "lora-1-0", "ep-1700000000000-00000000", "lora-1700000000000-00000000/..", "../lora"])
def test_parse_refuses_what_is_no_id(text: str) -> None:
    with pytest.raises(ValueError, match="is not a LoraModelId; expected lora-<unix ms>-<hex digits>"):
        LoraModelId.parse(text)
