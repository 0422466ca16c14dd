from __future__ import annotations

import json
import zipfile

import pytest

from loraloop.episode import Episode, Failure, Success, Timeout, Unknown
from loraloop.errors import ImportFailed
from loraloop.importers import eval_archive
from loraloop.importers.ingest import detect, iter_files
from loraloop.importers.inspect_ai import InspectImporter


@pytest.fixture
def episodes(fixtures):
    return list(InspectImporter().read(fixtures / "inspect" / "log.json"))


@pytest.fixture
def archive(fixtures, tmp_path):
    """Write the samples of the fixture as Inspect's archive, and give its path."""

    def write(name="log.eval", compression=zipfile.ZIP_DEFLATED, header="header.json", **members):
        log = json.loads((fixtures / "inspect" / "log.json").read_text())
        samples = {f"samples/{number}_epoch_1.json": json.dumps(sample) for number, sample in enumerate(log.pop("samples"))}
        with zipfile.ZipFile(tmp_path / name, "w", compression) as file:
            for member, text in {header: json.dumps(log), "summaries.json": "[]", **samples, **members}.items():
                file.writestr(member, text)
        return tmp_path / name

    return write


def test_a_sample_is_told_word_for_word(episodes):
    messages = episodes[0].messages
    assert [(message.role, message.content) for message in messages] == [
        ("user", "Two eggs."),
        ("assistant", "An example."),
        ("user", "Now you."),
        ("assistant", "I boil."),
        ("tool", "1"),
        ("tool", "too slow"),
        ("assistant", "Done."),
    ]
    assert [(call.id, call.function.arguments) for call in messages[3].tool_calls] == [("a", '{"what": "egg", "a": 1}'), ("b", "{}")]
    assert messages[3].reasoning == "Both."
    assert episodes[0].tools[0]["function"]["description"] == "Two eggs."
    assert [message.is_agent for message in messages if message.role == "assistant"] == [False, True, True]


def test_outcomes_are_as_scored(episodes):
    assert [episode.outcome for episode in episodes] == [
        Success(1.0),
        Failure("score I"),
        Unknown(),
        Unknown(),
        Timeout(0.25),
        Success(1.0),
        Unknown(),
    ]
    assert {key: value for key, value in episodes[3].metadata.tags.items() if key.startswith("score.")} == {
        "score.a.x": "true",
        "score.a.y": "2",
    }
    assert episodes[4].metadata.tags["limit"] == "message"


def test_epochs_are_attempts_at_one_task(episodes):
    assert [episode.group_id for episode in episodes[:3]] == ["eggs/1", "eggs/1", "eggs/two"]
    assert [episode.metadata.tags["epoch"] for episode in episodes[:2]] == ["1", "2"]
    assert episodes[0].metadata.duration_ms == 30_000
    assert episodes[0].metadata.tags["model"] == "m-1"


def test_an_archive_gives_the_same_episodes(episodes, archive):
    assert [entry.id for entry in InspectImporter().read(archive())] == [episode.id for episode in episodes]
    assert [entry.id for entry in InspectImporter().read(archive(header="_journal/start.json"))] == [episode.id for episode in episodes]


def test_an_archive_is_told_by_name_or_members(archive):
    assert detect(archive()).name == detect(archive("log.bin")).name == "inspect"


def test_a_member_that_is_no_json_spoils_itself_only(archive):
    entries = list(InspectImporter().read(archive(**{"samples/9_epoch_1.json": "{"})))
    assert [getattr(entry, "reason", None) for entry in entries] == [*[None] * 7, "bad_json"]
    assert 'member "samples/9_epoch_1.json"' in entries[-1].detail


def test_a_sample_that_unpacks_too_long_is_refused_and_the_rest_kept(archive, monkeypatch):
    monkeypatch.setattr(eval_archive, "MAX_SAMPLE_BYTES", 100_000)
    entries = list(InspectImporter().read(archive(**{"samples/9_epoch_1.json": json.dumps({"long": "ab" * 60_000})})))
    assert [getattr(entry, "reason", None) for entry in entries] == [*[None] * 7, "too_large"]


def test_a_bomb_is_not_unpacked(archive):
    path = archive(**{f"samples/{number}_epoch_2.json": " " * 30_000_000 for number in range(2)})
    assert path.stat().st_size < 100_000
    with pytest.raises(ImportFailed, match=r"members of .* bytes in a zip of .*do not trust it"):
        next(InspectImporter().read(path))


def test_a_damaged_archive_is_said(archive):
    path = archive()
    raw = path.read_bytes()
    path.write_bytes(raw[: len(raw) // 2])
    with pytest.raises(ImportFailed, match="found no whole zip"):
        next(InspectImporter().read(path))
    at = raw.index(b"samples/0_epoch_1.json") + 40
    path.write_bytes(raw[:at] + bytes(byte ^ 0xFF for byte in raw[at : at + 30]) + raw[at + 30 :])
    assert next(InspectImporter().read(path)).reason == "bad_archive"


def test_a_compression_that_is_not_known_is_refused(archive):
    path = archive(compression=zipfile.ZIP_STORED)
    raw = bytearray(path.read_bytes())
    at = 0
    while (at := raw.find(b"samples/", at + 1)) > 0:
        start = at - 30 if raw[at - 30 : at - 26] == b"PK\x03\x04" else at - 46
        method = start + (8 if raw[start : start + 4] == b"PK\x03\x04" else 10)
        raw[method : method + 2] = (93).to_bytes(2, "little")
    path.write_bytes(bytes(raw))
    refusal = next(InspectImporter().read(path))
    assert (refusal.reason, "compression method 93" in refusal.detail) == ("bad_archive", True)


def test_a_zip_of_something_else_is_said(tmp_path):
    with zipfile.ZipFile(tmp_path / "x.eval", "w") as file:
        file.writestr("a.txt", "a")
    with pytest.raises(ImportFailed, match="cannot be opened"):
        next(InspectImporter().read(tmp_path / "absent.eval"))
    with pytest.raises(ImportFailed, match=r"no header\.json"):
        next(InspectImporter().read(tmp_path / "x.eval"))


def test_real_logs_give_their_37_samples(shared_data):
    entries = []
    for path in iter_files([shared_data / "inspect"]):
        if path.name == "scorer__math_cases.json":
            with pytest.raises(ImportFailed, match="no known format fits"):
                detect(path)
            continue
        assert detect(path).name == "inspect"
        entries += InspectImporter().read(path)
    assert len(entries) == 37
    episodes = [entry for entry in entries if isinstance(entry, Episode)]
    assert sorted(entry.reason for entry in entries if not isinstance(entry, Episode)) == ["no_agent_turn", "unsupported_content"]
    kinds = [episode.outcome.kind for episode in episodes]
    assert {kind: kinds.count(kind) for kind in set(kinds)} == {"success": 17, "failure": 8, "unknown": 10}


def test_real_archives_and_documents_agree(shared_data):
    first, second = (
        [entry.messages for entry in InspectImporter().read(shared_data / "inspect" / f"log__test_eval_log__{name}")]
        for name in ("log_read_sample.eval", "log_read_sample.json")
    )
    assert [[message.role for message in messages] for messages in first] == [[message.role for message in messages] for messages in second]
