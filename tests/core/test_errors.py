"""What errors say."""

import math

from keel.core.errors import describe
from keel.parts.rewards.functions import as_numbers


def raised(what):
    """What a call raises."""
    try:
        what()
    except Exception as error:
        return error
    raise AssertionError("nothing was raised")


def test_where_the_code_of_others_failed():
    error = raised(lambda: math.sqrt(-1))
    line = error.__traceback__.tb_next.tb_lineno
    assert describe(error) == f"ValueError: math domain error ({__file__}, line {line})"


def test_what_keel_objects_to_has_no_place():
    said = describe(raised(lambda: as_numbers([1j], 1)))
    assert said.startswith("TypeError: returned complex") and "line" not in said


def test_long_words_are_cut_and_the_place_stays():
    def fail():
        raise RuntimeError("a\nb" * 500)

    assert describe(raised(fail), longest=4).startswith(f"RuntimeError: a ba ({__file__}, line ")
