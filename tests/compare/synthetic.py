"""Comparisons made up from known parts: abilities of prompts, luck of seeds, and draws of completions."""

from collections.abc import Mapping, Sequence

import numpy as np

from keel.compare.outcomes import Arm, Budget, Comparison, Outcome

KS = (1, 2, 4, 8, 16)


def answers(
    rng: np.random.Generator,
    shape: tuple[int, int, int],
    samples: int = 16,
    better: float = 0.0,
    seeds: float = 0.05,
    prompts: float = 0.4,
    rest: float = 0.6,
    base: np.ndarray | None = None,
) -> np.ndarray:
    """Correct answers among the samples of each prompt, [R, S, P]: repetitions, seeds, prompts.

    On the scale of log-odds: the ability of a prompt (`base`, shared by arms; 1.5), what the arm adds to all of them
    (`better`), and the standard deviations of what seeds, prompts, and both together change in this arm.
    """
    repetitions, count, size = shape
    if base is None:
        base = rng.normal(-0.3, 1.5, (repetitions, 1, size))
    luck = rng.normal(0, seeds, (repetitions, count, 1)) + rng.normal(0, prompts, (repetitions, 1, size))
    odds = base + better + luck + rng.normal(0, rest, shape)
    return rng.binomial(samples, 1 / (1 + np.exp(-odds)))


def synthetic(
    arms: Mapping[str, float] | Sequence[str] = ("grpo", "kl_cov"),
    seeds: int = 3,
    prompts: int = 100,
    samples: int = 16,
    seed: int = 0,
    steps: int = 40,
    spread: float = 0.05,
    unlike: bool = True,
) -> Comparison:
    """A comparison with known differences.

    Args:
        arms: what each adds to the log-odds of a correct answer.
        seeds, prompts, samples: numbers of each.
        seed: of all that is drawn.
        steps: of the curves.
        spread: of seeds, in log-odds.
        unlike: KL and entropy differ between arms, too.
    """
    rng = np.random.default_rng(seed)
    adds = dict(arms) if isinstance(arms, Mapping) else dict.fromkeys(arms, 0.0)
    base = rng.normal(-0.3, 1.5, (1, 1, prompts))
    first = rng.binomial(samples, 1 / (1 + np.exp(1.2 - base)))[0, 0]
    outcomes = []
    for place, (name, better) in enumerate(adds.items()):
        correct = answers(rng, (1, seeds, prompts), samples, better, spread, base=base)[0]
        apart = place if unlike else 0
        for run in range(seeds):
            values = _values(correct[run], samples)
            values["kl"] = rng.gamma(4.0, 0.01 * (1 + 0.4 * apart), prompts)
            values["entropy"] = rng.gamma(20.0, (0.4 - 0.03 * apart) / 20, prompts)
            values["completions/mean_length"] = rng.normal(40 + 2 * apart, 5, prompts)
            before = _values(first, samples) | {"kl": np.zeros(prompts), "entropy": np.full(prompts, 0.6)}
            before["completions/mean_length"] = np.full(prompts, 41.0)
            outcomes.append(
                Outcome(
                    name,
                    run,
                    "finished",
                    f"cell-{name}-{run}",
                    values=values,
                    before=before,
                    curves=_curves(rng, steps, values),
                    tokens=steps * 1000 + 10 * run,
                    seconds=60.0 + place,
                    steps=steps,
                )
            )
    return Comparison(
        name="made-up",
        arms=tuple(Arm(name, name.split(" ")[0]) for name in adds),
        seeds=tuple(range(seeds)),
        task="countdown",
        model="tiny",
        budget=Budget(float(steps), "steps"),
        outcomes=tuple(outcomes),
        created=1.7e9,
    )


def _values(correct: np.ndarray, samples: int) -> dict[str, np.ndarray]:
    from keel.evaluate.pass_at_k import pass_at_k

    counts = np.full(len(correct), samples)
    return {f"pass@{k}": pass_at_k(counts, correct, k) for k in KS if k <= samples}


def _curves(rng: np.random.Generator, steps: int, last: Mapping[str, np.ndarray]) -> dict[str, list[tuple[int, float]]]:
    course = 1 - np.exp(-np.arange(1, steps + 1) / (steps / 4))
    ends = {
        "reward": (0.2, last["pass@1"].mean(), 0.03),
        "entropy": (0.6, last["entropy"].mean(), 0.01),
        "kl": (0.0, last["kl"].mean(), 0.002),
        "completions/mean_length": (41.0, last["completions/mean_length"].mean(), 1.0),
    }
    found = {
        name: begin + (end - begin) * course + rng.normal(0, noise, steps) for name, (begin, end, noise) in ends.items()
    }
    found["num_tokens"] = np.cumsum(rng.normal(1000, 20, steps))
    found["seconds"] = np.cumsum(rng.normal(1.5, 0.1, steps))
    return {name: [(step + 1, float(v)) for step, v in enumerate(column)] for name, column in found.items()}
