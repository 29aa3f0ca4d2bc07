"""Methods that learn from earlier batches again, or hold on to what the initial policy could do."""

from dataclasses import replace
from typing import Literal

from keel.method import Claim, Method
from keel.models.sources import Initial
from keel.parts.controllers.coefficients import OnSomeBatches
from keel.parts.replay.rehearsal import Rehearsal
from keel.parts.replay.stored import Kept, Replay, Weighting
from keel.parts.terms.covering import RehearsalDivergence
from keel.parts.terms.mixture import MixtureKL, RehearsalMixtureKL
from keel.parts.terms.penalties import Summand
from keel.recipes.policy_gradient import grpo
from keel.recipes.registry import recipe

Kind = Literal["forward_kl", "js", "alpha", "reverse_kl", "js_by_definition"]
ETA = {"forward_kl": 0.02, "js": 0.1, "alpha": 0.02, "reverse_kl": 0.02, "js_by_definition": 0.1}


@recipe(baseline="grpo", neutral={"share": 0.0})
def grpo_replay(
    share: float = 0.25,
    weighting: Weighting = "truncated",
    cap: float = 2.0,
    capacity: int = 256,
    max_lag: int | None = 16,
    max_uses: int | None = 2,
    keep: Kept = "mixed",
    **grpo_options,
) -> Method:
    """GRPO in which a share of each batch are groups of earlier batches, weighted for who drew them.

    Args:
        share: of the groups of a batch that are replayed, on top of the fresh ones.
        weighting: truncated (by token), sequence, sequence_mean or none, beside the ratio to the policy before this
            batch; token, the ratio to who drew the row.
        cap: of truncated weights.
        capacity: groups kept.
        max_lag: batches after which a group is dropped; None is never.
        max_uses: uses after which it is; None is never.
        keep: all groups, mixed ones, or the half of these whose rewards differ most (best).

    Source: the buffer of "Sample Efficient Actor-Critic with Experience Replay", 2017, with GRPO's groups.
    """
    method = grpo(**grpo_options)
    replay = Replay(share, capacity, weighting, cap, max_lag=max_lag, max_uses=max_uses, keep=keep)
    return method.adding(replay={"past": replay}) if share else method


def clip_higher(**grpo_options) -> Method:
    """GRPO with the clip range of DPH-RL."""
    return grpo(**{"epsilon_high": 0.28, **grpo_options})


@recipe(paper=21, baseline="grpo", neutral={"eta": 0.0}, reduces_to=clip_higher, passes={"epsilon_high": 0.28})
def dph_rl(
    kind: Kind = "forward_kl",
    eta: float | None = None,
    alpha: float = 0.2,
    rehearsed: int = 8,
    samples: int = 8,
    solved: float = 1.0,
    threshold: float = 1.0,
    num_prompts: int | None = 256,
    leave: bool = True,
    rollout_share: float = 0.1,
    **grpo_options,
) -> Method:
    """DPH-RL: GRPO held to what the initial policy wrote where it was right, by a divergence that covers it.

        loss = GRPO + eta mean f(u) over the tokens of stored samples,   u = pi / pi_0 of the token

    Prompts that the initial policy solves in all of its `samples` keep one correct completion, and leave the prompts
    to train on. No reference runs.

    Args:
        kind: forward_kl, js (2 JS, as the paper has it) or alpha; reverse_kl is its control, k3 on the policy's own
            samples against the initial policy, without stored ones. js_by_definition is KL(pi_0 || m) on stored
            samples and KL(pi || m) on some batches' own, m the mean of the two policies.
        eta: coefficient; None is 0.02, and 0.1 for both js. 0 stores nothing.
        alpha: of the paper's alpha-divergence, in (0, 1): towards 0 the reverse KL, towards 1 the forward one.
        rehearsed: stored rows beside each batch.
        samples: completions of each prompt, drawn once before training.
        solved: share of them that must be correct.
        threshold: summed reward from which on a completion is correct.
        num_prompts: prompts that are looked at; None is all of them.
        leave: solved prompts are not trained on.
        rollout_share: of the batches, on whose own samples js_by_definition pulls, too; the initial policy runs then.

    Source: "The Choice of Divergence: A Neglected Key to Mitigating Diversity Collapse in RLVR", 2025.
    """
    eta = ETA[kind] if eta is None else eta
    if not 0 < alpha < 1:
        raise ValueError(f"alpha must be in (0, 1), not {alpha}")
    if kind == "reverse_kl" and eta:
        return _reverse(eta, **grpo_options)
    method = clip_higher(**grpo_options)
    if not eta:
        return method
    pool = Rehearsal(rehearsed, "samples", samples, solved, threshold, num_prompts, leave)
    if kind == "js_by_definition":
        return _by_definition(method, eta, rollout_share, pool)
    divergence = {"forward_kl": "kl_ref_policy", "js": "2*js", "alpha": f"alpha:{1 - alpha:g}"}[kind]
    objective = "E_pi[r] - eta E_ref[D(pi, ref)] per state"
    claim = Claim(objective, "reference", divergence, eta, invariant=("reward_shift",))
    return method.replacing(claim=None if grpo_options.get("beta") else claim).adding(
        terms={"rehearsal": RehearsalDivergence(eta, divergence, method.aggregation)}, replay={"rehearsal": pool}
    )


def _by_definition(method: Method, eta: float, share: float, pool: Rehearsal) -> Method:
    """Both halves of 2 JS, that of the policy's own samples on a share of the batches."""
    halves = {"rehearsal": RehearsalMixtureKL(eta, "k3", method.aggregation), "rollouts": Summand(MixtureKL(), eta)}
    some = OnSomeBatches("terms.rollouts.coef", eta, share=share)
    initial = {} if "ref" in method.models else {"ref": Initial()}
    return method.replacing(claim=None).adding(
        terms=halves, replay={"rehearsal": pool}, models=initial, controllers={"rollouts": some}
    )


def _reverse(eta: float, **grpo_options) -> Method:
    """The control: no stored samples, and KL(pi || pi_0) on the policy's own."""
    if grpo_options.get("beta"):
        raise ValueError("the coefficient of kind reverse_kl is eta: leave beta out")
    if grpo_options.get("kl", "k3") != "k3":
        raise ValueError("kind reverse_kl is the paper's control, its KL is k3: leave kl out")
    method = clip_higher(**{**grpo_options, "beta": eta, "kl": "k3"})
    assert method.claim is not None
    return method.replacing(claim=replace(method.claim, beta=eta))
