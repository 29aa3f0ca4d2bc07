"""Judges for the tests, pairwise ones as a worker process finds them."""


def shorter(prompts, firsts, seconds):
    """The shorter completion wins; a lean towards whatever is shown first is averaged away."""
    return [0.9 if len(a) < len(b) else 0.5 if len(a) == len(b) else 0.3 for a, b in zip(firsts, seconds, strict=True)]


def knows_columns(prompts, firsts, seconds, target, **columns):
    """Needs a column of the task."""
    assert len(prompts) == len(firsts) == len(seconds) == len(target)
    return [None if int(t) % 2 else 1.0 for t in target]


def too_large(prompts, firsts, seconds):
    """No probability."""
    return [2.0] * len(firsts)


def raises(prompts, firsts, seconds):
    """Fails for every group but those whose first prompt it has seen."""
    raise RuntimeError("the judge is ill")


def plus(completions, **_):
    """Correct is what adds, and nothing else: a rule that the small base meets now and then."""
    return [float("+" in text and "-" not in text) for text in completions]
