"""The report tells what the training will do: whose tokens, which weights, what is lost and what differs."""

from __future__ import annotations

import pytest
from corpus import (
    KTO,
    PAIR,
    SFT,
    SPEAKING,
    WEIGHTED,
    WORKED,
    look,
    look_at,
    look_without_base,
    make_template,
    sample,
    say,
)

from loraloop.chat.rows import build_units


def texts(shown, **wanted) -> list[str]:
    parts = [part for row in shown.rows for part in row.parts]
    return [part.text for part in parts if all(getattr(part, name) == value for name, value in wanted.items())]


def test_the_counts_are_those_of_the_training():
    found = look_at()
    units = build_units(SFT, make_template(), 2048)
    assert found.data == units.report
    assert found.lengths == tuple(len(row.ids) for row in units.rows)
    assert found.failure is None


def test_shares_add_up_to_all_tokens_and_all_that_is_trained_is_the_agents():
    found = look_at()
    shares = {share.author: share for share in found.shares}
    assert sum(share.size for share in found.shares) == sum(found.lengths)
    assert {author for author, share in shares.items() if share.trained} == {"assistant"}
    assert shares["assistant"].trained == found.data.n_supervised_tokens
    assert set(shares) == {"system", "user", "tool", "assistant", "demonstration", "template"}


def test_a_shown_sample_is_the_whole_text_and_its_weights_are_those_of_the_rows():
    template = make_template()
    found = look_at(template=template)
    (first,) = [shown for shown in found.shown if shown.number == 1]
    (unit,) = build_units(SFT[:1], template, 2048).units
    assert "".join(part.text for part in first.rows[0].parts) == unit.rows[0].text
    assert texts(first, weight=1.0) == ['<tool_call>{"name": "look", "arguments": {"box":1}}</tool_call><|im_end|>', "A ball.<|im_end|>"]
    assert first.rows[0].n_trained == unit.rows[0].n_supervised


def test_the_weight_of_a_part_is_that_of_its_turn_times_that_of_its_sample():
    turns = (say("user", "a"), say("assistant", "One.", weight=0.5), say("user", "b"), say("assistant", "Two."))
    found = look_at((sample(*turns, kind="weighted", weight=-0.5),), "weighted")
    assert texts(found.shown[0], weight=-0.25) == ["One.<|im_end|>"]
    assert texts(found.shown[0], weight=-0.5) == ["Two.<|im_end|>"]


def test_both_sides_of_a_pair_are_shown_and_what_they_share_is_told():
    found = look_at(PAIR, "dpo")
    better, worse = found.shown[0].rows
    assert (better.side, worse.side) == ("better", "worse")
    for row, words in ((better, "Well chosen.<|im_end|>"), (worse, "Badly chosen.<|im_end|>")):
        shared = "".join(part.text for part in row.parts if part.is_shared)
        assert shared == "<|im_start|>user\nChoose<|im_end|>\n<|im_start|>assistant\n"
        assert [part.text for part in row.parts if part.weight] == [words]
    assert found.shown[0].episodes == ("ep-1", "ep-9")


def test_of_kto_one_desirable_and_one_undesirable_sample_are_among_the_first_two():
    found = look_at(KTO, "kto", n_show=2)
    assert {shown.rows[0].side for shown in found.shown} == {"desirable", "undesirable"}
    assert found.kinds == {"kto desirable": 2, "kto undesirable": 4}


def test_without_a_base_model_roles_and_characters_are_told_and_no_tokens():
    found = look_without_base()
    assert (found.base, found.data, found.template, found.drift) == (None, None, None, None)
    shares = {share.author: share for share in found.shares}
    assert shares["system"].size == len("Be §brief§.")
    assert {author for author, share in shares.items() if share.trained} == {"assistant"}
    assert shares["demonstration"].size == len("Shown.")
    assert any("a ball" in text for text in texts(next(shown for shown in found.shown if shown.number == 1), author="tool"))


def test_the_shown_samples_do_not_depend_on_the_order_of_the_file():
    one, other = look_at(KTO, "kto", n_show=3), look_at(tuple(reversed(KTO)), "kto", n_show=3)
    assert [shown.episodes for shown in one.shown] == [shown.episodes for shown in other.shown]


def test_words_that_the_template_adds_itself_are_told():
    found = look_at(template=make_template(SPEAKING))
    assert found.template.own_words == "You are Tiny, made for tests."
    assert found.drift.template_speaks == 1  # one of the two samples has a system turn of its own
    assert look_at().template.own_words == ""


def test_what_goes_through_the_fallback_is_told():
    found = look_at()
    assert (found.template.tools_by, found.template.calls_by, found.template.results_by) == ("fallback", "fallback", "template")
    assert (found.drift.tools_in_system_turn, found.drift.calls_as_text, found.drift.results_as_user) == (1, 1, 0)
    assert (found.data.tools_recorded, found.data.tools_rendered) == (1, 1)


def test_calls_without_recorded_tools_are_told():
    found = look_at((sample(*WORKED),))
    assert found.drift.tools_not_recorded == 1
    assert look_at().drift.tools_not_recorded == 0


def test_trained_words_that_the_template_trims_are_told():
    trimming = "{% for m in messages %}{{ '<|im_start|>' + m.role + '\n' + m.content | trim + '<|im_end|>\n' }}{% endfor %}"
    trimming += "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
    padded = (sample(say("user", "a"), say("assistant", "  padded")),)
    assert look_at(padded, template=make_template(trimming)).drift.turns_reworded == 1
    assert look_at(padded).drift.turns_reworded == 0


def test_a_template_that_writes_the_date_is_told():
    dated = "{{ strftime_now('%Y') }}" + SPEAKING
    assert look_at(template=make_template(dated)).template.is_dated
    assert not look_at().template.is_dated


def test_windows_and_cuts_and_refusals_are_counted():
    long = tuple(turn for number in range(8) for turn in (look(), say("tool", f"{number}" * 400)))
    data = (sample(say("user", "Task"), *long, say("assistant", "Done.")), *SFT)
    assert look_at(data, max_length=1500).data.windowed == 1
    cut = look_at(data, max_length=3000, long="elide")
    assert (cut.data.windowed, cut.data.elided) == (0, 1)
    assert cut.data.characters_elided > 500
    refused = look_at(data, max_length=1500, long="refuse")
    assert refused.data.refused == {"too_long": 1}
    assert "1500" in refused.refusals["too_long"][0]


def test_a_template_that_changes_earlier_turns_is_told_with_samples_and_rows():
    last_thinks = (
        "{% for m in messages %}{{ '<|im_start|>' + m.role + '\n' + ('<t>' if loop.last and m.role == 'assistant' else '') + m.content"
        " + '<|im_end|>\n' }}{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
    )
    turns = [say("user", "a"), say("assistant", "1"), say("user", "b"), say("assistant", "2"), say("user", "c"), say("assistant", "3")]
    found = look_at((sample(*turns), sample(*turns[:2], number=2)), template=make_template(last_thinks))
    assert (found.data.prefix_broken, found.data.prefix_broken_rows, found.data.rows) == (1, 3, 4)
    assert "renders earlier turns otherwise" in found.shown[0].rows[0].note + found.shown[-1].rows[0].note


def test_data_that_a_training_would_stop_on_is_a_finding_with_the_reason():
    found = look_at((sample(say("user", "a"), say("assistant", "b", is_demo=True)),))
    assert "no_agent_turn" in found.failure
    assert found.shares == ()
    stopless = "{% for m in messages %}{{ m.role + ': ' + m.content + '\n' }}{% endfor %}"
    assert "learn to stop" in look_at(template=make_template(stopless)).failure


def test_weights_are_those_of_the_samples():
    assert look_at(WEIGHTED, "weighted").weights == (1.0, 0.25, -0.5)


@pytest.mark.parametrize(
    ("written", "shown"),
    [
        ("\x1b[31mred\x1b[0m", "␛[31mred␛[0m"),
        ("a\x00b\rc", "a␀b␍c"),
        ("x\u202ey", "x⟨U+202E⟩y"),
        ("\x9b1m", "⟨U+009B⟩1m"),
        ("é☕\n\t", "é☕\n\t"),
    ],
)
def test_what_a_terminal_would_act_on_is_shown_as_a_sign(written, shown):
    found = look_at((sample(say("user", f"<{written}>"), say("assistant", "b")),))
    assert f"<{shown}>" in texts(found.shown[0], author="user")
