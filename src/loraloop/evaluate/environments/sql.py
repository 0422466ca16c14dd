"""SQL on sqlite3: a question, a database, and as many statements as it takes, in the manner of InterCode.

InterCode (Yang et al., 2023) pays for a statement by its rows: the share of rows that it has in common with the reference's, of all rows
of both (each distinct row once), times Kendall's tau of the order of the common ones. A play is over at full pay, at `submit`, or when
its turns run out; it is paid by its best statement. Databases are opened for reading only; a statement may take so many steps and give
so many rows, and is one statement. What MySQL's agents ask (SHOW TABLES, DESCRIBE, SHOW COLUMNS) is answered in MySQL's form.
"""

from __future__ import annotations

import contextlib
import re
import sqlite3
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

from loraloop.base_model import cache_directory
from loraloop.errors import EvaluationError, SettingsError
from loraloop.evaluate.environment import Environment, PlayLimits, Task, load_tasks
from loraloop.evaluate.environments.mysql_dump import convert_dump
from loraloop.evaluate.options import take_options
from loraloop.files import file_sha256, new_directory

SYSTEM = "You answer questions about a database. Each answer is one SQL statement and nothing else; its result is shown to you."
MAX_STEPS = 50_000_000
"""Of SQLite's virtual machine for one statement: the same on every machine, unlike a time."""
STEPS_A_CALL = 10_000
MAX_ROWS = 5_000
MAX_TEXT = 1 << 20
"""Bytes of one value or statement."""
MAX_SHOWN = 1_000
"""Characters of a result that the agent sees."""
ERROR = "Error executing query: "
_READS = {sqlite3.SQLITE_SELECT, sqlite3.SQLITE_READ, sqlite3.SQLITE_FUNCTION, sqlite3.SQLITE_RECURSIVE}
_FULL = 1 - 1e-9

Rows = list[tuple[Any, ...]]


class SqlSuite:
    """Questions with a reference statement, from a file of InterCode's or like it: objects with `task_id`, `db`, `query`, `gold`.

    Option `databases`: a MySQL dump (`.sql`) or a folder of SQLite files named `<db>.sqlite`; without it `ic_spider_dbs.sql` beside the
    tasks. Option `prompt`: `recorded` shows the question alone, as InterCode's recordings have it, `schema` tells what to do and what
    tables there are. Tasks whose reference gives no rows are left out: every statement without rows would be right.
    """

    name: ClassVar[str] = "sql"
    description: ClassVar[str] = "SQL on sqlite3: InterCode's tasks and databases, or others like them"
    limits = PlayLimits(max_turns=10, max_turn_tokens=160, max_tokens=2400)
    success_reward = _FULL

    def __init__(self, tasks: Path | None = None, options: Mapping[str, str] | None = None) -> None:
        told = take_options(self.name, options, {"databases": "", "prompt": "recorded"})
        if tasks is None:
            raise SettingsError("sql has no tasks of its own; give a file of them with --tasks, such as InterCode's ic_spider_dev.json")
        if told["prompt"] not in ("recorded", "schema"):
            raise SettingsError(f"sql: prompt {told['prompt']!r}: expected recorded or schema")
        self.shows_schema = told["prompt"] == "schema"
        self.system: str | None = SYSTEM if self.shows_schema else None
        self.folder = _open_databases(Path(told["databases"]) if told["databases"] else tasks.with_name("ic_spider_dbs.sql"))
        found = load_tasks(tasks)
        self.tasks = [task for task in found if self._read_gold(task, tasks)]
        n_empty = len(found) - len(self.tasks)
        self.notes: tuple[str, ...] = (f"{n_empty} of {len(found)} tasks are left out: their reference gives no rows",) if n_empty else ()

    def list_tasks(self) -> list[Task]:
        """The tasks that can be told right from wrong, in the order of the file."""
        return self.tasks

    def open(self) -> Environment[Task]:
        """A play's own connections."""
        return SqlEnvironment(self.folder, shows_schema=self.shows_schema)

    def to_action(self, text: str) -> str:
        """The statement in an agent's turn: out of a code fence or `execute[…]`, where it is in one."""
        fenced = re.search(r"```(?:sql)?\s*(.*?)(?:```|$)", text, re.DOTALL | re.IGNORECASE)
        called = re.search(r"execute\[(.*)\]", text, re.DOTALL)
        return (fenced[1] if fenced else called[1] if called else text).strip()

    def is_executed(self, observation: str) -> bool:
        """False for SQLite's refusals."""
        return not observation.startswith(ERROR)

    def _read_gold(self, task: Task, path: Path) -> Rows:
        if not all(isinstance(task.data.get(key), str) for key in ("db", "query", "gold")):
            raise EvaluationError(f"{path}, task {task.id}: expected texts db, query and gold")
        with contextlib.closing(_connect(self.folder, str(task.data["db"]))) as connection:
            try:
                return _run(connection, str(task.data["gold"]))
            except sqlite3.Error as error:
                raise EvaluationError(
                    f"{path}, task {task.id}: the reference {task.data['gold']!r} cannot be executed ({error})"
                ) from error


@dataclass
class SqlEnvironment:
    """One play on the database of its task."""

    folder: Path
    shows_schema: bool = False

    def reset(self, task: Task) -> str:
        """The question."""
        self.database, self.best = str(task.data["db"]), 0.0
        question = str(task.data["query"])
        with self._connection() as connection:
            self.gold = _run(connection, str(task.data["gold"]))
            if not self.shows_schema:
                return question
            tables = [f"{name}({', '.join(column[1] for column in _columns(connection, name))})" for name in _tables(connection)]
        return "Tables:\n" + "\n".join(tables) + f"\n\nQuestion: {question}"

    def step(self, action: str) -> tuple[str, float, bool]:
        """What the statement gives, the best pay so far, and whether the play is over."""
        if action.strip().lower() == "submit":
            return "submitted", self.best, True
        try:
            rows = self._answer(action.strip())
        except (sqlite3.Error, sqlite3.Warning, ValueError, UnicodeError) as error:
            return f"{ERROR}{error}"[:MAX_SHOWN], self.best, False
        self.best = max(self.best, pay(rows, self.gold))
        shown = str(rows)
        return shown if len(shown) <= MAX_SHOWN else f"{shown[:MAX_SHOWN]}…", self.best, self.best >= _FULL

    def _answer(self, statement: str) -> Rows:
        """The rows of a statement of SQLite, or of one of MySQL's that look at tables."""
        asked = re.fullmatch(r"(?:DESCRIBE|DESC|SHOW COLUMNS (?:FROM|IN))\s+`?(\w+)`?\s*;?", statement, re.IGNORECASE)
        with self._connection() as connection:
            if re.fullmatch(r"SHOW TABLES\s*;?", statement, re.IGNORECASE):
                return [(name,) for name in _tables(connection)]
            if asked is None:
                return _run(connection, statement)
            columns = _columns(connection, asked[1])
        if not columns:
            raise ValueError(f"Table '{asked[1]}' doesn't exist")
        return [
            (
                name,
                kind.lower().encode(),
                "NO" if needed or key else "YES",
                "PRI" if key else "",
                None if default == "NULL" else default,
                "",
            )
            for _, name, kind, needed, default, key in columns
        ]

    def _connection(self) -> contextlib.closing[sqlite3.Connection]:
        """A connection of its own for each statement, so that none is left open where a play breaks off."""
        return contextlib.closing(_connect(self.folder, self.database))


def pay(rows: Rows, gold: Rows) -> float:
    """What InterCode pays for `rows` where `gold` is right: -1 to 1, and 1 for the same distinct rows in the same order."""
    found, wanted = list(dict.fromkeys(map(repr, rows))), list(dict.fromkeys(map(repr, gold)))
    common = set(found) & set(wanted)
    if not common:
        return 0.0
    shares = len(common) / len(set(found) | set(wanted))
    first, second = [row for row in found if row in common], [row for row in wanted if row in common]
    if first == second:
        return shares
    from scipy.stats import kendalltau

    place = {row: number for number, row in enumerate(second)}
    return shares * float(kendalltau(range(len(first)), [place[row] for row in first]).statistic)


def _open_databases(source: Path) -> Path:
    """The folder of SQLite files; those of a dump are made once and kept in the user's cache."""
    if source.is_dir():
        return source
    if not source.is_file():
        raise EvaluationError(
            f"there are no databases at {source}; name a MySQL dump or a folder of SQLite files with the option databases"
        )
    folder = cache_directory() / "sql" / file_sha256(source)[:24]
    if not folder.exists():
        with contextlib.suppress(FileExistsError), new_directory(folder) as aside:  # another process may have been faster
            convert_dump(source, aside)
    return folder


def _connect(folder: Path, name: str) -> sqlite3.Connection:
    file = folder / f"{name}.sqlite"
    if Path(name).name != name or not file.is_file():
        raise EvaluationError(f"there is no database {name!r} in {folder}")
    connection = sqlite3.connect(f"{file.resolve().as_uri()}?mode=ro&immutable=1", uri=True, check_same_thread=False)
    connection.setlimit(sqlite3.SQLITE_LIMIT_LENGTH, MAX_TEXT)
    connection.setlimit(sqlite3.SQLITE_LIMIT_ATTACHED, 0)
    return connection


def _run(connection: sqlite3.Connection, statement: str) -> Rows:
    """The rows of one statement that only reads. Raises sqlite3.Error, ValueError for too many rows."""
    left = MAX_STEPS // STEPS_A_CALL

    def tick() -> int:
        nonlocal left
        left -= 1
        return int(left < 0)

    connection.set_authorizer(lambda action, *_: sqlite3.SQLITE_OK if action in _READS else sqlite3.SQLITE_DENY)
    connection.set_progress_handler(tick, STEPS_A_CALL)
    try:
        rows: Rows = connection.execute(statement.rstrip().removesuffix(";")).fetchmany(MAX_ROWS + 1)
    finally:
        connection.set_progress_handler(None, 0)
        connection.set_authorizer(None)
    if len(rows) > MAX_ROWS:
        raise ValueError(f"more than {MAX_ROWS:,} rows; add a LIMIT")
    return rows


def _tables(connection: sqlite3.Connection) -> list[str]:
    return [name for (name,) in connection.execute("SELECT name FROM sqlite_master WHERE type = 'table' ORDER BY name")]


def _columns(connection: sqlite3.Connection, table: str) -> list[tuple[int, str, str, int, Any, int]]:
    return connection.execute("SELECT cid, name, type, [notnull], dflt_value, pk FROM pragma_table_info(?)", (table,)).fetchall()
