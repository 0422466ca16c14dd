"""The page holds everything and fetches nothing, and what an episode says stays text in it."""

from __future__ import annotations

import re
from html.parser import HTMLParser

import pytest
from corpus import KTO, PAIR, SFT, WEIGHTED, look_at, look_without_base, sample, say

from loraloop.data_report.page import to_html

HOSTILE = '</pre><script>alert(1)</script><img src="https://evil.example/x" onerror="alert(2)">"\' {{ 7 * 7 }} {% raw %} javascript:x'


class Page(HTMLParser):
    """Every element with its attributes, and the text of `pre`."""

    def __init__(self, html: str) -> None:
        super().__init__()
        self.elements: list[tuple[str, dict[str, str | None]]] = []
        self.pre: list[str] = []
        self.stack: list[str] = []
        self.feed(html)
        self.close()

    def handle_starttag(self, tag, attrs):
        self.elements.append((tag, dict(attrs)))
        if tag not in {"meta", "br", "use", "path"}:
            self.stack.append(tag)
        if tag == "pre":
            self.pre.append("")

    def handle_startendtag(self, tag, attrs):
        self.elements.append((tag, dict(attrs)))

    def handle_endtag(self, tag):
        if tag in self.stack:
            assert self.stack.pop() == tag

    def handle_data(self, data):
        if self.stack[-1:] == ["pre"]:
            self.pre[-1] += data


def check_inert(html: str) -> Page:
    page = Page(html)
    tags = {tag for tag, _ in page.elements}
    assert not tags & {"script", "iframe", "object", "embed", "link", "base", "form", "img", "foreignobject", "a", "audio", "video"}
    for tag, attributes in page.elements:
        assert not [name for name in attributes if name.startswith("on")], tag
        for name in ("href", "src", "xlink:href", "srcset", "action", "data"):
            assert (attributes.get(name) or "#").startswith("#"), (tag, attributes)
        assert "url(" not in (attributes.get("style") or "").replace("url(#", "")
    policy = next(attributes for tag, attributes in page.elements if tag == "meta" and attributes.get("http-equiv"))
    assert policy["content"].startswith("default-src 'none'")
    assert not re.search(r"@import|url\((?!#)", html)
    return page


@pytest.mark.parametrize(
    ("samples", "method"), [(SFT, "sft"), (WEIGHTED, "weighted"), (PAIR, "dpo"), (KTO, "kto")], ids=["sft", "weighted", "dpo", "kto"]
)
def test_the_page_of_every_method_is_whole_and_refers_to_nothing_outside(samples, method):
    found = look_at(samples, method, refused={"outcome_failure": 3})
    html = to_html(found)
    page = check_inert(html)
    assert page.stack == []
    assert not re.search(r"\w+://|<metadata|<\?xml", html)
    assert html.count("<!DOCTYPE") == 1
    assert html.count("<svg") >= 3
    assert "outcome_failure" in html
    for share in found.shares:
        assert f"<td>{share.author}</td>" in html
    shown = [part.text for sample_ in found.shown for row in sample_.rows for part in row.parts]
    assert [text.removeprefix("\n") for text in page.pre] == list(shown)


def test_a_page_without_a_base_model_says_what_one_would_add():
    html = to_html(look_without_base())
    check_inert(html)
    assert "--base" in html


def test_script_and_markup_in_an_episode_are_text():
    turns = (say("system", HOSTILE), say("user", HOSTILE), say("assistant", HOSTILE))
    found = look_at((sample(*turns),), refused={HOSTILE: 1, "$x^{2$": 2})
    page = check_inert(to_html(found))
    assert sum(HOSTILE in text for text in page.pre) == 3
    check_inert(to_html(look_without_base((sample(*turns),))))


def test_the_same_findings_give_the_same_bytes():
    assert to_html(look_at()) == to_html(look_at())


def test_words_in_plots_take_the_colour_of_the_page():
    html = to_html(look_at())
    assert "currentColor" in html
    assert "#123457" not in html
    assert "color-scheme: light dark" in html


def test_a_failure_stands_at_the_top():
    html = to_html(look_at((sample(say("user", "a"), say("assistant", "b", is_demo=True)),)))
    check_inert(html)
    assert html.index("A training would stop at once") < html.index("<h2>")


def test_long_parts_are_cut_with_the_number_of_characters():
    html = to_html(look_at((sample(say("user", "x" * 50_000), say("assistant", "b")),), max_length=60_000))
    assert "… 30,000 characters more …" in html
    assert len(html) < 200_000
