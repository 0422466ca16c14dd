"""LoraModelId: its form, and that no two are ever the same."""

from __future__ import annotations

import re
import subprocess
import sys
import threading

import pytest

from loraloop.lora.model import LoraModelId

PER_WORKER = 2_000
MAKE_MANY = f"from loraloop.lora.model import LoraModelId\nprint(*(LoraModelId.new() for _ in range({PER_WORKER})), sep='\\n')"


def test_id_has_the_form_of_the_system_that_it_implements() -> None:
    assert re.fullmatch(r"lora-[0-9]{13}-[0-9a-f]{8}", str(LoraModelId.new()))


def test_ids_of_eight_threads_and_six_processes_never_coincide() -> None:
    processes = [subprocess.Popen([sys.executable, "-c", MAKE_MANY], stdout=subprocess.PIPE, text=True) for _ in range(6)]
    made: list[list[str]] = [[] for _ in range(8)]
    threads = [threading.Thread(target=lambda own=own: own.extend(LoraModelId.new() for _ in range(PER_WORKER))) for own in made]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    made += [process.communicate(timeout=60)[0].split() for process in processes]
    assert [len(own) for own in made] == [PER_WORKER] * 14
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
