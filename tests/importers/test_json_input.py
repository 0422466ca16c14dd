from __future__ import annotations

import json
import time

import pytest

from loraloop.importers.json_input import first_object_keys

ROW = {"a": {"inner": [1, {"deep": "x"}]}, "b": 'quote " , { [ \\', "messages": [{"role": "user"}], "c": 1}


@pytest.mark.parametrize(
    ("head", "keys"),
    [
        (json.dumps(ROW), {"a", "b", "messages", "c"}),
        (json.dumps([ROW, {"second": 1}], indent=2), {"a", "b", "messages", "c"}),
        ('\ufeff [ {"a": 1', {"a"}),
        ('{"a": "cut \\"b\\": 1, \\"c\\"', {"a"}),
        ('{"a": 1, "cut', {"a"}),
        ("{}", set()),
        ("[]", set()),
        ("", set()),
        ("messages", set()),
        ('[[{"a": 1}]]', set()),
    ],
)
def test_keys_of_the_first_object_are_found(head, keys):
    assert first_object_keys(head) == keys


def test_a_long_string_that_is_cut_takes_no_time():
    started = time.monotonic()
    first_object_keys('{"a": "' + '\\"' * 32_000)
    assert time.monotonic() - started < 1
