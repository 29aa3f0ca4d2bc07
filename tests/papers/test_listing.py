"""Every form of listing is read to the values that stand on it, and what cannot be read is reported with its line."""

import json
from datetime import date
from pathlib import Path

import pytest
from tests.papers import pages

from keel.core.errors import DataError
from keel.papers.listing import Entry, Problem, parse_date, parse_page, read_page


def test_atom_of_arxiv() -> None:
    page = parse_page(pages.ATOM)
    assert page.entries == (
        Entry(
            "Tilted Rewards for Language Models",
            "We tilt rewards & measure the entropy.",
            ("Ada Lovelace", "Alan Turing"),
            date(2026, 1, 2),
            "12 pages",
            ("http://arxiv.org/abs/2601.00001v2",),
            place=4,
        ),
    )
    assert page.problems == (Problem(18, "an entry without a title: Nobody named this."),)


def test_a_listing_of_arxiv_dates_each_entry_by_its_heading() -> None:
    page = parse_page(pages.LISTING)
    first, last = page.entries
    assert first == Entry(
        "Entropy at the Edge: $\\beta$ < 1",
        "We look at the edge.",
        ("Grace Hopper", "Mary Shelley"),
        date(2026, 1, 8),
        "9 pages, ICML",
        ("https://arxiv.org/abs/2601.03001",),
        place=7,
    )
    assert last.title == "The Entropy Mechanism of reinforcement learning for reasoning language models!"
    assert (last.date, last.links, last.authors) == (date(2026, 1, 9), ("https://arxiv.org/abs/2601.03003",), None)
    assert page.problems == (Problem(15, "an entry without a title: An abstract that lost its title."),)


def test_results_of_a_search_at_arxiv() -> None:
    (entry,) = parse_page(pages.RESULTS).entries
    assert (entry.title, entry.abstract) == ("Mirror Descent Again", "The whole abstract.")
    assert (entry.date, entry.comments) == (date(2025, 1, 13), "3 figures")
    assert entry.authors == ("Ada Lovelace", "Alan Turing")
    assert entry.links == ("https://arxiv.org/abs/2501.07001",)


def test_daily_papers_from_the_data_of_the_page() -> None:
    (entry,) = parse_page(pages.PROPS).entries
    assert (entry.title, entry.abstract, entry.authors) == ("Agents & Rewards", "Agents learn.", ("Ada Lovelace",))
    assert (entry.date, entry.comments, entry.organisation) == (date(2026, 2, 3), 4, "Analytical Engines")
    assert entry.links == ("https://arxiv.org/abs/2602.00007",)


def test_daily_papers_from_their_cards() -> None:
    page = parse_page(pages.CARDS)
    (entry,) = page.entries
    assert (entry.title, entry.authors, entry.comments) == ("Cards Without Data", 8, 2)
    assert (entry.date, entry.links) == (date(2026, 2, 5), ("https://arxiv.org/abs/2602.00011",))
    assert page.problems == (Problem(6, "an entry without a title: https://arxiv.org/abs/2602.00012"),)


def test_a_list_with_links_and_without_end_tags() -> None:
    page = parse_page(pages.LINKS)
    wild, reviews = page.entries
    assert (wild.title, wild.date, wild.place) == ("Rewards in the Wild", date(2025, 11, 4), 2)
    assert wild.links == ("https://arxiv.org/pdf/2511.02001",)
    assert (reviews.title, reviews.date) == ("Open Reviews of Policy Gradients", date(2025, 11, 5))
    assert page.problems == (Problem(5, "a link to a paper without a title: pdf"),)


def test_the_page_of_one_paper() -> None:
    (entry,) = parse_page(pages.ONE).entries
    assert (entry.title, entry.abstract, entry.date) == ("One Paper Alone", "Alone it stands.", date(2025, 4, 9))
    assert (entry.authors, entry.links) == (("Ada Lovelace", "Alan Turing"), ("https://arxiv.org/abs/2504.00042",))


def test_a_mail_of_arxiv() -> None:
    page = parse_page(pages.MAIL)
    first, second = page.entries
    assert (first.title, first.abstract) == (
        "Mirror Prox for Preferences",
        "We use mirror prox to reach an equilibrium.",
    )
    assert first.authors == ("Ada Lovelace", "Alan Turing", "Grace Hopper")
    assert (first.date, first.comments, first.place) == (date(2026, 1, 5), "20 pages", 4)
    assert (second.title, second.date, second.links) == (
        "A Second One Here",
        None,
        ("https://arxiv.org/abs/2601.05002",),
    )
    assert page.problems == (Problem(18, "a date that cannot be read, left out: soon"),)


def test_fields_in_plain_text() -> None:
    page = parse_page(pages.FIELDS)
    first, second = page.entries
    assert first == Entry(
        "Rewards by Mail",
        "A text of two lines.",
        ("Ada Lovelace", "Alan Turing"),
        date(2026, 2, 1),
        3,
        ("https://arxiv.org/abs/2602.09001",),
        place=1,
    )
    assert (second.title, second.links, second.place) == ("No Date Here", (), 9)
    assert page.problems == (
        Problem(9, "a link that cannot be read, left out: javascript:alert(1)"),
        Problem(12, "an entry without a title: Lost its head."),
    )


def test_records_that_begin_with_another_field_stay_apart() -> None:
    page = parse_page("Date: 2026-01-01\nTitle: First Paper\n\nDate: 2026-01-02\nTitle: Second Paper\n")
    assert [(e.title, str(e.date)) for e in page.entries] == [
        ("First Paper", "2026-01-01"),
        ("Second Paper", "2026-01-02"),
    ]


def test_items_of_a_list_in_plain_text() -> None:
    page = parse_page(pages.ITEMS)
    assert [(e.title, str(e.date), e.links) for e in page.entries] == [
        ("Regularised Policies", "2025-12-01", ("https://arxiv.org/abs/2512.01001",)),
        ("Flow Matching Twice", "2025-12-03", ("https://arxiv.org/abs/2512.01002",)),
    ]
    assert page.problems == (Problem(5, "a list item without the link of a paper: buy milk"),)


def test_a_table() -> None:
    page = parse_page(pages.TABLE)
    (entry,) = page.entries
    assert (entry.title, entry.authors, entry.date) == ('A "Quoted" Title', 3, date(2026, 1, 15))
    assert entry.links == ("https://a.org", "https://b.org")
    assert page.problems == (Problem(3, "2 columns in place of 5: 2\t2026"),)


def test_json_of_daily_papers() -> None:
    data = [{"paper": {"id": "2602.1", "title": "T one", "summary": "S", "authors": []}, "numComments": 0}]
    (entry,) = parse_page(json.dumps(data)).entries
    assert (entry.title, entry.comments, entry.links) == ("T one", 0, ())
    assert parse_page("[{]").problems[0].what.startswith("JSON that cannot be read")


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("", "holds no paper"),
        ("A shopping list:\n- milk\n- bread and butter\n", "holds no paper"),
        ("<html><body><p>Hello <a href='https://example.org'>there you all</a></p></body></html>", "holds no paper"),
        ("<feed xmlns='http://www.w3.org/2005/Atom'><entry>", "XML that cannot be read"),
        ("<ul><li><a href='https://arxiv.org/abs/2511.02003'>pdf</a></ul>", "without a title: pdf"),
        ("[]", "holds no paper"),
    ],
)
def test_a_file_without_a_paper_is_an_error_that_says_what_was_looked_for(text: str, said: str, tmp_path: Path) -> None:
    file = tmp_path / "page.html"
    file.write_text(text)
    with pytest.raises(DataError) as error:
        read_page(file)
    assert said in str(error.value) and "Looked for: arXiv listings" in str(error.value)
    assert str(file) in str(error.value)


def test_files_that_are_no_text(tmp_path: Path) -> None:
    file = tmp_path / "page.pdf"
    file.write_bytes(b"%PDF\xff\xfe")
    with pytest.raises(DataError, match="cannot be read as text"):
        read_page(file)
    with pytest.raises(DataError, match="cannot be read as text"):
        read_page(tmp_path / "missing.html")
    file.write_bytes(b"\xef\xbb\xbf" + pages.ITEMS.encode())
    assert len(read_page(file).entries) == 2, "a mark of the byte order is no text"


def test_scripts_and_control_characters_never_reach_a_title() -> None:
    (entry,) = parse_page(
        '<ul><li><a href="https://arxiv.org/abs/2511.1">'
        "A \x1b[31mred \x00 title<script>evil()</script> &#7; here</a></ul>"
    ).entries
    assert entry.title == "A [31mred title here"


@pytest.mark.parametrize(
    ("text", "found"),
    [
        ("2025-01-15T10:00:00Z", date(2025, 1, 15)),
        ("Wed, 15 Jan 2025", date(2025, 1, 15)),
        ("15th January, 2025", date(2025, 1, 15)),
        ("January 15, 2025", date(2025, 1, 15)),
        ("2025/1/5", date(2025, 1, 5)),
        ("Version 12 May 2024, first 3 May 2024", date(2024, 5, 12)),
        ("2025-02-30", None),
        ("12 Pages 2025", None),
        ("May 2025", None),
    ],
)
def test_dates(text: str, found: date | None) -> None:
    assert parse_date(text) == found
