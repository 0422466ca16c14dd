"""Secrets and personal data in episodes: where they are and of what kind, never what they are.

Secrets: the patterns of detect-secrets that name an issuer's own form of key (AWS, GitHub, Slack, Stripe, JWT, …), and ours for
private keys, bearer tokens, passwords in addresses, newer forms of keys, and values that are assigned to a name such as `api_key`.
Its detectors by entropy alone are left out: agents' episodes are full of ids, hashes and encoded results, which they take for
secrets. Personal data: patterns, with check digits where the kind has them. Names and postal addresses have no form that a pattern
could tell.

A pattern finds what looks like its kind: neither every secret, nor only secrets.
"""

from __future__ import annotations

import ipaddress
import json
import math
import re
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cache
from typing import Any, Literal

from loraloop.episode import Episode, Message

FindingGroup = Literal["secret", "personal"]
MAX_SHOWN = 3
"""How many findings a refusal names; the rest are counted."""


@dataclass(frozen=True)
class Finding:
    """Something found in one text: its kind, and the characters [start, end) of it."""

    group: FindingGroup
    kind: str
    start: int
    end: int


@dataclass(frozen=True)
class Place:
    """A finding and where in the episode it is: `turn 3 (tool), content`."""

    where: str
    finding: Finding

    def __str__(self) -> str:
        return f"{self.where}, characters {self.finding.start} to {self.finding.end}: {self.finding.kind}"


class Scanner:
    """Scans episodes. A text is looked at once, however many episodes have it: system prompts and tool schemas repeat."""

    def __init__(self, *, secrets: bool, personal: bool) -> None:
        self._patterns = [*(_secret_patterns() if secrets else ()), *(_PERSONAL if personal else ())]
        self._known: dict[str, tuple[Finding, ...]] = {}

    def scan(self, episode: Episode) -> list[Place]:
        """Everything found in the episode, in its order: turns, tools, records, outcome, names and tags."""
        return [Place(where, finding) for where, text in _iter_texts(episode) for finding in self.find(text)]

    def find(self, text: str) -> tuple[Finding, ...]:
        """What is in one text, by position."""
        found = self._known.get(text)
        if found is None:
            found = tuple(sorted(self._look(text), key=lambda one: (one.start, one.end, one.kind)))
            self._known[text] = found
        return found

    def mask(self, text: str) -> str:
        """`text` with `[kind]` where something was found."""
        for finding in sorted(self.find(text), key=lambda one: -one.start):
            text = f"{text[: finding.start]}[{finding.kind}]{text[finding.end :]}"
        return text

    def _look(self, text: str) -> Iterator[Finding]:
        for pattern in self._patterns:
            if pattern.hint and not any(hint in text for hint in pattern.hint):
                continue
            for match in pattern.regex.finditer(text):
                if match.end() > match.start() and pattern.accepts(match):
                    yield Finding(pattern.group, pattern.kind, match.start(), match.end())


@dataclass(frozen=True)
class _Pattern:
    group: FindingGroup
    kind: str
    regex: re.Pattern[str]
    accepts: Callable[[re.Match[str]], bool] = lambda match: True
    hint: tuple[str, ...] = ()
    """One of these is in every match: to look for it is many times faster than the pattern."""


def describe_places(places: list[Place]) -> str:
    """The first places, and how many more there are."""
    shown = "; ".join(map(str, places[:MAX_SHOWN]))
    return shown + (f"; and {len(places) - MAX_SHOWN} more" if len(places) > MAX_SHOWN else "")


def _iter_texts(episode: Episode) -> Iterator[tuple[str, str]]:
    for number, message in enumerate(episode.messages):
        yield from _iter_message(f"turn {number} ({message.role})", message)
    yield from ((f"tool schema {number}", _to_text(tool)) for number, tool in enumerate(episode.tools))
    for number, record in enumerate(episode.records):
        where = f"record {number} ({record.kind})"
        for name, value in record.model_dump(mode="python").items():
            if name in ("messages", "response") and isinstance(getattr(record, name), tuple | Message):
                messages = getattr(record, name) if name == "messages" else (getattr(record, name),)
                for turn, message in enumerate(messages):
                    yield from _iter_message(f"{where}, {name} {turn} ({message.role})", message)
            elif value is not None and not isinstance(value, bool | int | float):
                yield f"{where}, {name}", value if isinstance(value, str) else _to_text(value)
    yield "outcome", str(getattr(episode.outcome, "reason", ""))
    names = {
        "task": episode.task_id,
        "group": episode.group_id,
        "scenario": episode.metadata.scenario,
        "strategy": episode.metadata.strategy,
    }
    yield from ((name, value) for name, value in names.items() if value)
    for number, (name, value) in enumerate(sorted(episode.metadata.tags.items())):
        yield f"tag {number}", f"{name}: {value}"


def _iter_message(where: str, message: Message) -> Iterator[tuple[str, str]]:
    if message.content:
        yield f"{where}, content", message.content
    for what, text in (("name", message.name), ("author", message.author), ("id of its call", message.tool_call_id)):
        if text:
            yield f"{where}, {what}", text
    for number, call in enumerate(message.tool_calls):
        if call.id:
            yield f"{where}, call {number}, id", call.id
        yield f"{where}, call {number}, name", call.function.name
        yield f"{where}, call {number}, arguments", call.function.arguments


def _to_text(value: object) -> str:
    return json.dumps(value, ensure_ascii=False, sort_keys=True, default=str)


@cache
def _secret_patterns() -> tuple[_Pattern, ...]:
    """Those of detect-secrets, imported on first use, and ours."""
    from detect_secrets.core.plugins.util import get_mapping_from_secret_type_to_class
    from detect_secrets.plugins.base import RegexBasedDetector

    detectors: dict[str, Any] = get_mapping_from_secret_type_to_class()
    taken = [
        _Pattern("secret", kind, regex, hint=_HINTS.get(kind, ()))
        for kind, detector in sorted(detectors.items())
        if issubclass(detector, RegexBasedDetector) and kind not in _LEFT_OUT
        for regex in detector.denylist
    ]
    return (*taken, *_SECRETS)


def _is_assigned_secret(match: re.Match[str]) -> bool:
    """A value that looks drawn at random: letters and digits, 3 bits a character or more, and no word that says it is none."""
    value = match["value"]
    if not (any(map(str.isdigit, value)) and any(map(str.isalpha, value))) or _PLACEHOLDER.search(value):
        return False
    shares = [count / len(value) for count in Counter(value).values()]
    return -sum(share * math.log2(share) for share in shares) >= 3.0


def _is_no_placeholder(match: re.Match[str]) -> bool:
    return not _PLACEHOLDER.search(match["value"])


def _has_luhn_digit(match: re.Match[str]) -> bool:
    digits = [int(char) for char in match[0] if char.isdigit()]
    doubled = [digit if place % 2 == 0 else sum(divmod(2 * digit, 10)) for place, digit in enumerate(reversed(digits))]
    return len(set(digits)) > 1 and sum(doubled) % 10 == 0


def _has_iban_digits(match: re.Match[str]) -> bool:
    """ISO 13616: the first four to the end, letters as 10 to 35; the whole leaves 1 when divided by 97."""
    iban = match[0].replace(" ", "")
    return 15 <= len(iban) <= 34 and int("".join(str(int(char, 36)) for char in iban[4:] + iban[:4])) % 97 == 1


def _is_public_address(match: re.Match[str]) -> bool:
    """Private, loopback and reserved networks name nobody."""
    try:
        return ipaddress.ip_address(match[0]).is_global
    except ValueError:
        return False


def _has_phone_length(match: re.Match[str]) -> bool:
    return 8 <= sum(char.isdigit() for char in match[0]) <= 15


_PLACEHOLDER = re.compile(r"(?i)example|placeholder|dummy|changeme|redacted|your[_-]?|xxx|\*\*\*|<|\$\{|123456|abcdef")
_LEFT_OUT = {"Public IP (ipv4)", "Basic Auth Credentials", "Private Key"}
"""An address is personal data here; the other two are ours below: theirs take JSON without spaces, and prose, for secrets."""
_HINTS = {"JSON Web Token": ("eyJ",), "Basic Auth Credentials": ("://",), "Slack Token": ("xox", "hooks.slack.com")}

_SECRETS = (
    _Pattern(
        "secret", "private key", re.compile(r"-----BEGIN (?:[A-Z0-9]+ )*PRIVATE KEY(?: BLOCK)?-----[\s\S]{16}"), hint=("PRIVATE KEY",)
    ),
    _Pattern(
        "secret",
        "password in an address",
        re.compile(r"://[^\s/:@\"'<>{}\\]+:(?P<value>[^\s/@\"'<>{}\\]{3,})@[\w.-]+"),
        _is_no_placeholder,
        ("://",),
    ),
    _Pattern(
        "secret",
        "bearer token",
        re.compile(r"\b[Bb]earer\s+(?P<value>[A-Za-z0-9._~+/-]{20,}=*)"),
        _is_assigned_secret,
        ("Bearer", "bearer"),
    ),
    _Pattern("secret", "GitHub token", re.compile(r"\bgithub_pat_[A-Za-z0-9_]{36,}"), hint=("github_pat_",)),
    _Pattern("secret", "OpenAI or Anthropic key", re.compile(r"\bsk-(?:proj|svcacct|ant|or)-[A-Za-z0-9_-]{20,}"), hint=("sk-",)),
    _Pattern("secret", "Google API key", re.compile(r"\bAIza[0-9A-Za-z_-]{35}"), hint=("AIza",)),
    _Pattern("secret", "Hugging Face token", re.compile(r"\bhf_[A-Za-z0-9]{30,}"), hint=("hf_",)),
    _Pattern(
        "secret",
        "assigned secret",
        re.compile(
            r"(?i)(?:api[_-]?key|access[_-]?key|secret[_-]?key|client[_-]?secret|auth[_-]?token|access[_-]?token|password|passwd)"
            r"[\"'\\]{0,4}\s*(?:=>?|:=?)\s*[\"'\\]{0,4}(?P<value>[A-Za-z0-9+/_.~!@#$%^&*-]{12,128})"
        ),
        _is_assigned_secret,
    ),
)
_PERSONAL = (
    _Pattern("personal", "e-mail address", re.compile(r"[\w.+-]+@[\w-]+(?:\.[\w-]+)*\.[^\W\d_]{2,}"), hint=("@",)),
    _Pattern(
        "personal",
        "telephone number",
        re.compile(r"(?<![\w+.-])(?:\+\d[\d ().-]{6,18}\d|\(\d{3}\) ?\d{3}[ -]\d{4}|\d{3}[-.]\d{3}[-.]\d{4})(?![\w-])"),
        _has_phone_length,
    ),
    _Pattern("personal", "IBAN", re.compile(r"\b[A-Z]{2}\d{2}(?: ?[A-Z0-9]{4}){2,7}(?: ?[A-Z0-9]{1,4})?\b"), _has_iban_digits),
    _Pattern(
        "personal",
        "card number",
        re.compile(r"(?<![\w.-])(?<![A-Z]{2}\d{2} )(?:[2-6]\d{3}(?:[ -]?\d{4}){3}|3\d{3}[ -]?\d{6}[ -]?\d{5})(?![\w-]|[ .]\d)"),
        _has_luhn_digit,
    ),
    _Pattern("personal", "US social security number", re.compile(r"(?<![\w-])(?!000|666|9\d\d)\d{3}-(?!00)\d{2}-(?!0000)\d{4}(?![\w-])")),
    _Pattern("personal", "public IP address", re.compile(r"(?<![\w.-])\d{1,3}(?:\.\d{1,3}){3}(?![\w-]|\.\d)"), _is_public_address),
)
