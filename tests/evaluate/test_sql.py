"""SQL on real SQLite files: what InterCode pays, nothing written, nothing without end, and its recorded winners win again."""

from __future__ import annotations

import json
import sqlite3
import time
from pathlib import Path

import pytest

from loraloop.errors import EvaluationError, SettingsError
from loraloop.evaluate.environments.mysql_dump import convert_dump
from loraloop.evaluate.environments.sql import ERROR, SqlSuite, pay
from loraloop.testing import check_environment

DUMP = r"""-- MySQL dump
CREATE USER 'a'@'%' IDENTIFIED BY 'b;c';
CREATE DATABASE IF NOT EXISTS `zoo` /*!40100 DEFAULT CHARACTER SET utf8mb4 */;
USE `zoo`;
DROP TABLE IF EXISTS `animal`;
/*!40101 SET @saved_cs_client = @@character_set_client */;
CREATE TABLE `animal` (
  `id` int unsigned NOT NULL AUTO_INCREMENT,
  `name` varchar(20) CHARACTER SET utf8mb4 COLLATE utf8mb4_general_ci DEFAULT NULL COMMENT 'what it''s called',
  `kind` enum('bird','fish') DEFAULT 'bird',
  `weight` double DEFAULT NULL,
  PRIMARY KEY (`id`),
  UNIQUE KEY `by_name` (`name`(5)),
  KEY `by_kind` (`kind`),
  CONSTRAINT `fk` FOREIGN KEY (`kind`) REFERENCES `kinds` (`name`)
) ENGINE=InnoDB AUTO_INCREMENT=9 DEFAULT CHARSET=utf8mb4;
LOCK TABLES `animal` WRITE;
INSERT INTO `animal` VALUES (1,'O\'Hara; \"the\" owl','bird',1.5),(2,_utf8mb4'two\nlines -- no comment','fish',NULL),(3,'back\\slash /* kept */','fish',2);
UNLOCK TABLES;
"""
TASKS = [
    {"task_id": 0, "db": "zoo", "query": "Which animals, by weight?", "gold": "SELECT id FROM animal ORDER BY weight"},
    {"task_id": 1, "db": "zoo", "query": "Which cats?", "gold": "SELECT id FROM animal WHERE kind = 'cat'"},
    {"task_id": 2, "db": "zoo", "query": "How many fish?", "gold": "SELECT count(*) FROM animal WHERE kind = 'fish'"},
]


@pytest.fixture
def tasks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("LORALOOP_CACHE", str(tmp_path / "cache"))
    (tmp_path / "ic_spider_dbs.sql").write_text(DUMP)
    (tmp_path / "tasks.json").write_text(json.dumps(TASKS))
    return tmp_path / "tasks.json"


def test_a_dump_becomes_the_same_rows(tmp_path: Path) -> None:
    dump = tmp_path / "dump.sql"
    dump.write_text(DUMP)
    assert convert_dump(dump, tmp_path) == ["zoo"]
    connection = sqlite3.connect(tmp_path / "zoo.sqlite")
    assert connection.execute("SELECT name, kind, weight FROM animal ORDER BY id").fetchall() == [
        ('O\'Hara; "the" owl', "bird", 1.5),
        ("two\nlines -- no comment", "fish", None),
        ("back\\slash /* kept */", "fish", 2.0),
    ]
    connection.close()


def test_the_suite_conforms_and_leaves_out_what_cannot_be_told(tasks: Path) -> None:
    suite = SqlSuite(tasks)
    assert [task.id for task in suite.list_tasks()] == ["0", "2"]
    assert suite.notes == ("1 of 3 tasks are left out: their reference gives no rows",)
    assert suite.system is None
    check_environment(lambda: SqlSuite(tasks), ["SHOW TABLES", "nonsense", "SELECT 1", "SELECT id FROM animal"])
    shown = SqlSuite(tasks, {"prompt": "schema"})
    assert shown.open().reset(shown.list_tasks()[0]) == "Tables:\nanimal(id, name, kind, weight)\n\nQuestion: Which animals, by weight?"


def test_a_play_is_over_at_full_pay_and_keeps_the_best(tasks: Path) -> None:
    suite = SqlSuite(tasks)
    play = suite.open()
    assert play.reset(suite.list_tasks()[0]) == "Which animals, by weight?"
    assert play.step("SHOW TABLES") == ("[('animal',)]", 0.0, False)
    described, _, _ = play.step("DESCRIBE animal;")
    assert described.startswith("[('id', b'int")
    assert "('weight', b'double', 'YES', '', None, '')" in described
    half = play.step("SELECT id FROM animal WHERE weight > 0")
    assert half == ("[(1,), (3,)]", 2 / 3, False)
    assert play.step("SELECT 7") == ("[(7,)]", 2 / 3, False)
    assert play.step("SELECT id FROM animal ORDER BY weight;") == ("[(2,), (1,), (3,)]", 1.0, True)
    play.reset(suite.list_tasks()[0])
    assert play.step("submit") == ("submitted", 0.0, True)


@pytest.mark.parametrize(
    ("rows", "gold", "paid"),
    [
        ([(1,), (2,)], [(1,), (2,)], 1.0),
        ([(2,), (1,)], [(1,), (2,)], -1.0),
        ([(1,), (1,), (2,)], [(1,), (2,)], 1.0),
        ([(1,), (2,), (3,)], [(1,), (2,)], 2 / 3),
        ([(2,), (1,), (3,), (9,)], [(1,), (2,), (3,)], 0.75 / 3),
        ([], [(1,)], 0.0),
        ([("1",)], [(1,)], 0.0),
    ],
)
def test_pay_is_the_common_share_times_kendalls_tau(rows: list, gold: list, paid: float) -> None:
    assert pay(rows, gold) == pytest.approx(paid)


def test_nothing_is_written_and_nothing_is_without_end(tasks: Path, tmp_path: Path) -> None:
    suite = SqlSuite(tasks)
    before = {file: file.read_bytes() for file in (tmp_path / "cache").rglob("*.sqlite")}
    assert before
    play = suite.open()
    play.reset(suite.list_tasks()[0])
    hostile = [
        "DROP TABLE animal",
        "UPDATE animal SET weight = 0",
        "INSERT INTO animal VALUES (9, 'x', 'fish', 1)",
        f"ATTACH '{tmp_path / 'new.db'}' AS new",
        "PRAGMA writable_schema = 1",
        "SELECT load_extension('/lib/x.so')",
        "SELECT 1; DROP TABLE animal",
        "VACUUM",
        "SELECT zeroblob(1000000000)",
        "WITH RECURSIVE r(x) AS (SELECT 1 UNION ALL SELECT x + 1 FROM r) SELECT count(*) FROM r",
        "WITH RECURSIVE r(x) AS (SELECT 1 UNION ALL SELECT x + 1 FROM r) SELECT x FROM r",
        "SELECT '\0",
        "it seems that there is no such table",
    ]
    for statement in hostile:
        started = time.monotonic()
        said, paid, over = play.step(statement)
        assert (said.startswith(ERROR), paid, over) == (True, 0.0, False), statement
        assert not suite.is_executed(said)
        assert time.monotonic() - started < 20, statement
    assert {file: file.read_bytes() for file in (tmp_path / "cache").rglob("*.sqlite")} == before
    assert not (tmp_path / "new.db").exists()
    long = play.step("WITH RECURSIVE r(x) AS (SELECT 1 UNION ALL SELECT x + 1 FROM r LIMIT 4000) SELECT x FROM r")[0]
    assert len(long) == 1001
    assert suite.is_executed(long)


@pytest.mark.parametrize(
    ("text", "action"),
    [
        (" SELECT 1 ", "SELECT 1"),
        ("Thought 1: x\nAction 1: execute[SELECT a[0]]", "SELECT a[0]"),
        ("```sql\nSELECT 1\nFROM t\n```", "SELECT 1\nFROM t"),
    ],
)
def test_the_statement_is_taken_out_of_what_is_round_it(tasks: Path, text: str, action: str) -> None:
    assert SqlSuite(tasks).to_action(text) == action


def test_what_is_missing_is_named(tasks: Path, tmp_path: Path) -> None:
    with pytest.raises(SettingsError, match="no tasks of its own"):
        SqlSuite()
    with pytest.raises(EvaluationError, match="no databases at"):
        SqlSuite(tasks, {"databases": str(tmp_path / "none")})
    tasks.write_text(json.dumps([{**TASKS[0], "db": "../zoo"}]))
    with pytest.raises(EvaluationError, match=r"no database '\.\./zoo'"):
        SqlSuite(tasks)
    tasks.write_text(json.dumps([{**TASKS[0], "gold": "SELECT x FROM y"}]))
    with pytest.raises(EvaluationError, match="the reference 'SELECT x FROM y' cannot be executed"):
        SqlSuite(tasks)
    (tmp_path / "bad.sql").write_text("USE `a`;\nCREATE TABLE `t` (`x` int;\n);")
    with pytest.raises(EvaluationError):
        SqlSuite(tasks, {"databases": str(tmp_path / "bad.sql")})


def test_intercodes_own_tasks_and_recorded_winners(shared_data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LORALOOP_CACHE", str(tmp_path / "cache"))
    suite = SqlSuite(shared_data / "intercode_sql_env" / "ic_spider_tasks.json")
    tasks = {task.id: task for task in suite.list_tasks()}
    assert len(tasks) == 613
    assert suite.notes == ("85 of 698 tasks are left out: their reference gives no rows",)
    play = suite.open()
    for task in tasks.values():
        play.reset(task)
        assert play.step(str(task.data["gold"]))[1:] == (1.0, True)
    runs = json.loads((shared_data / "intercode" / "sql" / "gpt-4__ic_sql_multiturn_gpt-4_10_turns.json").read_bytes())
    runs = [run for run in (runs if isinstance(runs, list) else runs.values()) if str(run["task_id"]) in tasks]
    won = [run for run in runs if run["summary"]["max_reward"] == 1]
    assert len(won) == 440

    def wins(run: dict) -> bool:
        play.reset(tasks[str(run["task_id"])])
        return any(play.step(suite.to_action(action))[2] for action in run["turn_history"]["actions"])

    assert sum(map(wins, won)) >= 0.9 * len(won), "the others lean on MySQL's own syntax, case or order"
    lost = [run for run in runs if run["summary"]["max_reward"] < 1]
    assert sum(map(wins, lost)) <= 0.05 * len(lost), "SQLite sorts ties otherwise than MySQL, which now and then helps"
