"""Ids are unique on a machine, sort by the order of their making, and are safe as file names."""

from __future__ import annotations

import copy
import pickle
import random
import time

import pytest
from pydantic import BaseModel, ValidationError

from loraloop.ids import SortableId


class OtherId(SortableId):
    prefix = "other"


def test_new_id_has_a_prefix_thirteen_digits_and_eight_hex_digits() -> None:
    before = time.time_ns() // 1_000_000
    made = SortableId.new()
    prefix, ms, token = made.split("-")
    assert prefix == "id"
    assert before <= int(ms) <= time.time_ns() // 1_000_000 + 1
    assert len(ms) == 13
    assert len(token) == 8
    assert set(token) <= set("0123456789abcdef")
    assert made.timestamp_ms == int(ms)


def test_ids_of_one_process_sort_by_the_order_of_their_making_within_a_millisecond_too() -> None:
    made = [SortableId.new() for _ in range(5_000)]
    assert len({one.timestamp_ms for one in made}) < len(made), "the point is several ids in one millisecond"
    shuffled = random.Random(0).sample(made, len(made))
    assert sorted(shuffled) == made


def test_more_ids_than_a_millisecond_has_room_for_stay_unique_and_ordered() -> None:
    made = [SortableId.new() for _ in range(20_000)]
    assert len(set(made)) == len(made)
    assert sorted(made) == made
    assert made[-1].timestamp_ms - made[0].timestamp_ms >= len(made) // 1024 - 1


def test_id_is_equal_to_its_text_and_hashes_like_it() -> None:
    made = SortableId.new()
    assert SortableId.parse(str(made)) == made == str(made)
    assert {made: 1}[str(made)] == 1
    assert type(str(made)) is str
    assert repr(made) == f"SortableId('{made}')"


def test_id_survives_pickle_copy_and_json() -> None:
    class Holder(BaseModel):
        id: OtherId

    made = OtherId.new()
    for again in (pickle.loads(pickle.dumps(made)), copy.deepcopy(made), Holder.model_validate_json(Holder(id=made).model_dump_json()).id):
        assert again == made
        assert type(again) is OtherId


@pytest.mark.parametrize(
    "text",
    [
        "",
        "id-1700000000000",
        "id-170000000000-00000000",
        "id-1700000000000-0000000",
        "id-1700000000000-0000000G",
        "id-1700000000000-0000000A",
        "id-1700000000000-" + "0" * 33,
        "other-1700000000000-00000000",
        " id-1700000000000-00000000",
        "id-1700000000000-00000000\n",
        "id-١٧٠٠٠٠٠٠٠٠٠٠٠-00000000",
        "../id-1700000000000-00000000",
        "id-1700000000000-00000000/x",
        "id--700000000000-00000000",
    ],
)
def test_parse_refuses_any_other_form_and_says_which_is_expected(text: str) -> None:
    with pytest.raises(ValueError, match="expected id-<unix ms>-<hex digits>") as failure:
        SortableId.parse(text)
    assert repr(text) in str(failure.value)


def test_a_field_of_one_kind_refuses_the_id_of_another() -> None:
    class Holder(BaseModel):
        id: OtherId

    with pytest.raises(ValidationError, match="is not a OtherId"):
        Holder.model_validate({"id": str(SortableId.new())})
