"""The checks of a diagnosis: each knows one symptom in the metrics, and says its number and what would change it."""

from __future__ import annotations

import math
from collections.abc import Iterator
from statistics import fmean, variance

from keel.report.entropy_tokens import in_words
from keel.report.findings import FEW, Finding, Level, Run, above, below, count, entries, short

TIED = (0.5, 0.8)  # share of groups with equal rewards: a warning, a problem
ENTROPY_LEFT = (0.4, 0.15)  # entropy at the end over entropy at the beginning
ENTROPY_GROWN = 2.5
CLIPPED_TOKENS = (0.2, 0.5)  # share of tokens outside the clip range
HARD = 0.2  # mean reward below which prompts are too hard
LEFT = 0.3  # of the best reward, below which a policy has fallen apart
TRUNCATED = (0.1, 0.4)  # share of completions cut off by the length limit
LENGTH_GROWN = 2.0
LOGP_GAP = (0.02, 0.2)  # nats between sampler and trainer
SAMPLE_SIZE = (0.7, 0.3)  # effective sample size as a share of the rows
TARGET_WEIGHTS = (4.0, 1.5)  # effective completions of a group that carry the target
NOT_FINITE = 0.01  # share of steps above which lost updates are a problem
REWARD_STAYED = 0.02  # of the range of rewards
FAR_TOKENS = (0.02, 0.1)  # share of tokens whose probability an update changed by more than a factor of 2
LARGEST_RATIO = 1e3
KEPT = (0.98, 0.8)  # mean ratio of trainer to sampler, by which the sampler's filters shrink it
DEAD = 0.1  # a penalty's whole gradient, at its strongest, over the noise of the policy's
FALLEN = 3.0  # standard errors by which the last window of a hidden reward lies below its best
_UPDATES = ("num_iterations", "num_minibatches")
_BEYOND_GROUPS = (  # advantages that are none within a group, so that one of equal rewards teaches, too
    *("answer_consistency", "batch_centre", "constrained_gae", "gae"),
    *("greedy_baseline", "returns", "reward_to_go", "soft_min_critics"),
)
_NO_FILTER = (None, 0, 1, 1.0, 0.0)  # of top_p, top_k and min_p


def _not_finite(run: Run) -> Iterator[Finding]:
    for name in ("loss", "grad_norm"):
        curve = run.metrics.get(name, ())
        bad = [step for step, value in curve if not math.isfinite(value)]
        if bad:
            path, text = run.setting("learning_rate")
            yield Finding(
                Level.PROBLEM if len(bad) > NOT_FINITE * len(curve) else Level.WARNING,
                f"{name} was not a finite number on {count(len(bad), 'step')}, first at step {bad[0]}; those updates "
                f"are lost: lower {text}.",
                path,
            )
            return
    skipped = [(step, value) for step, value in run.metrics.get("updates/skipped", ()) if value > 0]
    if skipped:
        path, text = run.setting("learning_rate")
        total, steps = sum(value for _, value in skipped), len(run.metrics["updates/skipped"])
        yield Finding(
            Level.PROBLEM if len(skipped) > NOT_FINITE * steps else Level.WARNING,
            f"{count(int(total), 'update')} on {count(len(skipped), 'step')}, first at step {skipped[0][0]}, had a "
            f"loss or a gradient that was not finite and {'was' if total == 1 else 'were'} skipped: lower {text}.",
            path,
        )


def _reward_errors(run: Run) -> Iterator[Finding]:
    for name in sorted(run.metrics):
        if not (name.startswith("rewards/") and name.endswith("/errors")):
            continue
        counts = run.finite(name)
        if sum(counts) > 0:
            function = name.removeprefix("rewards/").removesuffix("/errors")
            hit = sum(failed > 0 for failed in counts)
            yield Finding(
                Level.PROBLEM if hit > len(counts) / 2 else Level.WARNING,
                f"The reward function {function} failed for {count(int(sum(counts)), 'group')}, on {hit} of "
                f"{count(len(counts), 'step')}; they were left out: mend it, or name another in `task.rewards`.",
                "task.rewards",
            )


def _tied_groups(run: Run) -> Iterator[Finding]:
    share, reward = run.late("frac_reward_zero_std"), run.late("reward")
    level = above(share, TIED)
    if share is None or level is None or not _compares_groups(run):
        return
    path, text = run.setting("num_generations")
    highest = max(run.finite("reward"), default=0.0)
    if _lost(run):
        path, other = run.setting("learning_rate")
        why = f"the policy has lost what it could (reward {highest:.2f} at best, {reward:.2f} now): lower {other}"
    elif reward is not None and reward > 0.8 * max(highest, 1.0):
        why = f"the prompts have become easy (reward {reward:.2f}): take harder ones, or raise {text}"
    elif reward is not None and reward < HARD:
        why = f"the prompts are too hard (reward {reward:.2f}): take easier ones, or raise {text}"
    else:
        why = f"raise {text}, or take prompts of middling difficulty"
    steps = run.window("frac_reward_zero_std")
    yield Finding(
        level,
        f"In the last {steps} steps {share:.0%} of the groups had equal rewards and taught nothing; {why}.",
        path,
    )


def _compares_groups(run: Run) -> bool:
    known = dict(entries(run.config))
    parts = [value for path, value in known.items() if path.startswith("advantage.") and path.endswith(".part")]
    return known.get("rollout.num_generations") != 1 and not any(value in _BEYOND_GROUPS for value in parts)


def _entropy(run: Run) -> Iterator[Finding]:
    course = run.course("entropy")
    if course is None:
        return
    early, late = course
    level = below(late / early, ENTROPY_LEFT) if early > 0 else None
    if level is not None:
        path, text = run.setting("beta")
        yield Finding(
            level,
            f"Entropy fell from {early:.3g} to {late:.3g} nats a token, so that samples of a prompt hardly differ any "
            f"more{_where_entropy_fell(run)}{in_words(run.fallen)}: raise {text}, the penalty towards the reference, "
            f"or lower {run.setting('learning_rate')[1]}.",
            path,
        )
    elif early > 0 and late > ENTROPY_GROWN * early:
        path, text = run.setting("learning_rate")
        yield Finding(
            Level.WARNING,
            f"Entropy rose from {early:.3g} to {late:.3g} nats a token, as it does when a policy falls apart: lower "
            f"{text}.",
            path,
        )


def _where_entropy_fell(run: Run) -> str:
    """The part of the completions, a turn or else a third, that kept the smallest share of its entropy."""
    parts = {name: f"the {name} third" for name in ("first", "middle", "last")}
    turns = [name.removeprefix("entropy/turn_") for name in run.metrics if name.startswith("entropy/turn_")]
    if len(turns) > 1:
        parts = {f"turn_{turn}": f"turn {turn}" for turn in turns}
    courses = {name: run.course(f"entropy/{name}") for name in parts}
    kept = {name: course[1] / course[0] for name, course in courses.items() if course is not None and course[0] > 0}
    if len(kept) < 2:
        return ""
    worst, best = min(kept, key=lambda name: kept[name]), max(kept, key=lambda name: kept[name])
    if kept[worst] > 0.7 * kept[best]:
        return ", in all parts of the completions alike"
    before, now = courses[worst] or (0.0, 0.0)
    return (
        f", most of all in {parts[worst]} of the completions (from {before:.3g} to {now:.3g}; {parts[best]} kept "
        f"{min(kept[best], 1.0):.0%})"
    )


def _clipping(run: Run) -> Iterator[Finding]:
    known = next((n for n in ("ratio/clipped", "clip_ratio/region_mean") if run.finite(n)), None)
    if known is not None:
        share = run.late(known)
    else:
        low, high = run.late("clip_ratio/low_mean"), run.late("clip_ratio/high_mean")
        share = None if low is None and high is None else (low or 0.0) + (high or 0.0)
    level = above(share, CLIPPED_TOKENS)
    if level is not None:
        path, text = run.setting("learning_rate")
        yield Finding(
            level,
            f"In the end {share:.0%} of the tokens lay outside the clip range and had no gradient: the policy moves "
            f"too far within one batch: lower {text}, or `num_iterations`.",
            path,
        )


def _ratios(run: Run) -> Iterator[Finding]:
    """How far the last update of a batch is from the policy that drew it."""
    far, largest = run.late("ratio/far"), run.late("ratio/max")
    level = above(far, FAR_TOKENS) or (Level.WARNING if largest is not None and largest > LARGEST_RATIO else None)
    if level is None or far is None or largest is None:
        return
    path, text = run.setting("learning_rate")
    known = {key: run.setting(key)[1] for key in _UPDATES}
    more = [text for key, text in known.items() if text not in (f"`{key}`", f"{text.split(' (')[0]} (now 1)")]
    yield Finding(
        level,
        f"At the last update of a batch {far:.1%} of the tokens were more than twice or less than half as likely as "
        f"when they were drawn, the largest ratio {largest:.3g}: lower {' or '.join([text, *more])}.",
        path,
    )


def _filtered_ratios(run: Run) -> Iterator[Finding]:
    """Filters of the sampler: a kept token is likelier there than for the trainer, so that every ratio is below 1."""
    filters = [
        (path, value)
        for path, value in entries(run.config)
        if path.startswith("rollout.")
        and path.split(".")[-1] in ("top_p", "top_k", "min_p")
        and value not in _NO_FILTER
    ]
    level = below(kept := run.late("rollout/ratio"), KEPT)
    if level is None or not filters:
        return
    path, value = filters[0]
    whole = run.late("rollout/ratio_completion")
    more = "" if whole is None else f", of a whole completion {whole:.2g}"
    yield Finding(
        level,
        f"The ratio of trainer to sampler is {kept:.3f} a token on average{more}, where it should be 1, because "
        f"`{path}` (now {short(value)}) leaves out the rest of the probability, so that whatever weighs or clips by it "
        f"acts on shrunk ratios: set `{path}` to {'0' if path.endswith('min_p') else 'null'} for training.",
        path,
    )


def _length(run: Run) -> Iterator[Finding]:
    path, text = run.setting("max_completion_length")
    truncated = run.late("completions/clipped_ratio")
    level = above(truncated, TRUNCATED)
    course = run.course("completions/mean_length")
    if level is not None:
        yield Finding(
            level,
            f"In the end {truncated:.0%} of the completions were cut off by the length limit and judged unfinished: "
            f"raise {text}, or shape the reward of long ones.",
            path,
        )
    elif course is not None and course[1] > LENGTH_GROWN * course[0] > 0:
        yield Finding(
            Level.NOTE,
            f"Completions grew from {course[0]:.0f} to {course[1]:.0f} tokens; none of it is lost while they end "
            f"before {text}.",
            path,
        )


def _sampler_gap(run: Run) -> Iterator[Finding]:
    gap = run.late("rollout/logp_gap")
    level = above(gap, LOGP_GAP)
    if level is not None:
        path, text = run.setting("dtype")
        yield Finding(
            level,
            f"Sampler and trainer disagree by {gap:.2g} nats a token about the same weights, so that the policy "
            f"gradient is off: raise the precision in {text}, or weigh with truncated importance sampling.",
            path,
        )


def _sample_size(run: Run) -> Iterator[Finding]:
    share = run.late("rollout/ess")
    level = below(share, SAMPLE_SIZE)
    if level is not None:
        path, text = run.setting("dtype")
        yield Finding(
            level,
            f"The importance weights between sampler and trainer leave an effective sample size of {share:.0%}: raise "
            f"the precision in {text}, or truncate the weights.",
            path,
        )


def _target_weights(run: Run) -> Iterator[Finding]:
    """How few completions of a group the target's weights rest on; a share of the rows for those of the reference."""
    level = below(effective := run.late("target/ess"), TARGET_WEIGHTS)
    if level is not None:
        path, text = run.setting("num_generations")
        yield Finding(
            level,
            f"The target's weights rest on {effective:.1f} completions of a group: it lies too far from what is "
            f"sampled (a group of n reaches about log n nats). Raise {text}, or ask for less with a larger beta.",
            path,
        )
    level = below(share := run.late("reference_share/ess"), SAMPLE_SIZE)
    if level is not None:
        yield Finding(
            level,
            f"The weights that stand for data of the reference leave an effective sample size of {share:.0%}: the "
            "policy has gone far from it. Lower train.learning_rate, or raise real_fraction.",
            "train.learning_rate",
        )


def _dead_penalties(run: Run) -> Iterator[Finding]:
    for name in sorted(run.metrics):
        values = run.finite(name)
        if not name.startswith("terms/") or name == "terms/policy" or len(values) < FEW or any(values):
            continue
        term = name.removeprefix("terms/")
        path = f"terms.{term}.coef"
        coefficient = dict(entries(run.config)).get(path)
        if coefficient == 0:
            continue
        now = "" if coefficient is None else f" (now {short(coefficient)})"
        # Terms are logged for the first update of a batch, where the distance from the old policy is 0 by definition.
        more = any(key.split(".")[-1] in _UPDATES and value not in (1, None) for key, value in entries(run.config))
        yield Finding(
            Level.NOTE if more else Level.WARNING,
            f"The term {term} was exactly 0 {'at the first update of' if more else 'in'} all {len(values)} batches"
            f"{'' if more else ', so that it did nothing'}: look at what it compares, or set `{path}`{now} to 0.",
            path,
        )


def _weak_penalties(run: Run) -> Iterator[Finding]:
    """Terms whose gradient, were it the same in every completion, would be lost in the noise of the policy's."""
    for name in sorted(run.metrics):
        values = run.finite(name)
        if not name.startswith("strength/") or len(values) < 2 * FEW or not 0 < max(values) < DEAD:
            continue
        term = name.removeprefix("strength/")
        path = f"terms.{term}.coef"
        coefficient = dict(entries(run.config)).get(path)
        now = "" if coefficient is None else f" (now {short(coefficient)})"
        times = DEAD / max(values)
        yield Finding(
            Level.WARNING if max(values) < DEAD / 10 else Level.NOTE,
            f"The gradient of the term {term} never was more than {max(values):.2g} of the noise of the policy "
            f"gradient, even if all completions pull the same way: it hardly acts; raise `{path}`{now} some "
            f"{times:.0f}-fold, or drop it.",
            path,
        )


def _hidden_rewards(run: Run) -> Iterator[Finding]:
    """Over-optimisation: what is trained on rises while what is only measured falls from its best."""
    for marker in sorted(run.metrics):
        if not (marker.startswith("hidden/") and marker.endswith("/errors") and run.metrics[marker]):
            continue
        name = marker.removeprefix("hidden/").removesuffix("/errors")
        gold = dict(run.metrics.get(f"rewards/{name}/mean", ()))
        trained = dict(run.metrics.get("reward", ()))
        steps = [s for s in sorted(gold) if s in trained and math.isfinite(gold[s]) and math.isfinite(trained[s])]
        if len(steps) < 2 * FEW:
            continue
        size = max(FEW, len(steps) // 10)
        windows = [steps[end - size : end] for end in range(size, len(steps) + 1)]
        means = [fmean(gold[s] for s in window) for window in windows]
        best, last = windows[means.index(max(means))], windows[-1]
        spread = [variance([gold[s] for s in window]) for window in (best, last)]
        margin = max(REWARD_STAYED * max(map(abs, means)), FALLEN * math.sqrt(sum(spread) / size))
        rise = fmean(trained[s] for s in last) - fmean(trained[s] for s in best)
        if max(means) - means[-1] <= margin or rise <= 0:
            continue
        path, text = run.setting("beta")
        yield Finding(
            Level.PROBLEM if means[-1] < means[0] - margin else Level.WARNING,
            f"From step {best[-1]} on the reward rose by {rise:.3g} while {name}, which is not trained on, fell from "
            f"{max(means):.3g} to {means[-1]:.3g}: the policy exploits the reward. Raise {text}, stop earlier, or mend "
            f"the reward.",
            path,
        )


def _reward(run: Run) -> Iterator[Finding]:
    course = run.course("reward")
    if course is None:
        return
    early, late = course
    values = run.finite("reward")
    # Two standard errors of the difference of both means: less is the noise of the prompts drawn.
    size = run.window("reward")
    noise = 2 * math.sqrt((variance(values[:size]) + variance(values[-size:])) / size)
    margin = max(REWARD_STAYED * max(1.0, max(values) - min(values)), noise)
    path, text = run.setting("learning_rate")
    if late < early - margin:
        yield Finding(
            Level.PROBLEM, f"The reward fell from {early:.3g} to {late:.3g}: lower {text}, or look at the reward.", path
        )
    elif late < early + margin and not _lost(run):
        yield Finding(
            Level.NOTE,
            f"The reward hardly moved, from {early:.3g} to {late:.3g}: train longer, or change {text}.",
            path,
        )


def _lost(run: Run) -> bool:
    """Whether hardly anything is left of a reward that was worth something, if only in the first batch."""
    reward, highest = run.late("reward"), max(run.finite("reward"), default=0.0)
    return reward is not None and highest >= HARD and reward < LEFT * highest


CHECKS = (
    _not_finite,
    _reward_errors,
    _reward,
    _tied_groups,
    _entropy,
    _clipping,
    _ratios,
    _length,
    _sampler_gap,
    _sample_size,
    _filtered_ratios,
    _target_weights,
    _dead_penalties,
    _weak_penalties,
    _hidden_rewards,
)
