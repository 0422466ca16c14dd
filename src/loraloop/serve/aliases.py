"""Which version answers to which alias, on the disk: `aliases.json`, the truth, and `history.jsonl`, every move with its reason.

An alias moves with one durable rename, so after any crash it is where it was or where it should be. Reading never writes. Whoever
writes holds the service's lease, so there is one at a time.
"""

from __future__ import annotations

import getpass
import os
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path

from pydantic import Field, JsonValue, ValidationError

from loraloop.episode import Frozen, now_ms
from loraloop.errors import ServingError
from loraloop.files import append_jsonl, read_jsonl, write_atomic
from loraloop.serve.applier import Version

ALIASES_FILE = "aliases.json"
HISTORY_FILE = "history.jsonl"
DAMAGED = ".damaged"
"""Ends the name under which a file that could not be read is kept when the next takes its place."""
KEPT_VERSIONS = 20
"""So many versions that answered before are kept for a rollback."""


class CanaryShare(Frozen):
    """A version on trial."""

    version: Version
    share: float = Field(gt=0, lt=1)
    """Of the conversations."""


class Served(Frozen):
    """What an alias stands for."""

    version: Version | None = None
    """What answers; None when nothing has been brought up yet."""
    previous: tuple[Version, ...] = ()
    """What answered before, the last one first, each once."""
    canary: CanaryShare | None = None
    wanted: Version | None = None
    """What was applied while no service ran: tried at the next start, in the usual way."""
    at: int = 0
    """When it last changed, in Unix milliseconds."""

    @property
    def versions(self) -> tuple[Version, ...]:
        """What should be up: the one that answers, then the one on trial."""
        canary = () if self.canary is None else (self.canary.version,)
        return canary if self.version is None else (self.version, *canary)

    def find_previous(self, to: str | None) -> Version | None:
        """What can be gone back to by a version's name, its digits, or a model's id; the last one for None."""
        matching = (each for each in self.previous if to is None or to in (each.name, each.model_id, each.name.partition("@")[2]))
        return next(matching, None)

    def moved_to(self, version: Version) -> Served:
        """The same alias with `version` live, and what was live as the first to roll back to."""
        before = () if self.version is None else (self.version,)
        kept = tuple(each for each in dict.fromkeys((*before, *self.previous)) if each.name != version.name)[:KEPT_VERSIONS]
        return Served(version=version, previous=kept, at=now_ms())


class Move(Frozen):
    """One line of the history."""

    at: int
    """When, in Unix milliseconds."""
    who: str
    """The user of this machine that the service ran as."""
    alias: str
    kind: str
    """`apply`, `rollback`, `canary`, `promote`, `canary_rolled_back` or `wanted`."""
    before: str | None
    """The version's name that answered until then."""
    after: str | None
    why: str
    proof: dict[str, JsonValue] = Field(default_factory=dict)
    """The figures that showed that the adapter is applied; empty when none were taken."""
    served: Served
    """What the alias stood for from then on."""


class AliasTable(Frozen):
    """All aliases, as read at one moment."""

    aliases: dict[str, Served] = Field(default_factory=dict)
    problem: str | None = None
    """What was wrong with the file, in words; None when nothing was. Not written."""

    def with_alias(self, alias: str, served: Served) -> AliasTable:
        """The same table, with `alias` standing for `served`."""
        return AliasTable(aliases={**self.aliases, alias: served}, problem=self.problem)


class AliasFile:
    """The two files in `folder`."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.path = folder / ALIASES_FILE
        self.history_path = folder / HISTORY_FILE

    def read(self) -> AliasTable:
        """The aliases; none where there has never been one.

        A file that is missing though there is a history, or damaged, is made up for from the history, and `problem` says so. Raises
        ServingError when that cannot be read either.
        """
        try:
            return AliasTable.model_validate_json(self.path.read_bytes())
        except FileNotFoundError:
            if not self.history_path.exists():
                return AliasTable()
            problem = f"{self.path} is missing"
        except (OSError, ValidationError) as error:
            problem = f"{self.path} cannot be read ({str(error).splitlines()[0]})"
        aliases = {move.alias: move.served for move in self.read_history(problem)}
        told = f"{problem}; the aliases are taken from {HISTORY_FILE}, which may lack the last move: see `loraloop serve status`"
        return AliasTable(aliases=aliases, problem=told)

    def read_history(self, because: str = "") -> list[Move]:
        """Every move, oldest first; a line that was never finished is none. Raises ServingError when it is damaged otherwise."""
        try:
            return [Move.model_validate(line) for line in read_jsonl(self.history_path, skip_torn=True)]
        except FileNotFoundError:
            if not because:
                return []
            reason = f"{self.history_path} is not there"
        except (OSError, ValueError) as error:
            reason = str(error) if isinstance(error, OSError) or not isinstance(error, ValidationError) else f"{self.history_path}: {error}"
        also = f"{because}, and " if because else ""
        raise ServingError(f"{also}{reason}; put it back from a copy, or remove both files and apply the models again")

    def write(self, table: AliasTable) -> None:
        """Put the aliases on the disk; on an OSError they are as before. A damaged file that is replaced is kept beside."""
        if table.problem and self.path.exists():
            os.replace(self.path, self.path.with_name(ALIASES_FILE + DAMAGED))
        write_atomic(self.path, table.model_dump_json(indent=2, exclude={"problem"}) + "\n")

    def tell(self, move: Move) -> str | None:
        """Add a line to the history; why it could not be, in words, else None: a move that is made is not undone for want of its line."""
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            append_jsonl(self.history_path, move.model_dump(mode="json"))
        except OSError as error:
            return f"the move of {move.alias} is made and not in {self.history_path}: {error}"
        return None


def make_move(alias: str, kind: str, before: Served, after: Served, why: str, *, proof: Mapping[str, JsonValue] | None = None) -> Move:
    """The line of the history for a move that is made now by this process."""
    moved = after.canary.version if kind == "canary" and after.canary else after.wanted if kind == "wanted" else after.version
    return Move(
        at=now_ms(),
        who=_who(),
        alias=alias,
        kind=kind,
        before=before.version.name if before.version else None,
        after=moved.name if moved else None,
        why=why,
        proof=dict(proof or {}),
        served=after,
    )


def _who() -> str:
    with suppress(OSError, KeyError):  # a user without an entry in the system's list
        return getpass.getuser()
    return str(os.getuid())
