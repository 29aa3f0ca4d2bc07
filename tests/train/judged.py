"""What the tests of `keel judge` give it, and how they read its files."""

import json

ROWS = [
    {"prompt": "q1", "completions": ["aa", "bbbb"], "topic": "x"},
    {"prompt": "q2", "completions": ["aa", "bb"]},
    {"prompt": "q3", "chosen": "ccc", "rejected": "c"},
    {"prompt": "q4", "chosen": "d", "rejected": "ddd"},
    {"prompt": "q5", "completions": ["e", "eee", "ee"]},
]


def by_length(prompts, completions, **columns):
    return [float(len(text)) for text in completions]


def lines(path) -> list[dict]:
    return [json.loads(line) for line in path.read_text().split("\n")[:-1]]


def apart(path) -> list[dict]:
    return lines(path.with_name(path.name + ".undecided.jsonl"))


def without_key(row: dict) -> dict:
    return {name: value for name, value in row.items() if name != "judged"}
