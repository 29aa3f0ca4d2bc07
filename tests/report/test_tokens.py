"""Completions token by token: what the numbers are called, what is much, and that nothing is lost without colour."""

import json
import math
import re

import numpy as np
import pytest
from rich.console import Console
from tests.report.test_pages import Elements, stored

from keel.core.errors import UserError
from keel.report.run import RunData, report
from keel.report.tokens import Scale, chosen, pick, quantities, visible
from keel.report.tokens_page import token_section, write_tokens
from keel.report.tokens_terminal import coloured, describe, listing, number_table
from keel.store.records import StoredRollout

NAN = math.nan
ODD = StoredRollout(
    "say <b>hi</b>",
    "x",
    1.0,
    tokens=("Hi", " ", "\n\n", "\x1b[31m", "", "é", "</script>", "42", "<eos>"),
    numbers={
        "entropy": np.array([0.5, 1.0, 0.0, 2.0, 0.1, 0.1, 0.1, NAN, 0.25], dtype="f4"),
        "advantage": np.array([-1.5] * 7 + [NAN, -1.5], dtype="f4"),
        "weight/cap": np.array([1.0, 0.5, 2.0, 1.0, 1.0, 1.0, 1.0, NAN, 1.0], dtype="f4"),
        "term/cap": np.array([0.0] * 7 + [NAN, 0.25], dtype="f4"),
        "log_prob": np.array([-1.0, -math.inf] + [-0.5] * 5 + [NAN, -2.0], dtype="f4"),
        "chosen": np.array([1.0] * 7 + [0.0, 1.0], dtype="f4"),
        "vectors": np.zeros((9, 2), dtype="f4"),
    },
    length=8,
    step=3,
    id=7,
)


def printed(rollout, name, width=40, **options):
    console = Console(force_terminal=True, color_system="truecolor", width=width, record=True, **options)
    with console.capture() as capture:
        (quantity,) = pick(quantities(rollout), [name])
        console.print(coloured(rollout, quantity, width), soft_wrap=True)
    return capture.get()


def plain(text):
    return re.sub(r"\x1b\[[\d;]*m", "", text)


def test_what_is_known_and_what_it_is_called():
    known = quantities(ODD)
    assert [q.name for q in known] == ["entropy", "advantage", "log_prob", "weight/cap", "term/cap"]
    assert [q.name for q in pick(known, None)] == ["entropy", "advantage", "weight/cap"]
    assert [q.name for q in pick(known, ["cap"])] == ["weight/cap", "term/cap"]
    assert [q.name for q in pick(known, ["term/cap", "entropy", "entropy"])] == ["term/cap", "entropy"]
    with pytest.raises(UserError, match=r"no number per token named 'entrop'. Did you mean 'entropy'.*weight/cap"):
        pick(known, ["entrop"])
    assert describe(known[0]) == "entropy of the policy at the token: 0 to 2 (nats)"
    assert describe(known[1]) == "advantage: -1.5 to -1.5, neutral at 0"
    assert chosen(ODD).tolist() == [True] * 7 + [False, True]


def test_how_much_is_much():
    weights = Scale.of([np.array([0.5, 2.0, NAN, math.inf])], centre=1.0)
    assert (weights.low, weights.high) == (0.0, 2.0)
    assert [weights.share(v) for v in (1.0, 2.0, 0.5, math.inf, -math.inf, NAN)] == [0.0, 1.0, -0.5, 1.0, -1.0, 0.0]
    entropy = Scale.of([np.array([0.5, 2.0])], centre=None)
    assert (entropy.low, entropy.share(0.5)) == (0.0, 0.25)
    nothing = Scale.of([np.array([NAN])], centre=None)
    assert nothing.share(3.0) == 0.0


@pytest.mark.parametrize(
    ("token", "shown"),
    [
        ("\n", "↵"),
        ("\t", "⇥"),
        (" a", " a"),
        ("  ", "··"),
        ("\r", "␍"),
        ("\x00", "␀"),
        ("\u202e", "⟨202e⟩"),
        ("\x9b", "⟨9b⟩"),
        ("", "⋯"),
        ("é漢", "é漢"),
    ],
)
def test_every_token_can_be_seen_and_none_does_anything(token, shown):
    assert visible(token) == shown


def test_colours_say_how_much():
    said = printed(ODD, "entropy")
    assert plain(said).splitlines()[0] == "entropy  entropy of the policy at the token: 0 to 2 (nats)"
    assert "\x1b[38;2;255;255;255;48;2;27;100;168m␛[31m\x1b[0m" in said  # 2 nats, the most: the strongest colour
    assert "\x1b[38;2;27;31;36;48;2;132;183;232m·\x1b[0m" in said  # 1 nat is half: round(1.5) = 2 of 3
    assert "\x1b[2;3m42\x1b[0m" in said  # the tool's token is grey
    assert "\x1b[31m" not in said  # what the model wrote does not colour the terminal
    weights = printed(ODD, "weight/cap")
    assert "48;2;242;168;115" in weights and "48;2;27;100;168" in weights  # 0.5 is below 1, 2 above


def test_lines_are_wrapped_between_tokens():
    many = StoredRollout("p", "c", 1.0, tokens=("abcde",) * 30, numbers={"entropy": np.ones(30, "f4")}, length=30)
    lines = plain(printed(many, "entropy", width=23)).splitlines()[2:]
    assert [line for line in lines if line] == ["abcde" * 4] * 7 + ["abcde" * 2]
    long = StoredRollout("p", "c", 1.0, tokens=("x" * 50,), numbers={"entropy": np.ones(1, "f4")}, length=1)
    lines = plain(printed(long, "entropy", width=20)).splitlines()[2:]
    assert "".join(lines) == "x" * 50 and max(map(len, lines)) <= 20


def test_the_table_has_the_same_numbers():
    lines = number_table(ODD, pick(quantities(ODD), None)).splitlines()
    assert lines[0].split() == ["token", "entropy", "advantage", "weight/cap"]
    assert [line.split() for line in lines[1:4]] == [
        ["1", "Hi", "0.5", "-1.5", "1"],
        ["2", "·", "1", "-1.5", "0.5"],
        ["3", "↵↵", "0", "-1.5", "2"],
    ]
    assert lines[8].split() == ["8", "42", "(tool)"] and "\x1b" not in "".join(lines)
    narrow = number_table(ODD, quantities(ODD), width=34).split("\n\n")
    assert len(narrow) > 1 and all(len(line) <= 34 for block in narrow for line in block.splitlines())
    assert all(len(block.splitlines()) == 10 for block in narrow)


def test_a_list_of_completions():
    lines = listing([ODD, StoredRollout("p", "y\n" * 100, NAN, length=100, step=12, id=8)]).splitlines()
    assert lines[1].split() == ["7", "3", "1", "8", "x"]
    assert lines[2].split()[:4] == ["8", "12", "-", "100"] and lines[2].endswith("…") and len(lines) == 3


def test_the_page_holds_every_number_and_nothing_breaks_out(tmp_path):
    page = write_tokens(stored(), [ODD], tmp_path / "tokens.html").read_text()
    found = Elements(page)
    spans = [a for tag, a in found.found if tag == "span" and "data-v" in a]
    assert len(spans) == 8
    assert [float(a["data-v"].split(",")[0]) for a in spans] == pytest.approx([0.5, 1, 0, 2, 0.1, 0.1, 0.1, 0.25])
    assert [a for tag, a in found.found if tag == "span" and a.get("class") == "tool"]
    assert "</script>" in found.text and "say <b>hi</b>" in found.text
    assert "\x1b" not in page and page.count("<script") == page.count("</script>")
    about = json.loads(re.search(r'id="quantities">(.*?)</script>', page)[1])
    assert [q["name"] for q in about] == ["entropy", "advantage", "weight/cap", "log_prob", "term/cap"]
    assert about[0] == {
        "name": "entropy",
        "says": "entropy of the policy at the token",
        "unit": "nats",
        "low": 0.0,
        "high": 2.0,
        "centre": None,
    }
    assert all(key not in a for _, a in found.found for key in ("src", "onclick"))


def test_the_report_of_a_run_shows_them_too():
    page = Elements(report(RunData(stored(), {}, rollouts=[ODD])))
    assert "Training, token by token" in page.text and "keel explain first" in page.text
    assert "token by token" not in Elements(report(RunData(stored(), {}))).text


def test_without_tokens(tmp_path):
    bare = StoredRollout("p", "c", 1.0, length=1, id=4)
    with pytest.raises(UserError, match="Rollout 4 cannot be explained: its tokens were not stored"):
        quantities(bare)
    with pytest.raises(UserError, match="no tokens are stored"):
        write_tokens(stored(), [bare], tmp_path / "x.html")
    assert token_section([]) == ""
