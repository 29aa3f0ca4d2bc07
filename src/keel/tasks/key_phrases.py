"""Key phrases of a text, and the text without some of them.

A phrase is a run of words with nothing but spaces between them, broken by stop words and by every other character. As
in RAKE a word's score is its degree (words in the phrases that have it) over its frequency, and a phrase's the sum over
its words.

Source: Rose et al., "Automatic Keyword Extraction from Individual Documents", 2010.
"""

import math
import re
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

WORD = re.compile(r"\w+(?:['’\-]\w+)*")
_STOP_WORDS = """
    a about above after again against all also am an and any are as at be because been before being below between
    both but by can could did do does doing down during each few for from further had has have having he her here hers
    herself him himself his how i if in into is it it's its itself just may me might more most must my myself no nor
    not now of off on once only or other our ours ourselves out over own same shall she should so some such than that
    the their theirs them themselves then there these they this those through to too under until up upon us very was we
    were what when where which while who whom why will with would you your yours yourself yourselves
"""
STOP_WORDS = frozenset(_STOP_WORDS.split())


@dataclass(frozen=True)
class Phrase:
    """A key phrase.

    Args:
        text: its words in lower case, with single spaces.
        score: larger is more of a key.
        spans: beginning and end of every place where it stands.
    """

    text: str
    score: float
    spans: tuple[tuple[int, int], ...]


def key_phrases(text: str, stop_words: frozenset[str] = STOP_WORDS) -> list[Phrase]:
    """All phrases of a text, the highest score first; of equal ones that which comes first.

    >>> [(p.text, p.score) for p in key_phrases("The deep learning of deep linear models is fast.")]
    [('deep linear models', 8.5), ('deep learning', 4.5), ('fast', 1.0)]

    Args:
        text: any.
        stop_words: in lower case; they are in no phrase.
    """
    runs = _runs(text, stop_words)
    frequency: Counter[str] = Counter()
    degree: Counter[str] = Counter()
    places: dict[str, list[tuple[int, int]]] = {}
    for words in runs:
        for word in words:
            frequency[word[0]] += 1
            degree[word[0]] += len(words)
        places.setdefault(" ".join(word[0] for word in words), []).append((words[0][1], words[-1][2]))
    found = [
        Phrase(name, sum(degree[word] / frequency[word] for word in name.split(" ")), tuple(spans))
        for name, spans in places.items()
    ]
    return sorted(found, key=lambda phrase: -phrase.score)


def _runs(text: str, stop_words: frozenset[str]) -> list[list[tuple[str, int, int]]]:
    """Words (lower case, beginning, end) that follow each other with spaces alone between them."""
    runs: list[list[tuple[str, int, int]]] = []
    end = -1  # of the word before, if it is in a phrase
    for match in WORD.finditer(text):
        word = match.group().lower()
        if word in stop_words:
            end = -1
            continue
        joined = end >= 0 and text[end : match.start()].isspace()
        if not joined:
            runs.append([])
        runs[-1].append((word, match.start(), match.end()))
        end = match.end()
    return runs


def without(text: str, spans: Sequence[tuple[int, int]]) -> str:
    """A text without some spans; where spaces would stand on both sides of a gap, or on its edge, one of them goes.

    >>> without("the old cat sat", [(4, 7)])
    'the cat sat'
    """
    for start, end in sorted(spans, reverse=True):
        before, after = text[:start], text[end:]
        if (not before or before[-1].isspace()) and after[:1].isspace():
            after = after[1:]
        elif not after and before[-1:].isspace():
            before = before[:-1]
        text = before + after
    return text


def deleted(count: int, share: float) -> int:
    """round(share * count), halves upwards."""
    return math.floor(share * count + 0.5)
