"""The page holds all that was measured, fetches nothing, and what a model said stays text in it."""

from __future__ import annotations

from html.parser import HTMLParser
from pathlib import Path

from loraloop.evaluate.report import to_html
from loraloop.evaluate.result import Comparison, Evaluation, EvaluationPlan, Side, TaskScore, judge
from loraloop.evaluate.suite import Play, Plays

HOSTILE = '</pre><script>alert(1)</script><img src="https://evil.example/x" onerror="alert(2)">{{ 7 * 7 }} $x_1$'


class Tags(HTMLParser):
    def __init__(self) -> None:
        super().__init__()
        self.tags: set[str] = set()
        self.attributes: list[tuple[str, str | None]] = []
        self.text: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.add(tag)
        self.attributes += attrs

    def handle_data(self, data: str) -> None:
        self.text.append(data)


def make_evaluation() -> Evaluation:
    won = [TaskScore(task=f"task {n}", candidate=1.0, opponent=float(n % 3 == 0)) for n in range(30)]
    lost = [TaskScore(task=HOSTILE, candidate=0.0, opponent=1.0)]
    primary = Comparison.of(f"counting: success {HOSTILE}", [*won, *lost])
    loss = Comparison.of(
        "loss per token",
        [TaskScore(task="a", candidate=1.5, opponent=1.25), TaskScore(task="b", candidate=1, opponent=2)],
        higher_is_better=False,
    )
    plan = EvaluationPlan(
        candidate=Side(name="lora-1", adapter_sha256="ab" * 32), opponent=Side(name="base"), environment="counting", n_tasks=31
    )
    return Evaluation(id=plan.id, plan=plan, comparisons=(primary, loss), notes=("a note",), verdict=judge(primary))


def test_the_page_shows_all_and_runs_nothing(tmp_path: Path) -> None:
    evaluation = make_evaluation()
    plays = Plays(tmp_path)
    for side, reward in (("candidate", 0.0), ("opponent", 1.0)):
        messages = ({"role": "user", "content": "begin"}, {"role": "assistant", "content": f"{side} says {HOSTILE}"})
        plays.add(Play(side=side, task=HOSTILE, seed=0, reward=reward, n_turns=1, finished=True, messages=messages))  # type: ignore[arg-type]
    page = to_html(evaluation, tmp_path)
    assert page == to_html(evaluation, tmp_path), "the same bytes for the same evaluation"
    found = Tags()
    found.feed(page)
    assert not found.tags & {"script", "iframe", "object", "embed", "link", "base", "form", "img", "foreignobject", "a"}
    assert not [name for name, _ in found.attributes if name.startswith("on")]
    assert "https://" not in " ".join(value or "" for _, value in found.attributes)
    assert "svg" in found.tags
    text = " ".join(found.text)
    assert f"candidate says {HOSTILE}" in text
    for words in ("task 29", "a note", "promote", "less is better", evaluation.id, "abababababab"):
        assert words in text, words


def test_where_less_is_better_more_is_a_loss() -> None:
    loss = make_evaluation().get_comparison("loss per token")
    assert (loss.wins, loss.losses, [one.task for one in loss.regressions]) == (1, 1, ["a"])
    assert judge(loss) is None
