"""Pairs of the policy's own completions: sample, judge, pair, update."""

from typing import Any, Literal

from keel.core.aggregate import Aggregation
from keel.method import Claim, Method
from keel.models.sources import Initial, Pretrained, Snapshot, Source
from keel.parts.rewards.informed_pairs import InformedPairs, Rejected
from keel.parts.rewards.pairing import How, JudgePairs, Labels, PairUp, WinRates
from keel.parts.rewards.transforms import WeightedSum
from keel.parts.terms.links import LogSigmoid, SquaredToTarget
from keel.parts.terms.pairs import PairLoss
from keel.parts.terms.regressions import WinRateRegression
from keel.parts.terms.scores import LogRatio
from keel.recipes.registry import recipe
from keel.rollouts.rollout import Rollout
from keel.rollouts.taught import WrittenBy


@recipe()
def online_dpo(
    beta: float = 0.1,
    pairs: How = "all",
    labels: Labels = "best",
    label_temperature: float = 1.0,
    judge: str | None = None,
    num_generations: int = 8,
    temperature: float = 1.0,
) -> Method:
    """DPO on pairs of the policy's own completions, which the reward or a pairwise judge compares.

    With labels that have the probability sigmoid(r_i - r_j) its minimum is the optimum of E_pi[r] - beta KL; the way
    there is another field, and with the better one always preferred there is no minimum but the noise's.

    Args:
        beta: of the KL to the reference.
        pairs: which completions of a prompt are compared.
        labels: whether the better one is preferred, or drawn, or both with their probabilities.
        label_temperature: of that probability.
        judge: module:function of a pairwise judge in place of the reward.
        num_generations: completions a prompt.
        temperature: of the sampler.

    Source: "Direct Language Model Alignment from Online AI Feedback", 2024, with two completions a prompt.
    """
    if num_generations < 2:
        raise ValueError("completions of one prompt are compared: num_generations must be at least 2")
    by_reward = {"sum": WeightedSum(), "pairs": PairUp(pairs, labels, label_temperature)}
    return Method(
        rollout=Rollout(num_generations=num_generations, temperature=temperature),
        transforms=by_reward if judge is None else {"pairs": JudgePairs(judge, pairs, labels)},
        terms={"pairs": PairLoss(LogSigmoid(), LogRatio(), beta)},
        aggregation=Aggregation("sequence_mean_token_sum"),
        models={"ref": Initial()},
        claim=Claim("E_pi[r] - beta KL(pi || ref), sequences", "sequence", "kl_policy_ref", "beta"),
    )


@recipe(paper=59, baseline="online_dpo")
def did_dpo(
    beta: float = 0.1,
    rejected: Rejected = "drawn",
    target: Literal["reward", "teacher"] = "reward",
    label_temperature: float = 1.0,
    num_generations: int = 8,
    temperature: float = 1.0,
) -> Method:
    """DPO without labels: the reference draws what is chosen, and the optimal rejected sampler what is rejected.

    rejected(y) ~ ref(y) (ref / target)(y)^beta, under which the target is where the loss has its minimum: the optimum
    of E_pi[r] - beta KL, or a teacher. The completions of a group stand for the rejected sampler by their weights.

    Args:
        beta: of the KL to the reference.
        rejected: one for each chosen completion, or all at their probabilities.
        target: the tilt of the reference by the reward, or the model `teacher` (`--teacher`), which reads no reward.
        label_temperature: of the reward, as in `online_dpo`.
        num_generations: completions a prompt, all of the reference.
        temperature: of the sampler.

    Source: "Differential Information: An Information-Theoretic Perspective on Preference Optimization", 2025.
    """
    method = online_dpo(beta, label_temperature=label_temperature, num_generations=num_generations)
    taught = "teacher" if target == "teacher" else None
    pairs = InformedPairs(rejected, label_temperature, taught, beta)
    if taught:
        tilt = Claim("KL(pi || teacher)", "sequence", "kl_policy_ref", "beta", "target", "teacher")
        method = method.replacing(models={**method.models, taught: Pretrained("")}, claim=tilt)
    method = method.replacing(transforms={"sum": WeightedSum(), "pairs": pairs})
    return method.set("rollout.written", WrittenBy("ref")).set("rollout.temperature", temperature)


@recipe(baseline="online_dpo")
def behaviour_dpo(beta: float = 0.1, every: int = 1, **online_options: Any) -> Method:
    """Online DPO whose reference is the policy that drew the batch, or a snapshot of it.

    The first gradient of a batch is that of P(y is preferred to one of old's): a step away from where the policy is,
    which nothing but the number of steps bounds.

    Args:
        beta: of the log-ratio to it.
        every: batches for which the reference stays; 1 is the policy that drew this one.

    Source: "BPO: Staying Close to the Behavior LLM Creates Better Online LLM Alignment", 2024.
    """
    past, models = _past(every)
    method = online_dpo(beta=beta, **online_options)
    terms = {"pairs": PairLoss(LogSigmoid(), LogRatio((past,)), beta)}
    return method.replacing(
        terms=terms, models=models, claim=_step("old exp(P(y beats old) / beta) / Z", "win_rate_step")
    )


@recipe(baseline="online_dpo")
def online_ipo(beta: float = 0.1, labels: Labels = "sampled", expected: bool = False, **online_options: Any) -> Method:
    """Online DPO with IPO's squared loss on sums over tokens, (gap of log-ratios - 1 / (2 beta))^2, and drawn labels.

    On the policy its expected gradient is that of E_pi[P(y beats old)] - beta KL(pi || ref), win rates held fixed,
    which is at rest at the Nash policy of that game.

    Args:
        beta: of the KL.
        labels: see `online_dpo`; drawn with the probability of the preference.
        expected: both labels at their probabilities, in place of a draw.

    Source: "Human Alignment of Large Language Models through Online Preference Optimisation", 2024; not divided by the
    lengths, as in TRL's OnlineDPO.
    """
    method = online_dpo(beta=beta, labels="expected" if expected else labels, **online_options)
    terms = {"pairs": PairLoss(SquaredToTarget(0.5, beta), LogRatio(), beta)}
    return method.replacing(terms=terms, claim=_step("ref exp(P(y beats old) / beta) / Z", "preference_step"))


@recipe(paper=163, baseline="online_ipo", neutral={"ratio": 1.0})
def inpo(beta: float = 0.1, ratio: float = 1 / 3, every: int = 1, **ipo_options: Any) -> Method:
    """Online IPO against the reference and the policy of the last iteration, with exponents tau / eta and the rest.

        h = log pi - (tau / eta) log ref - (1 - tau / eta) log pi_t,   loss (h_w - h_l - 1 / (2 eta))^2

    A step of online mirror descent: its minimum is ref^ratio pi_t^(1 - ratio) exp(P(y beats pi_t) / eta) / Z.

    Args:
        beta: eta of the paper, inverse size of the step; the strength of the KL, its tau, is ratio * beta.
        ratio: tau / eta, in [0, 1]; 1 is online IPO, 0 forgets the reference.
        every: batches of an iteration; 1 takes the policy that drew the batch for pi_t. Otherwise pi_t draws them all.

    Source: "Iterative Nash Policy Optimization: Aligning LLMs with General Preferences via No-Regret Learning", 2025.
    The paper compares best and worst of 8 and iterates three times, at eta 0.0075 as its scripts are remembered.
    """
    if not 0 <= ratio <= 1:
        raise ValueError(f"ratio is tau / eta, with eta at least tau: it must be in [0, 1], not {ratio}")
    past, models = _past(every)
    method = online_ipo(beta=beta, **ipo_options)
    score = LogRatio(("ref", past), (ratio, 1 - ratio))
    terms = {"pairs": PairLoss(SquaredToTarget(0.5, beta), score, beta)}
    claim = _step("ref^ratio old^(1 - ratio) exp(P(y beats old) / beta) / Z", "mirror_step")
    method = method.replacing(terms=terms, models={**method.models, **models}, claim=claim)
    return method.set("rollout.written", WrittenBy(past)) if models else method


@recipe()
def rebel(
    beta: float = 1.0,
    against: Literal["old", "ref"] = "old",
    every: int = 1,
    pairs: How = "all",
    num_generations: int = 8,
    temperature: float = 1.0,
) -> Method:
    """REBEL: the gap of the log-ratios is regressed on the gap of the rewards, (beta gap - (r_i - r_j))^2.

    On the policy its expected gradient is that of the reward, less beta KL where the log-ratio is to the reference.

    Args:
        beta: inverse size of the step (1 / eta of the paper).
        against: the log-ratio is to the policy of the last iteration, as in the paper, or to the reference.
        every: batches of an iteration; 1 takes the policy that drew the batch.
        pairs: which completions of a prompt are compared.
        num_generations: completions a prompt.
        temperature: of the sampler.

    Source: "REBEL: Reinforcement Learning via Regressing Relative Rewards", 2024.
    """
    past, models = _past(every) if against == "old" else ("ref", {"ref": Initial()})
    same: dict[str, Any] = dict(beta=beta, pairs=pairs, num_generations=num_generations, temperature=temperature)
    method = online_dpo(labels="expected", **same)  # ties are kept: they ask for no gap
    loss = PairLoss(SquaredToTarget(0.0), LogRatio((past,)), beta, margin=1.0)
    step = Claim("KL(pi || old exp(r / beta) / Z)", "sequence", "kl_policy_ref", "beta", "target", "tilt_of_sampler")
    claim = step if against == "old" else method.claim
    return method.replacing(terms={"pairs": loss}, models=models, claim=claim)


@recipe()
def sppo(
    beta: float = 0.001,
    every: int = 1,
    label_temperature: float = 1.0,
    judge: str | None = None,
    num_generations: int = 8,
    temperature: float = 1.0,
) -> Method:
    """Self-play: the log-ratio of each completion is regressed on its win rate within the group.

        (log pi - log pi_t - (P(y beats pi_t) - 1/2) / beta)^2

    Args:
        beta: inverse size of the step (1 / eta of the paper, whose eta is 1000).
        every: batches of an iteration; 1 takes the policy that drew the batch for pi_t.
        label_temperature: of P(i beats j) = sigmoid((r_i - r_j) / label_temperature); 0 compares.
        judge: module:function of a pairwise judge in place of the reward.
        num_generations: completions a prompt.
        temperature: of the sampler.

    Source: "Self-Play Preference Optimization for Language Model Alignment", 2024. There a completion's win rate
    counts itself, too, at 1/2.
    """
    if num_generations < 2:
        raise ValueError("completions of one prompt are compared: num_generations must be at least 2")
    past, models = _past(every)
    return Method(
        rollout=Rollout(num_generations=num_generations, temperature=temperature),
        transforms={"sum": WeightedSum(), "win": WinRates(label_temperature, judge=judge)},
        terms={"win": WinRateRegression(beta, past)},
        aggregation=Aggregation("sequence_mean_token_sum"),
        models=models,
        claim=_step("old exp(P(y beats old) / beta) / Z", "win_rate_step"),
    )


def _past(every: int) -> tuple[str, dict[str, Source]]:
    """The policy of the last iteration: the one that drew the batch, or a snapshot."""
    if every < 1:
        raise ValueError(f"every must be at least 1, not {every}")
    return ("old", {}) if every == 1 else ("past", {"past": Snapshot(every)})


def _step(objective: str, target: str) -> Claim:
    return Claim(f"KL(pi || {objective})", "sequence", "kl_policy_ref", "beta", "target", target)
