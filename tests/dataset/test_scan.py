"""Secrets and personal data: found, located, quarantined or counted, and never shown."""

from __future__ import annotations

import json
import random
import string
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from loraloop.cli.main import app
from loraloop.dataset import REFUSED_FILE, Dataset, DatasetSettings, freeze
from loraloop.dataset.scan import Scanner, describe_places
from loraloop.episode import ActionRecord, Episode, EpisodeId, EpisodeMetadata, Failure, LlmCallRecord, Message, Success
from loraloop.errors import EmptyData
from loraloop.learn.conversation import ConversationLearn
from loraloop.project import Project
from loraloop.testing import make_episode


def drawn(n: int, characters: str = string.ascii_letters + string.digits, seed: int = 0) -> str:
    """What looks like a key; put together here, so that no file of the project holds one."""
    return "".join(random.Random(seed).choices(characters, k=n - 2)) + "a7"


HEX = "0123456789abcdef"
SECRETS = {
    "AWS Access Key": "AKIA" + drawn(18, string.ascii_uppercase + string.digits)[:16].upper(),
    "GitHub Token": "ghp_" + drawn(36),
    "GitHub token": "github_pat_" + drawn(60),
    "JSON Web Token": f"eyJ{drawn(20)}.eyJ{drawn(30)}.{drawn(30)}",
    "Slack Token": f"xoxb-{'4' * 12}-{drawn(24)}",
    "Stripe Access Key": "sk_live_" + drawn(24),
    "OpenAI or Anthropic key": "sk-ant-api03-" + drawn(40),
    "Google API key": "AIza" + drawn(35),
    "Hugging Face token": "hf_" + drawn(34),
    "private key": f"-----BEGIN RSA PRIVATE KEY-----\n{drawn(64)}",
    "password in an address": f"postgres://admin:{drawn(12)}@db.internal/main",
    "bearer token": f"Authorization: Bearer {drawn(40)}",
    "assigned secret": f'{{"api_key": "{drawn(32)}"}}',
}
PERSONAL = {
    "e-mail address": "mia.li_3818@mail.example.org",
    "telephone number": "+49 30 901820",
    "IBAN": "DE89 3704 0044 0532 0130 00",
    "card number": "4111 1111 1111 1111",
    "US social security number": "219-09-9999",
    "public IP address": "8.8.8.8",
}
HARMLESS = [
    "commit 3f9c2d1e8b7a6c5d4e3f2a1b0c9d8e7f6a5b4c3d",
    f"sha256:{drawn(64, HEX)}",
    "5d41402a-bc4b-4a76-b971-9d911017c592",
    '{"order_id": "#W2611340", "payment_id": "credit_card_9513926", "user_id": "mia_li_3668"}',
    "the password must have 12 characters and a digit",
    'api_key = "YOUR_API_KEY_GOES_HERE_1"',
    "password: ${DATABASE_PASSWORD_1}",
    "https://shop.example/a:b/c@d",
    '{"url":"https://a.example","mail":"at@"}',
    "10.0.0.1 and 192.168.1.1 and 127.0.0.1 and 999.1.1.1, version 1.2.3.4.5",
    "2024-05-15 10:30:00, 555-1234, 1234567890123456, 12.345.678",
    "DE89 3704 0044 0532 0130 01",
    "4111 1111 1111 1112",
    "a @mention, and x@y",
]


def episode(number: int = 1, content: str = "boil an egg", **changes: Any) -> Episode:
    said = (Message(role="user", content=content), Message(role="assistant", content=f"done {number}"))
    given = {"id": EpisodeId.from_content(f"{number:032x}"), "task_id": f"task {number}", "outcome": Success(1.0), "messages": said}
    return make_episode(**{**given, **changes})


def build(episodes: list[Episode], directory: Path, **options: Any) -> Dataset:
    settings = DatasetSettings(**{"unknown_license": "allow", "held_out_fraction": 0.0, **options})
    return freeze(episodes, ConversationLearn(), directory, settings)


@pytest.mark.parametrize("kind", SECRETS)
def test_a_secret_quarantines_its_episode(tmp_path: Path, kind: str) -> None:
    secret = SECRETS[kind]
    episodes = [episode(1, f"this is it: {secret} and no more"), episode(2)]
    dataset = build(episodes, tmp_path)
    assert dataset.manifest.refused == {"secret_found": 1}
    assert kind in dataset.manifest.secrets
    [line] = [json.loads(line) for line in (dataset.path / REFUSED_FILE).read_text().splitlines()]
    assert line["detail"].startswith("turn 0 (user), content, characters ")
    assert kind in line["detail"]
    assert build(episodes, tmp_path, secrets="allow").manifest.samples == 2
    assert kind in build(episodes, tmp_path, secrets="allow").manifest.secrets, "what is allowed is counted"


@pytest.mark.parametrize("kind", PERSONAL)
def test_personal_data_is_counted_quarantined_or_not_looked_for(tmp_path: Path, kind: str) -> None:
    episodes = [episode(1, f"it is {PERSONAL[kind]}, is it?"), episode(2)]
    manifest = build(episodes, tmp_path).manifest
    assert (manifest.samples, manifest.refused, manifest.personal_data) == (2, {}, {kind: 1})
    manifest = build(episodes, tmp_path, personal_data="quarantine").manifest
    assert (manifest.samples, manifest.refused, manifest.personal_data) == (1, {"personal_data_found": 1}, {kind: 1})
    manifest = build(episodes, tmp_path, personal_data="off").manifest
    assert (manifest.samples, manifest.personal_data) == (2, {})


@pytest.mark.parametrize("text", HARMLESS)
def test_what_only_looks_like_it_is_not_found(text: str) -> None:
    assert Scanner(secrets=True, personal=True).find(text) == ()


def test_a_finding_says_where_it_is_and_of_what_kind() -> None:
    scanner = Scanner(secrets=True, personal=True)
    text = f"write to {PERSONAL['e-mail address']} with {SECRETS['GitHub Token']}"
    found = {finding.kind: text[finding.start : finding.end] for finding in scanner.find(text)}
    assert found == {"e-mail address": PERSONAL["e-mail address"], "GitHub Token": SECRETS["GitHub Token"]}
    assert scanner.mask(text) == "write to [e-mail address] with [GitHub Token]"


FUNCTION = {"name": "log_in", "arguments": "{}"}


def places_with(secret: str) -> dict[str, Episode]:
    """An episode for each place that text can be in, by what the place is called."""
    call = {"id": "c", "type": "function", "function": {"name": "log_in", "arguments": json.dumps({"token": secret})}}
    told = Message.model_validate({"role": "assistant", "content": None, "tool_calls": [call]})
    asked = Message(role="user", content="log in")
    schema = {"type": "function", "function": {"name": "log_in", "description": f"such as {secret}"}}
    return {
        "turn 1 (tool), content": episode(
            messages=(asked, Message(role="tool", content=secret), Message(role="assistant", content="done"))
        ),
        "turn 1 (assistant), call 0, arguments": episode(messages=(asked, told)),
        "turn 1 (assistant), call 0, id": episode(
            messages=(asked, Message.model_validate({"role": "assistant", "tool_calls": [{"id": secret, "function": FUNCTION}]}))
        ),
        "turn 1 (assistant), author": episode(messages=(asked, Message(role="assistant", content="done", author=secret))),
        "turn 1 (tool), id of its call": episode(messages=(asked, Message(role="tool", content="done", tool_call_id=secret))),
        "tool schema 0": episode(tools=(schema,)),
        "record 0 (action), output": episode(records=(ActionRecord(action="log in", output=secret),)),
        "record 0 (llm_call), messages 0 (user), content": episode(
            records=(LlmCallRecord(messages=(Message(role="user", content=secret),), response=told.model_copy(update={"tool_calls": ()})),)
        ),
        "record 0 (llm_call), response 0 (assistant), call 0, arguments": episode(
            records=(LlmCallRecord(messages=(asked,), response=told),)
        ),
        "record 0 (llm_call), tools": episode(records=(LlmCallRecord(messages=(asked,), response=asked, tools=(schema,)),)),
        "outcome": episode(outcome=Failure(f"could not log in with {secret}")),
        "task": episode(task_id=f"log in with {secret}"),
        "group": episode(group_id=secret),
        "scenario": episode(metadata=EpisodeMetadata(scenario=secret)),
        "tag 0": episode(metadata=EpisodeMetadata(tags={"header": secret})),
    }


@pytest.mark.parametrize("place", places_with("x"))
def test_every_place_of_an_episode_is_looked_at(place: str) -> None:
    found = Scanner(secrets=True, personal=False).scan(places_with(SECRETS["GitHub Token"])[place])
    assert describe_places(found).startswith(f"{place}, characters ")


def test_the_value_is_in_no_file_and_no_output(tmp_path: Path) -> None:
    """Whatever the place, and whatever was done about it; of what is kept, only the samples themselves hold it."""
    secret, mail = SECRETS["GitHub Token"], PERSONAL["e-mail address"]
    planted = [
        one.model_copy(update={"id": EpisodeId.from_content(f"{100 + number:032x}")})
        for number, one in enumerate(places_with(secret).values())
    ]
    known = [
        episode(
            1, f"write to {mail}", task_id=f"task of {mail}", metadata=EpisodeMetadata(scenario=f"shop of {mail}", tags={"license": mail})
        ),
        episode(2, f"write to {mail} again", outcome=Failure(f"no answer from {mail}")),
        episode(3),
    ]
    with Project(tmp_path / "project") as project:
        project.store.append_many([*planted, *known])
    said = ""
    for options in ([], ["--json"], ["--personal-data", "quarantine"], ["--method", "kto"], ["--max-per-task", "1"]):
        arguments = ["build", "--project", str(tmp_path / "project"), "--unknown-license", "allow", *options]
        said += (done := CliRunner().invoke(app, arguments)).output
        assert done.exit_code == 0, done.output
    for noun in (["list"], ["list", "--json"]):
        said += CliRunner().invoke(app, ["datasets", *noun, "--project", str(tmp_path / "project")]).output
    assert "secret_found" in said
    assert secret not in said
    assert mail not in said
    files = [file for file in (tmp_path / "project" / "datasets").rglob("*") if file.is_file()]
    assert len(files) >= 13
    for file in files:
        assert secret not in file.read_text(), file
        assert mail not in file.read_text() or file.name in ("train.jsonl", "held_out.jsonl"), file


def test_an_episode_of_which_nothing_is_left_but_secrets_is_empty_data_without_them(tmp_path: Path) -> None:
    secret = SECRETS["Stripe Access Key"]
    with pytest.raises(EmptyData) as failure:
        build([episode(1, secret)], tmp_path)
    assert failure.value.refused == {"secret_found": 1}
    assert secret not in str(failure.value)


def test_many_findings_are_counted_after_the_first() -> None:
    found = Scanner(secrets=True, personal=False).scan(episode(1, " ".join([SECRETS["GitHub Token"]] * 5)))
    assert describe_places(found).endswith("; and 2 more")
