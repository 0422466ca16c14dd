"""A MySQL dump as SQLite databases, one file each: tables and rows, without keys but the primary ones, without users and locks."""

from __future__ import annotations

import re
import sqlite3
from collections.abc import Iterator
from pathlib import Path

from loraloop.errors import EvaluationError

_TOKEN = re.compile(
    r"""'(?:[^'\\]|\\.|'')*'|"(?:[^"\\]|\\.|"")*"|`[^`]*`|/\*.*?\*/|--[ \t][^\n]*|--\n|\#[^\n]*|;|[^'"`/;\#-]+|[/-]""",
    re.DOTALL,
)
_ESCAPES = {"n": "\n", "t": "\t", "r": "\r", "0": "\0", "b": "\b", "Z": "\x1a", "%": "\\%", "_": "\\_"}
_DROPPED = re.compile(r"\s*(?:UNIQUE |FULLTEXT |SPATIAL )?(?:KEY|INDEX)\b|\s*(?:CONSTRAINT|FOREIGN)\b", re.IGNORECASE)
_ATTRIBUTES = re.compile(
    r"\bCOLLATE[ =]\w+|\bCHARACTER SET \w+|\bAUTO_INCREMENT\b|\bunsigned\b|\bzerofill\b|\bON UPDATE \w+(?:\(\d*\))?"
    r"|\bCOMMENT '(?:[^']|'')*'",
    re.IGNORECASE,
)


def convert_dump(dump: Path, folder: Path) -> list[str]:
    """Write `<database>.sqlite` into `folder` for each database of the dump, and give their names.

    Raises EvaluationError naming the statement that cannot be converted, and for a dump that cannot be read or holds no database.
    """
    try:
        text = dump.read_text(encoding="utf-8")
    except (OSError, ValueError) as error:
        raise EvaluationError(f"the dump {dump} cannot be read: {error}") from error
    open_databases: dict[str, sqlite3.Connection] = {}
    current: sqlite3.Connection | None = None
    try:
        for statement in _statements(text):
            if chosen := re.match(r"(?:USE|CREATE DATABASE(?:\s+IF NOT EXISTS)?)\s+`?([\w-]+)`?", statement, re.IGNORECASE):
                name = chosen[1]
                if name not in open_databases:
                    open_databases[name] = sqlite3.connect(folder / f"{name}.sqlite")
                current = open_databases[name]
            elif re.match(r"(?:CREATE TABLE|INSERT INTO)\b", statement, re.IGNORECASE):
                if current is None:
                    raise EvaluationError(f"{dump}: {statement[:60]!r} comes before the first USE; which database is it of?")
                _execute(current, _to_table(statement) if statement[:6].upper() == "CREATE" else statement, dump)
        for connection in open_databases.values():
            connection.commit()
    finally:
        for connection in open_databases.values():
            connection.close()
    if not open_databases:
        raise EvaluationError(f"{dump} holds no database; expected a MySQL dump with CREATE DATABASE or USE")
    return sorted(open_databases)


def _execute(connection: sqlite3.Connection, statement: str, dump: Path) -> None:
    try:
        connection.execute(statement)
    except sqlite3.Error as error:
        raise EvaluationError(f"{dump}: SQLite does not take {statement[:120]!r} ({error})") from error


def _statements(text: str) -> Iterator[str]:
    """Each statement without comments and semicolon, its texts with quotes doubled as SQLite has them."""
    parts: list[str] = []
    for piece in _TOKEN.findall(text):
        if piece == ";":
            statement = "".join(parts).strip()
            parts = []
            if statement:
                yield statement
        elif piece[0] in "'\"":
            parts.append(_to_literal(piece))
        elif not piece.startswith(("/*", "--", "#")):
            parts.append(re.sub(r"\b_utf8(?:mb4)?\s*$", "", piece))


def _to_literal(piece: str) -> str:
    quote = piece[0]
    inner = piece[1:-1].replace(quote * 2, quote)
    inner = re.sub(r"\\(.)", lambda found: _ESCAPES.get(found[1], found[1]), inner, flags=re.DOTALL)
    return "'" + inner.replace("'", "''") + "'"


def _to_table(statement: str) -> str:
    """CREATE TABLE with the columns and the primary key."""
    head, _, rest = statement.partition("(")
    body = rest.rpartition(")")[0]
    lines = []
    for line in body.strip().splitlines():
        if not _DROPPED.match(line):
            plain = re.sub(r"\benum\s*\([^)]*\)|\bset\s*\([^)]*\)", "text", line.rstrip().rstrip(","), flags=re.IGNORECASE)
            plain = _ATTRIBUTES.sub("", plain)
            if re.match(r"\s*PRIMARY KEY", plain, re.IGNORECASE):
                plain = re.sub(r"`\(\d+\)", "`", plain)
            lines.append(plain)
    return f"{head}({', '.join(lines)})"
