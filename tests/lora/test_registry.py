"""The registry of trained models: what it lists, what it refuses, and that it never changes a model."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
from contextlib import suppress
from pathlib import Path

import pytest
from models_made import OWN_ADAPTER, PEFT_ADAPTER, make_model, save_model

from loraloop.errors import LoraTrainerError
from loraloop.lora.model import LoraModelId, TrainingMetrics
from loraloop.lora.registry import MODEL_FILE, LoraModelRegistry, hash_adapter
from loraloop.lora.states import ModelState

OF_AN_EARLIER_VERSION = """{
  "id": "lora-1700000000000-0123abcd",
  "base_model": "some/base",
  "adapter_path": "somewhere/else",
  "learn_model_name": "conversation",
  "episode_ids": ["ep-1700000000000-0123abcd"],
  "sample_count": 7,
  "created_at": 1700000000500,
  "metrics": {
    "final_loss": 0.5,
    "training_time_secs": 12.5,
    "gpu_memory_mb": null,
    "peak_memory_mb": 900,
    "n_tokens": 10,
    "n_supervised_tokens": 5,
    "held_out_loss_before": 2.0,
    "held_out_loss_after": 1.5,
    "held_out_accuracy_before": null,
    "held_out_accuracy_after": null
  },
  "base_sha256": "0123",
  "method": "sft",
  "dataset": "4f1c",
  "refused": {"outcome_failure": 2},
  "log_path": "data/training.log"
}
"""


def test_a_saved_model_is_read_back_the_same(tmp_path: Path) -> None:
    metrics = TrainingMetrics(final_loss=0.5, held_out_loss_before=2.0, held_out_loss_after=1.5, n_tokens=10, n_supervised_tokens=5)
    model = save_model(
        tmp_path, metrics=metrics, refused={"outcome_failure": 2}, log_path=tmp_path / "log", dataset="d", learn_model_name="../é"
    )
    assert LoraModelRegistry(tmp_path).get(model.id) == model


def test_models_are_listed_oldest_first_and_latest_is_the_last(tmp_path: Path) -> None:
    models = [save_model(tmp_path, learn_model_name=name) for name in ("a", "b", "a", "c")]
    registry = LoraModelRegistry(str(tmp_path))
    assert registry.list_models() == models
    assert registry.get("latest") == registry.find_latest() == models[3]
    assert registry.find_latest("a") == models[2]
    assert registry.find_latest("d") is None


def test_a_directory_that_is_not_there_has_no_models(tmp_path: Path) -> None:
    registry = LoraModelRegistry(tmp_path / "missing")
    assert registry.list_models() == []
    assert registry.find_latest() is None
    assert not (tmp_path / "missing").exists()


def test_only_folders_with_a_record_are_models(tmp_path: Path) -> None:
    model = save_model(tmp_path)
    for name in (LoraModelId.new(), f"{LoraModelId.new()}.failed", f".{LoraModelId.new()}.abcdef", "other"):
        (tmp_path / name).mkdir()
        if "." in name or name == "other":
            shutil.copy(tmp_path / model.id / MODEL_FILE, tmp_path / name)
    assert LoraModelRegistry(tmp_path).list_models() == [model]


def test_an_unknown_model_is_told_with_those_that_there_are(tmp_path: Path) -> None:
    model = save_model(tmp_path)
    wrong = model.id[:-1] + ("0" if model.id[-1] != "0" else "1")
    with pytest.raises(LoraTrainerError, match=rf"no model '{wrong}' in .*; known: {model.id}\. Did you mean {model.id}\?"):
        LoraModelRegistry(tmp_path).get(wrong)


@pytest.mark.parametrize("name", ["..", "../adapters", "", ".", "/etc"])
def test_a_name_never_leads_out_of_the_directory(tmp_path: Path, name: str) -> None:
    (tmp_path / MODEL_FILE).write_text("{}")
    with pytest.raises(LoraTrainerError, match="no model"):
        LoraModelRegistry(tmp_path / "adapters").get(name)


def test_a_model_is_recorded_once(tmp_path: Path) -> None:
    model = save_model(tmp_path)
    before = (model.adapter_path / MODEL_FILE).read_bytes()
    with pytest.raises(LoraTrainerError, match=r"is recorded already in .*; a model never changes"):
        LoraModelRegistry(tmp_path).save(model.model_copy(update={"sample_count": 99}))
    assert (model.adapter_path / MODEL_FILE).read_bytes() == before


def test_an_adapter_in_another_place_is_not_recorded(tmp_path: Path) -> None:
    model = make_model(tmp_path / "elsewhere")
    with pytest.raises(LoraTrainerError, match=r"is in .*elsewhere.*, expected"):
        LoraModelRegistry(tmp_path / "adapters").save(model)
    assert not (tmp_path / "adapters").exists()


def test_a_damaged_record_is_named(tmp_path: Path) -> None:
    model = save_model(tmp_path)
    (model.adapter_path / MODEL_FILE).write_text('{"id": "lora-')
    with pytest.raises(LoraTrainerError, match=re.escape(f"the record {model.adapter_path / MODEL_FILE} cannot be read")):
        LoraModelRegistry(tmp_path).get(model.id)


def test_a_registry_can_be_moved(tmp_path: Path) -> None:
    model = save_model(tmp_path / "here")
    (tmp_path / "here").rename(tmp_path / "there")
    assert LoraModelRegistry(tmp_path / "there").get(model.id).adapter_path == tmp_path / "there" / model.id


# --- the adapter's hash -----------------------------------------------------------------------------------------------------


def test_what_is_saved_has_the_hash_of_its_adapter_and_is_given_as_recorded(tmp_path: Path) -> None:
    model = make_model(tmp_path, parent=LoraModelId("lora-1700000000000-00000001"), run="run-1")
    recorded = LoraModelRegistry(tmp_path).save(model)
    assert recorded == LoraModelRegistry(tmp_path).get(model.id)
    assert recorded.adapter_sha256 == hash_adapter(model.adapter_path)
    assert recorded.adapter_files.keys() == PEFT_ADAPTER.keys()
    assert recorded == model.model_copy(update={"adapter_sha256": recorded.adapter_sha256, "adapter_files": recorded.adapter_files})
    assert "state" not in json.loads((model.adapter_path / MODEL_FILE).read_text())


def test_the_hash_is_what_sha256sum_says(tmp_path: Path) -> None:
    command = "sha256sum adapter_config.json adapter_model.safetensors | sha256sum"
    model = save_model(tmp_path, {**PEFT_ADAPTER, "README.md": "about"})
    said = subprocess.run(["sh", "-c", command], cwd=model.adapter_path, capture_output=True, text=True, check=True).stdout
    assert model.adapter_sha256 == said.split()[0]
    assert command in (Path(__file__).parents[2] / "docs" / "concepts.md").read_text()


def test_the_hash_follows_from_name_and_content_of_the_adapters_files(tmp_path: Path) -> None:
    def hash_of(files: dict[str, str]) -> str | None:
        return hash_adapter(make_model(tmp_path, files).adapter_path)

    first = hash_of(PEFT_ADAPTER)
    assert first == hash_of({**PEFT_ADAPTER, "README.md": "another file is no part of it"})
    assert len({first, *(hash_of({**PEFT_ADAPTER, name: "other"}) for name in PEFT_ADAPTER)}) == 3
    own = {"weights.bin": "1", "part/weights.bin": "2"}
    changed = [own, {"weights.bin": "2", "part/weights.bin": "1"}, {**own, "more": ""}, {"weights.bin": "1", "part/other.bin": "2"}]
    assert len({hash_of(files) for files in changed}) == 4
    assert hash_of({}) is None


def test_what_a_killed_save_left_is_no_part_of_the_hash(tmp_path: Path) -> None:
    model = make_model(tmp_path, OWN_ADAPTER)
    before = hash_adapter(model.adapter_path)
    (model.adapter_path / f".{MODEL_FILE}.abcdefgh").write_text("{")
    assert LoraModelRegistry(tmp_path).save(model).adapter_sha256 == before
    assert hash_adapter(model.adapter_path) == before


def test_a_file_name_that_is_not_unicode_is_no_obstacle(tmp_path: Path) -> None:
    model = make_model(tmp_path, OWN_ADAPTER)
    with suppress(OSError):  # some file systems take Unicode alone
        (model.adapter_path / os.fsdecode(b"\xff.bin")).write_text("more")
    registry = LoraModelRegistry(tmp_path)
    registry.save(model)
    registry.verify(model.id)


def test_a_hash_that_the_adapter_does_not_have_is_refused(tmp_path: Path) -> None:
    model = make_model(tmp_path, adapter_sha256="0" * 64)
    with pytest.raises(LoraTrainerError, match=f"has the hash {hash_adapter(model.adapter_path)}, expected 0000.*: it was changed since"):
        LoraModelRegistry(tmp_path).save(model)
    assert LoraModelRegistry(tmp_path).list_models() == []


def test_a_model_without_an_adapter_is_not_recorded(tmp_path: Path) -> None:
    model = make_model(tmp_path, {})
    with pytest.raises(LoraTrainerError, match="there is no adapter in"):
        LoraModelRegistry(tmp_path).save(model)
    model.adapter_path.rmdir()
    with pytest.raises(LoraTrainerError, match="there is no adapter in"):
        LoraModelRegistry(tmp_path).save(model)


def test_a_full_disk_is_told_and_leaves_all_as_it_was(tmp_path: Path) -> None:
    """A limit on the size of files stands for a full disk."""
    saved, new = save_model(tmp_path), make_model(tmp_path)
    code = f"""
import resource, signal
from loraloop.errors import LoraTrainerError
from loraloop.lora.registry import LoraModelRegistry
registry = LoraModelRegistry({str(tmp_path)!r})
new = registry.get("latest").model_copy(update={{"id": {str(new.id)!r}, "adapter_path": registry.directory / {str(new.id)!r}}})
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
resource.setrlimit(resource.RLIMIT_FSIZE, (50, 50))
for use in (lambda: registry.save(new), lambda: registry.move("latest", "held", "a reason of some length")):
    try:
        use()
    except LoraTrainerError as error:
        print(error)
"""
    said = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.splitlines()
    assert said == [f"{new.id} cannot be recorded: [Errno 27] File too large", "latest does not become held: [Errno 27] File too large"]
    registry = LoraModelRegistry(tmp_path)
    assert registry.list_models() == [saved]
    assert sorted(file.name for file in new.adapter_path.iterdir()) == sorted(PEFT_ADAPTER)
    assert registry.save(new).id == new.id
    assert registry.move(saved.id, "held", "now there is room").state is ModelState.HELD


def test_a_script_may_not_leave_a_history_of_its_own(tmp_path: Path) -> None:
    model = make_model(tmp_path, {**OWN_ADAPTER, "history.jsonl": "{}"})
    with pytest.raises(LoraTrainerError, match=r"history\.jsonl is in the place of loraloop's own history"):
        LoraModelRegistry(tmp_path).save(model)


@pytest.mark.parametrize(
    ("files", "name", "text", "says"),
    [
        (PEFT_ADAPTER, "adapter_model.safetensors", "Weights", "adapter_model.safetensors differs from what was recorded (in"),
        (PEFT_ADAPTER, "adapter_config.json", None, "adapter_config.json is missing (in"),
        (OWN_ADAPTER, "adapter.bin", "", "adapter.bin differs from what was recorded (in"),
        (OWN_ADAPTER, "adapter.bin", None, "adapter.bin is missing (in"),
        (OWN_ADAPTER, "more.bin", "", "more.bin was not there then (in"),
    ],
)
def test_verify_names_what_changed(tmp_path: Path, files: dict[str, str], name: str, text: str | None, says: str) -> None:
    model, registry = save_model(tmp_path, files), LoraModelRegistry(tmp_path)
    assert registry.verify(model.id) == model
    if text is None:
        (model.adapter_path / name).unlink()
    else:
        (model.adapter_path / name).write_text(text)
    with pytest.raises(LoraTrainerError, match=re.escape(f"{model.id} is not what was recorded: {says}")):
        registry.verify("latest")


def test_verify_names_every_file_that_changed_and_no_other(tmp_path: Path) -> None:
    model = save_model(tmp_path, {**PEFT_ADAPTER, "README.md": "about"})
    for name in (*PEFT_ADAPTER, "README.md", "new"):
        (model.adapter_path / name).write_text("other")
    with pytest.raises(
        LoraTrainerError, match=r"recorded: adapter_config\.json differs [^;]*; adapter_model\.safetensors differs [^;]* \(in"
    ):
        LoraModelRegistry(tmp_path).verify(model.id)


def test_verify_tells_that_the_record_was_changed(tmp_path: Path) -> None:
    model = save_model(tmp_path)
    record = (model.adapter_path / MODEL_FILE).read_text()
    (model.adapter_path / MODEL_FILE).write_text(record.replace(model.adapter_sha256 or "", "0" * 64))
    with pytest.raises(LoraTrainerError, match=f"the record of {model.id} was changed"):
        LoraModelRegistry(tmp_path).verify(model.id)


def test_equal_adapters_are_found_by_their_hash_under_every_id(tmp_path: Path) -> None:
    first, other, second = save_model(tmp_path), save_model(tmp_path, OWN_ADAPTER), save_model(tmp_path)
    registry = LoraModelRegistry(tmp_path)
    assert first.adapter_sha256 is not None
    assert registry.find_by_hash(first.adapter_sha256) == registry.find_by_hash(first.adapter_sha256[:8]) == [first, second]
    assert registry.find_by_hash((other.adapter_sha256 or "")[:8]) == [other]
    assert registry.find_by_hash("0" * 64) == []
    for text in ("", "abc", "no hash", "A" * 8, "0" * 65):
        with pytest.raises(LoraTrainerError, match="is no beginning of a hash; expected 4 to 64 digits"):
            registry.find_by_hash(text)


def test_a_record_of_an_earlier_version_is_read_moved_and_deleted(tmp_path: Path) -> None:
    folder = tmp_path / "lora-1700000000000-0123abcd"
    folder.mkdir()
    (folder / "adapter.bin").write_text("weights")
    (folder / MODEL_FILE).write_text(OF_AN_EARLIER_VERSION)
    registry = LoraModelRegistry(tmp_path)
    model = registry.get("latest")
    assert (model.sample_count, model.metrics and model.metrics.peak_memory_mb, model.adapter_path) == (7, 900, folder)
    assert (model.adapter_sha256, model.adapter_files, model.parent, model.run, model.state) == (None, {}, None, None, "candidate")
    with pytest.raises(LoraTrainerError, match="was recorded without hashes, by an earlier version"):
        registry.verify(model.id)
    assert registry.find_by_hash("0000") == []
    assert registry.move(model.id, "held", "few goals").state is ModelState.HELD
    assert (folder / MODEL_FILE).read_text() == OF_AN_EARLIER_VERSION
    assert registry.delete(model.id) == model.id
    assert registry.list_models() == []


# --- which model is meant ---------------------------------------------------------------------------------------------------


def test_an_id_may_be_cut_short_while_it_means_one_model(tmp_path: Path) -> None:
    ids = [LoraModelId(f"lora-17000000000{number:02d}-00000001") for number in range(12)]
    models = [save_model(tmp_path, id=model_id) for model_id in ids]
    registry = LoraModelRegistry(tmp_path)
    assert registry.get(ids[3][:-9]) == models[3]
    with pytest.raises(LoraTrainerError, match=f"2 models begin with 'lora-170000000001': {ids[10]}, {ids[11]}; give more of the id"):
        registry.get("lora-170000000001")
    with pytest.raises(LoraTrainerError, match=f"12 models begin with 'lora': {ids[0]}, .*{ids[9]} and 2 more; give more of the id"):
        registry.move("lora", "held", "why")
    with pytest.raises(LoraTrainerError, match="no model ''"):
        registry.delete("")
    assert registry.list_models() == models


def test_a_whole_id_is_never_taken_for_the_beginning_of_a_longer_one(tmp_path: Path) -> None:
    short, long = (LoraModelId(f"lora-1700000000000-{digits}") for digits in ("01234567", "0123456789"))
    models = [save_model(tmp_path, id=model_id) for model_id in (short, long)]
    assert LoraModelRegistry(tmp_path).get(short) == models[0]


# --- deleting ---------------------------------------------------------------------------------------------------------------


def test_a_deleted_model_is_gone_with_all_its_files(tmp_path: Path) -> None:
    kept, deleted = save_model(tmp_path), save_model(tmp_path)
    registry = LoraModelRegistry(tmp_path)
    registry.move(deleted.id, "rejected", "worse")
    assert registry.delete("latest") == deleted.id
    assert registry.list_models() == [kept]
    assert [entry.name for entry in tmp_path.iterdir()] == [kept.id]
    for again in (registry.delete, registry.get, registry.verify, registry.get_history):
        with pytest.raises(LoraTrainerError, match=f"no model '{deleted.id}'"):
            again(deleted.id)


def test_what_is_needed_is_not_deleted_and_the_reason_is_told(tmp_path: Path) -> None:
    registry = LoraModelRegistry(tmp_path)
    parent = save_model(tmp_path)
    child = save_model(tmp_path, parent=parent.id)
    with pytest.raises(LoraTrainerError, match=f"{parent.id} is not deleted: {child.id} went on from it; delete that first"):
        registry.delete(parent.id)
    registry.move(child.id, "promoted", "better")
    with pytest.raises(LoraTrainerError, match=f"{child.id} is not deleted: it is promoted; retire it first"):
        registry.delete(child.id)
    registry.move(child.id, "retired", "replaced")
    with pytest.raises(LoraTrainerError, match=f"{child.id} is not deleted: run-7 reads {child.id}"):
        registry.delete(child.id, lambda model_id: f"run-7 reads {model_id}")
    assert [model.id for model in registry.list_models()] == [parent.id, child.id]
    assert all(registry.verify(model.id) for model in (parent, child))
    registry.delete(child.id)
    registry.delete(parent.id)
    assert registry.list_models() == []


def test_a_deletion_that_was_cut_off_is_no_model_and_is_swept(tmp_path: Path) -> None:
    kept = save_model(tmp_path)
    left = save_model(tmp_path)
    left.adapter_path.rename(tmp_path / f".{left.id}.deleted")  # as a kill behind the rename leaves it
    registry = LoraModelRegistry(tmp_path)
    assert registry.list_models() == [kept]
    registry.sweep()
    assert [entry.name for entry in tmp_path.iterdir()] == [kept.id]


def test_sweeping_spares_all_but_deletions(tmp_path: Path) -> None:
    names = {LoraModelId.new(), f"{LoraModelId.new()}.failed", f".{LoraModelId.new()}.abcdef", "other", ".deleted"}
    for name in names:
        (tmp_path / name).mkdir()
    LoraModelRegistry(tmp_path).sweep()
    assert {entry.name for entry in tmp_path.iterdir()} == names
    LoraModelRegistry(tmp_path / "missing").sweep()
    assert not (tmp_path / "missing").exists()


def test_a_damaged_model_can_be_deleted_and_hides_no_child(tmp_path: Path) -> None:
    sound, damaged = save_model(tmp_path), save_model(tmp_path)
    (damaged.adapter_path / MODEL_FILE).write_text("{")
    registry = LoraModelRegistry(tmp_path)
    with pytest.raises(LoraTrainerError, match=f"the record .*{damaged.id}.* cannot be read"):
        registry.delete(sound.id)  # it may be the parent of the damaged one
    registry.delete(damaged.id)
    assert registry.list_models() == [sound]


def test_nothing_is_made_where_there_is_no_registry(tmp_path: Path) -> None:
    registry = LoraModelRegistry(tmp_path / "missing")
    with pytest.raises(LoraTrainerError, match="no model"):
        registry.delete("latest")
    with pytest.raises(LoraTrainerError, match="no model"):
        registry.move("latest", "held", "why")
    assert not (tmp_path / "missing").exists()
