"""The optimum per state: the objective whose divergence is taken from prefix to prefix.

    J(pi) = E_pi[r(y)] - beta E_pi[ sum_t D_f(pi(.|y_<t) || ref(.|y_<t)) ]

The prefixes that count are those that pi itself visits, so the state distribution moves with the policy. Soft backward
induction from the last token to the first gives the optimum in closed form:

    Q(x, v) = r(xv) if the sequence ends with v, else V(xv)
    V(x)    = max over pi(.|x) of  sum_v pi(v|x) Q(x, v) - beta D_f(pi(.|x) || ref(.|x))

For kl_policy_ref it is the optimum over whole sequences too, by the chain rule of the KL; for no other f.

Letters: Q prompts, S sequences, X prefixes, V vocabulary.
"""

import itertools
from dataclasses import dataclass

import torch
from jaxtyping import Float, Int
from torch import Tensor

from keel.divergences.family import FDivergence, f_divergence
from keel.exact.space import SequenceSpace, TabularPolicy
from keel.targets.tilt import f_tilt


@dataclass(frozen=True, eq=False)
class StateOptimum:
    """What soft backward induction found.

    Args:
        log_probs: log pi(v | x); the reference's where no sequence passes.
        action_values: Q(x, v).
        values: what is passed on to the prefix before, V(x).
        objective: J of this policy, for each prompt.
    """

    log_probs: Float[Tensor, "Q X V"]
    action_values: Float[Tensor, "Q X V"]
    values: Float[Tensor, "Q X"]
    objective: Float[Tensor, "Q"]

    def policy(self, space: SequenceSpace) -> TabularPolicy:
        """As a table of logits; -inf where a token has no probability at all."""
        return TabularPolicy(space, self.log_probs)


# -- the tree of prefixes --------------------------------------------------------------------------------------------


def levels(space: SequenceSpace) -> list[slice]:
    """The prefixes of each length; those of length t + 1 are the children of length t, in order."""
    starts = [sum(space.vocab**i for i in range(t)) for t in range(space.horizon + 1)]
    return [slice(a, b) for a, b in itertools.pairwise(starts)]


def endings(space: SequenceSpace) -> Int[Tensor, "X V"]:
    """The place in `space.sequences()` of the sequence that ends with token v after prefix x; -1 if none does."""
    tokens, lengths = space.sequences()
    last = (lengths - 1)[:, None]
    found = torch.full((space.prefixes, space.vocab), -1)
    found[space.prefix_index(tokens).gather(1, last)[:, 0], tokens.gather(1, last)[:, 0]] = torch.arange(len(tokens))
    return found


# -- a given policy --------------------------------------------------------------------------------------------------


def sequence_log_probs(policy: TabularPolicy) -> Float[Tensor, "Q S"]:
    """log pi(y | x) of every sequence of every prompt, with gradients."""
    return torch.stack([policy.log_prob(policy.space.rows(prompt)) for prompt in range(policy.space.prompts)])


def expectation(policy: TabularPolicy, values: Float[Tensor, "Q S"]) -> Float[Tensor, "Q"]:
    """E_pi[values] for each prompt, with gradients."""
    return (sequence_log_probs(policy).exp() * values).sum(1)


def state_visits(policy: TabularPolicy) -> Float[Tensor, "Q X"]:
    """The probability that a completion passes prefix x and goes on, with gradients; 0 after the end."""
    space, probs = policy.space, policy.table.softmax(-1)
    visits = [probs.new_ones(space.prompts, 1)]
    goes_on = torch.arange(space.vocab) != (-1 if space.eos is None else space.eos)
    for level in levels(space)[:-1]:
        visits.append((visits[-1][..., None] * probs[:, level] * goes_on).flatten(1))
    return torch.cat(visits, 1)


def state_divergence(policy: TabularPolicy, ref: TabularPolicy, divergence: FDivergence | str) -> Float[Tensor, "Q X"]:
    """D_f(pi(.|x) || ref(.|x)) at every prefix, with gradients."""
    return f_divergence(divergence).value(policy.table.log_softmax(-1), ref.table.log_softmax(-1))


def state_objective(
    policy: TabularPolicy,
    ref: TabularPolicy,
    reward: Float[Tensor, "Q S"],
    beta: float,
    divergence: FDivergence | str,
    held_fixed: bool = False,
) -> Float[Tensor, "Q"]:
    """J(pi) = E[r] - beta sum_x visits(x) D_f(x), for each prompt, with gradients.

    Args:
        reward: of the sequences in the order of `space.sequences()`.
        held_fixed: no gradient through the visits: that of a penalty inside a loss whose rows were sampled beforehand.
    """
    visits = state_visits(policy)
    visits = visits.detach() if held_fixed else visits
    return expectation(policy, reward) - beta * (visits * state_divergence(policy, ref, divergence)).sum(1)


def soft_values(
    policy: TabularPolicy,
    ref: TabularPolicy,
    reward: Float[Tensor, "Q S"],
    beta: float,
    divergence: FDivergence | str,
) -> Float[Tensor, "Q X"]:
    """V_pi(x) = sum_v pi(v|x) Q_pi(x, v) - beta D_f(x): what is still to come, penalties included, with gradients."""
    probs = policy.table.softmax(-1)
    penalty = beta * state_divergence(policy, ref, divergence)
    values: list[Tensor] = []
    for level, q in _backwards(policy.space, reward, values):
        values.append((probs[:, level] * q).sum(-1) - penalty[:, level])
    return torch.cat(values[::-1], 1)


# -- the optimum -----------------------------------------------------------------------------------------------------


def state_optimum(
    ref: TabularPolicy,
    reward: Float[Tensor, "Q S"],
    beta: float,
    divergence: FDivergence | str,
    held_fixed: bool = False,
) -> StateOptimum:
    """The policy that is best when the divergence is taken per state.

    With `held_fixed`, the point at which a method comes to rest that counts the divergence on states that it treats as
    given (a penalty inside the loss, its rows sampled before): the gradient of E[r] - beta sum_x sg(visits) D_f(x)
    vanishes. No action answers for the divergence of the prefixes that it leads to, so a prefix passes on its expected
    reward alone:

        pi(.|x) = argmax  sum_v pi(v|x) Q(x, v) - beta D_f(pi(.|x) || ref(.|x)),    V(x) = sum_v pi(v|x) Q(x, v)

    It maximises nothing: at its own objective it is below the optimum, except at the last token, or where all
    prefixes of a level can gain the same.

    Args:
        reward: of the sequences in the order of `space.sequences()`, for each prompt.
        beta: coefficient of the divergence.
        divergence: an f-divergence or its name.
    """
    space, f = ref.space, f_divergence(divergence)
    log_ref = ref.table.detach().log_softmax(-1)
    found: list[tuple[Tensor, Tensor]] = []
    passed_on: list[Tensor] = []
    for level, q in _backwards(space, reward, passed_on):
        best = f_tilt(log_ref[:, level], q, beta, f)
        passed_on.append(best.reward if held_fixed else best.value)
        found.append((best.log_prob, q))
    log_probs, action_values = (torch.cat(parts[::-1], 1) for parts in zip(*found, strict=True))
    objective = state_objective(TabularPolicy(space, log_probs), ref, reward, beta, f).detach()
    return StateOptimum(log_probs, action_values, torch.cat(passed_on[::-1], 1), objective)


def _backwards(space: SequenceSpace, reward: Tensor, values: list[Tensor]):
    """Levels from the last to the first with Q(x, v); the caller appends V of each level to `values`."""
    ends = endings(space)
    for level in reversed(levels(space)):
        end = ends[level]
        now = reward[:, end.clamp(min=0)]
        later = values[-1].reshape(now.shape) if values else torch.zeros_like(now)
        yield level, torch.where(end >= 0, now, later)
