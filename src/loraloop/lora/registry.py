"""Where trained models are kept: one folder a model, its record written last, the history of its states beside it.

A folder without a record is not a model: a run that was killed leaves nothing that looks finished. A record never changes, and tells
the hashes of the adapter's files. Whatever changes the directory does so alone, under a lock that a dead process cannot keep; reading
needs none.
"""

from __future__ import annotations

import difflib
import os
import re
import shutil
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

from pydantic import ValidationError

from loraloop.errors import LoraTrainerError
from loraloop.files import file_sha256, hash_listing, locked_directory, sync, sync_tree, write_atomic, write_json
from loraloop.lora.model import LoraModelId, TrainedModel
from loraloop.lora.states import HISTORY_FILE, ModelState, StateChange, append_change, read_history, state_of

MODEL_FILE = "trained_model.json"
VERDICT_FILE = "verdict.json"
PEFT_FILES = ("adapter_config.json", "adapter_model.safetensors")
"""What makes an adapter, and all that its hash is over."""
DELETED = ".deleted"
"""Ends the name of a folder that is being removed."""

InUse = Callable[[LoraModelId], str | None]
"""Says by what a model is used, None for a model that is not."""


def hash_adapter(folder: Path) -> str | None:
    """The address of the adapter in `folder`: equal for equal files, whoever wrote them, and None when there are none.

    SHA-256 over a line `<SHA-256 of the file>  <its name>` for each file, in the order of the names: what
    `sha256sum adapter_config.json adapter_model.safetensors | sha256sum` says. Without those two, since a training script of the
    user's own may write anything, it is over every regular file but loraloop's own records.
    """
    return _address(_hash_files(folder.name, _adapter_files(folder)))


class LoraModelRegistry:
    """The models of one directory."""

    def __init__(self, directory: str | Path) -> None:
        self.directory = Path(directory)

    def save(self, model: TrainedModel) -> TrainedModel:
        """Record `model`, whose adapter is in place, and give it as recorded: with its adapter's hash, a candidate.

        Raises LoraTrainerError when it is recorded already, its adapter is elsewhere, is missing, or is not what it says, and when the
        disk does not take the record: then there is no such model, and it may be saved again.
        """
        folder = self.directory / model.id
        if model.adapter_path.resolve() != folder.resolve():
            raise LoraTrainerError(f"the adapter of {model.id} is in {model.adapter_path}, expected {folder}")
        _check_unrecorded(folder)
        files = _hash_files(model.id, _adapter_files(folder))
        address = _address(files)
        if address is None:
            raise LoraTrainerError(f"there is no adapter in {folder}; a model is recorded when its files are in place")
        if model.adapter_sha256 not in (None, address):
            raise LoraTrainerError(f"the adapter in {folder} has the hash {address}, expected {model.adapter_sha256}: it was changed since")
        update = {"adapter_sha256": address, "adapter_files": files, "state": ModelState.CANDIDATE}
        recorded = model.model_copy(update=update)
        with _told(f"{model.id} cannot be recorded"):
            sync_tree(folder)
            sync(self.directory)
            with locked_directory(self.directory):
                _check_unrecorded(folder)
                write_atomic(folder / MODEL_FILE, recorded.model_dump_json(indent=2, exclude={"state"}) + "\n")
        return recorded

    def list_models(self) -> list[TrainedModel]:
        """All models, oldest first."""
        return list(self._iter_models())

    def get(self, model_id: str) -> TrainedModel:
        """The model whose id is or begins with `model_id`, or `latest`. Raises LoraTrainerError naming those that there are."""
        return _load(self._find_record(model_id))

    def find_latest(self, learn_model_name: str | None = None) -> TrainedModel | None:
        """The newest model, of one learn model when named; None when there is none."""
        models = [model for model in self.list_models() if learn_model_name in (None, model.learn_model_name)]
        return models[-1] if models else None

    def find_by_hash(self, prefix: str) -> list[TrainedModel]:
        """The models whose adapter's hash begins with `prefix`, oldest first: several when runs have made the very same adapter.

        Raises LoraTrainerError when `prefix` is no beginning of a hash.
        """
        if not re.fullmatch("[0-9a-f]{4,64}", prefix):
            raise LoraTrainerError(f"{prefix!r} is no beginning of a hash; expected 4 to 64 digits of 0-9 and a-f")
        return [model for model in self._iter_models() if (model.adapter_sha256 or "").startswith(prefix)]

    def get_history(self, model_id: str) -> tuple[StateChange, ...]:
        """Every change of the model's state, oldest first; none for a candidate. Raises LoraTrainerError as `get` does."""
        return read_history(self._find_record(model_id).parent)

    def verify(self, model_id: str) -> TrainedModel:
        """Hash the adapter's files again, and give the model when they are what was recorded.

        Raises LoraTrainerError naming every file that is not, and for a record that has no hashes.
        """
        model = self.get(model_id)
        if not model.adapter_files:
            raise LoraTrainerError(f"{model.id} was recorded without hashes, by an earlier version; what it was then cannot be told")
        if _address(model.adapter_files) != model.adapter_sha256:
            raise LoraTrainerError(f"the record of {model.id} was changed: its adapter_sha256 is not that of its adapter_files")
        changes = _list_changes(model)
        if changes:
            advice = "put the files back from a copy, or train again"
            raise LoraTrainerError(f"{model.id} is not what was recorded: {'; '.join(changes)} (in {model.adapter_path}); {advice}")
        return model

    def move(self, model_id: str, state: ModelState | str, reason: str) -> TrainedModel:
        """Give a model another state, for a reason that its history keeps; on the disk when this returns.

        Raises LoraTrainerError for an unknown model or state, a blank reason, a change that `states.TRANSITIONS` lacks, and when the disk
        does not take it: then nothing has changed.
        """
        with _told(f"{model_id} does not become {state}"), self._alone_with(model_id) as file:
            append_change(file.parent, state, reason)
            return _load(file)

    def save_verdict(self, model_id: str, verdict: Mapping[str, object]) -> None:
        """Keep what a model was judged to be, beside its record, in the place of an earlier verdict. Raises LoraTrainerError."""
        with _told(f"the verdict of {model_id} is not kept"), self._alone_with(model_id) as file:
            write_json(file.parent / VERDICT_FILE, verdict)

    def find_verdict(self, model_id: str) -> str | None:
        """The JSON text that `save_verdict` wrote last, None when it never did. Raises LoraTrainerError."""
        path = self._find_record(model_id).parent / VERDICT_FILE
        with _told(f"the verdict of {model_id} cannot be read"):
            return path.read_text(encoding="utf-8") if path.exists() else None

    def delete(self, model_id: str, in_use: InUse = lambda model_id: None) -> LoraModelId:
        """Remove a model and give its whole id.

        Raises LoraTrainerError when it is promoted, when another model goes on from it, and when `in_use` names what needs it. It is
        gone with one rename; what a kill leaves of its files behind that is swept later.
        """
        self.sweep()
        with _told(f"{model_id} is not deleted"), self._alone_with(model_id) as file:
            folder, found = file.parent, LoraModelId(file.parent.name)
            needed = self._find_use(found) or in_use(found)
            if needed:
                raise LoraTrainerError(f"{found} is not deleted: {needed}")
            aside = folder.with_name(f".{found}{DELETED}")
            folder.rename(aside)
            sync(self.directory)
        shutil.rmtree(aside, ignore_errors=True)
        return found

    def sweep(self) -> None:
        """Remove what deletions that were cut off have left."""
        for folder in self.directory.glob(f".{LoraModelId.prefix}-*{DELETED}"):
            shutil.rmtree(folder, ignore_errors=True)

    def _find_use(self, model_id: LoraModelId) -> str | None:
        """Why the registry itself keeps a model, None when it does not."""
        if state_of(read_history(self.directory / model_id)) is ModelState.PROMOTED:
            return "it is promoted; retire it first"
        others = [file for file in self._record_files() if file.parent.name != model_id]
        children = [file.parent.name for file in others if _load(file).parent == model_id]
        return f"{_name_some(children)} went on from it; delete that first" if children else None

    @contextmanager
    def _alone_with(self, model_id: str) -> Iterator[Path]:
        """The record of a model that no other process changes meanwhile."""
        name = self._find_record(model_id).parent.name  # before the lock, which makes the directory
        with locked_directory(self.directory):
            yield self._find_record(name)  # another process may have deleted it while this one waited

    def _iter_models(self) -> Iterator[TrainedModel]:
        for file in self._record_files():
            try:
                yield _load(file)
            except LoraTrainerError:
                if file.exists():  # else another process has just deleted it
                    raise

    def _find_record(self, model_id: str) -> Path:
        known = {file.parent.name: file for file in self._record_files()}
        names = list(known)
        if model_id == "latest" and names:
            return known[names[-1]]
        found = [name for name in names if name == model_id] or [name for name in names if model_id and name.startswith(model_id)]
        if len(found) == 1:
            return known[found[0]]
        if found:
            raise LoraTrainerError(f"{len(found)} models begin with {str(model_id)!r}: {_name_some(found)}; give more of the id")
        near = difflib.get_close_matches(model_id, names, n=1)
        hint = f" Did you mean {near[0]}?" if near else ""
        there = ", ".join(names[-5:]) or "none; train one with `loraloop train --base MODEL`"
        raise LoraTrainerError(f"no model {str(model_id)!r} in {self.directory}; known: {there}.{hint}")

    def _record_files(self) -> list[Path]:
        """The records, oldest first; what a failed run left is in a folder with a dot in its name."""
        return sorted(file for file in self.directory.glob(f"{LoraModelId.prefix}-*/{MODEL_FILE}") if "." not in file.parent.name)


def _load(file: Path) -> TrainedModel:
    try:
        model = TrainedModel.model_validate_json(file.read_bytes())
    except (OSError, ValidationError) as error:
        raise LoraTrainerError(f"the record {file} cannot be read: {error}") from error
    return model.model_copy(update={"adapter_path": file.parent, "state": state_of(read_history(file.parent))})


def _check_unrecorded(folder: Path) -> None:
    if (folder / MODEL_FILE).exists():
        raise LoraTrainerError(f"{folder.name} is recorded already in {folder}; a model never changes")
    if (folder / HISTORY_FILE).exists():
        raise LoraTrainerError(
            f"{folder / HISTORY_FILE} is in the place of loraloop's own history; have the training script name it otherwise"
        )


def _adapter_files(folder: Path) -> dict[str, Path]:
    """The files that an adapter's hash is over, by name."""
    peft = _peft_files(folder)
    return peft if len(peft) == len(PEFT_FILES) else _all_files(folder)


def _peft_files(folder: Path) -> dict[str, Path]:
    return {name: folder / name for name in PEFT_FILES if (folder / name).is_file()}


def _all_files(folder: Path) -> dict[str, Path]:
    """Every regular file but loraloop's records, and one that was being written when a process was killed."""
    records = (MODEL_FILE, VERDICT_FILE)
    own = {folder / HISTORY_FILE, *(folder / name for name in records), *(path for name in records for path in folder.glob(f".{name}.*"))}
    return {_name_of(path, folder): path for path in folder.rglob("*") if path not in own and path.is_file()}


def _name_of(path: Path, folder: Path) -> str:
    """The path within `folder`, as text that any file can hold: a name need not be Unicode."""
    return os.fsencode(path.relative_to(folder).as_posix()).decode("utf-8", "backslashreplace")


def _hash_files(model_id: str, files: Mapping[str, Path]) -> dict[str, str]:
    with _told(f"the adapter of {model_id} cannot be read"):
        return {name: file_sha256(path) for name, path in sorted(files.items())}


def _address(files: Mapping[str, str]) -> str | None:
    return hash_listing(files) if files else None


def _list_changes(model: TrainedModel) -> list[str]:
    """What differs from the recorded hashes, a phrase a file. A file more counts where the hash is over all that there is."""
    recorded, folder = model.adapter_files, model.adapter_path
    is_peft = recorded.keys() == set(PEFT_FILES)
    now = _hash_files(model.id, _peft_files(folder) if is_peft else _all_files(folder))
    changed = [name for name in sorted(recorded.keys() | now.keys()) if recorded.get(name) != now.get(name)]
    return [f"{name} {_difference(recorded.get(name), now.get(name))}" for name in changed]


def _difference(then: str | None, now: str | None) -> str:
    if now is None:
        return "is missing"
    return "differs from what was recorded" if then else "was not there then"


@contextmanager
def _told(what: str) -> Iterator[None]:
    """What the system refuses, as an error of ours."""
    try:
        yield
    except OSError as error:
        raise LoraTrainerError(f"{what}: {error}") from error


def _name_some(names: list[str]) -> str:
    """All of a few names, the first of many."""
    return ", ".join(names[:10]) + (f" and {len(names) - 10} more" if len(names) > 10 else "")
