"""Evaluations whose numbers are known."""

import numpy as np
import pytest

from keel.evaluate.evaluation import Completion, Evaluation, Samples, assess
from keel.report.arms import Arm


def evaluation(solved, *, prompts=40, n=16, entropy=0.5, kl=0.0, texts=("6-3+17",), answers=True) -> Evaluation:
    """Prompt i has exactly `solved(i)` correct samples of n."""
    correct = np.array([[float(j < solved(i)) for j in range(n)] for i in range(prompts)])
    kept = tuple(
        Completion(i, f"prompt {i} <b>&", text, correct[i, 0], text, 6, False) for i in range(3) for text in texts
    )
    return assess(
        Samples(
            correct,
            np.full((prompts, n), 6),
            np.zeros((prompts, n), dtype=bool),
            answers=[[str(j % 4) for j in range(n)] for _ in range(prompts)] if answers else None,
            entropy=np.full((prompts, n), entropy),
            kl=np.full((prompts, n), kl),
            index=tuple(range(prompts)),
            completions=kept,
        )
    )


@pytest.fixture(scope="session")
def wide() -> Evaluation:
    """Half of the samples of every prompt: pass@1 0.5, pass@16 1."""
    return evaluation(lambda i: 7 + i % 3, texts=("6-3+17", "17+3"))


@pytest.fixture(scope="session")
def narrow() -> Evaluation:
    """All samples of three prompts in four: pass@1 = pass@16 = 0.75."""
    return evaluation(lambda i: 16 if i % 4 else 0, entropy=0.1, kl=0.3, texts=("17+6-3", "17-3"))


@pytest.fixture(scope="session")
def halves() -> Evaluation:
    """All samples of every other prompt: pass@1 = pass@16 = 0.5."""
    return evaluation(lambda i: 16 if i % 2 else 0)


@pytest.fixture(scope="session")
def arms(wide, narrow) -> list[Arm]:
    some = evaluation(lambda i: 14 if i % 4 else 1, entropy=0.2, kl=0.1)
    more = evaluation(lambda i: 12 if i % 4 else 1, entropy=0.3, kl=0.05)
    return [
        Arm("base", "before training", wide, None),
        Arm("grpo", "GRPO", narrow, 0.0, 90.0),
        Arm("kl01", "GRPO + KL 0.1", some, 0.1, 95.0),
        Arm("kl03", "GRPO + KL 0.3", more, 0.3, 96.0),
    ]
