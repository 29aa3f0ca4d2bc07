"""The optimum per state, against hand computation, numerical maximisation and the chain rule."""

import math

import pytest
import torch
from tests.worlds import from_probs, noise, table

from keel.divergences.family import NAMES, FDivergence, f_divergence
from keel.exact.space import SequenceSpace, TabularPolicy
from keel.exact.states import (
    endings,
    expectation,
    levels,
    sequence_log_probs,
    soft_values,
    state_objective,
    state_optimum,
    state_visits,
)
from keel.targets.tilt import f_tilt

SPACES = {
    "with eos": SequenceSpace(3, 3, eos=2, prompts=2),
    "fixed length": SequenceSpace(2, 3),
    "one token": SequenceSpace(4, 1, prompts=2),
}
EVERY = [name if name != "alpha" else "alpha:0.5" for name in NAMES] + ["alpha:2", "alpha:-1", "js:0.2"]

# of ratios u = p / q, written down once more so that the oracle shares nothing with the library
GENERATORS = {
    "kl_policy_ref": lambda u: u * u.log() - u + 1,
    "kl_ref_policy": lambda u: -u.log() + u - 1,
    "js": lambda u: 0.5 * (u * u.log() - (1 + u) * ((1 + u) / 2).log()),
    "chi2_policy_ref": lambda u: (u - 1) ** 2,
    "chi2_ref_policy": lambda u: (u - 1) ** 2 / u,
    "alpha:0.5": lambda u: (u**0.5 - 0.5 * u - 0.5) / (0.5 * -0.5),
    "alpha:2": lambda u: (u - 1) ** 2 / 2,
}


def world(name: str) -> tuple[TabularPolicy, torch.Tensor]:
    space = SPACES[name]
    return table("ref", name, space=space), noise("reward", name, shape=(space.prompts, len(space.sequences()[0])))


def returns_by_enumeration(policy, ref, reward, beta, f) -> torch.Tensor:
    """E[r - beta sum_t D_f at the prefixes passed], sequence by sequence."""
    space, total = policy.space, []
    for prompt in range(space.prompts):
        rows = space.rows(prompt)
        p, q = (m.hidden(rows).log_softmax(-1) for m in (policy, ref))
        u = (p - q.detach()).exp()
        penalty = ((q.exp().detach() * f(u)).sum(-1) * rows.mask).sum(1)
        total.append((policy.log_prob(rows).exp() * (reward[prompt] - beta * penalty)).sum())
    return torch.stack(total)


def numerical_optimum(ref, reward, beta, f) -> tuple[torch.Tensor, torch.Tensor]:
    """By quasi-Newton on the logits, from the reference."""
    policy = TabularPolicy(ref.space, ref.table.detach())
    options = {"max_iter": 300, "tolerance_grad": 1e-11, "tolerance_change": 1e-16, "history_size": 50}
    search = torch.optim.LBFGS(policy.parameters(), line_search_fn="strong_wolfe", **options)

    def closure():
        search.zero_grad()
        loss = -returns_by_enumeration(policy, ref, reward, beta, f).sum()
        loss.backward()
        return loss

    search.step(closure)
    return returns_by_enumeration(policy, ref, reward, beta, f).detach(), policy.table.detach().log_softmax(-1)


@pytest.mark.parametrize("name", GENERATORS)
def test_against_numerical_maximisation(name):
    ref, reward = world("with eos")
    found = state_optimum(ref, reward, 0.8, name)
    best, log_probs = numerical_optimum(ref, reward, 0.8, GENERATORS[name])
    torch.testing.assert_close(found.objective, best, rtol=0, atol=1e-9)
    visited = state_visits(found.policy(ref.space)).detach() > 1e-6
    torch.testing.assert_close(found.log_probs.exp()[visited], log_probs.exp()[visited], rtol=0, atol=1e-4)
    again = returns_by_enumeration(found.policy(ref.space), ref, reward, 0.8, GENERATORS[name])
    torch.testing.assert_close(again.detach(), found.objective, rtol=0, atol=1e-12)


@pytest.mark.parametrize(
    ("name", "where"), [*((name, "with eos") for name in EVERY), ("kl_ref_policy", "fixed length"), ("tv", "one token")]
)
def test_no_policy_near_it_is_better(name, where):
    """The value of the first prefix is the objective, and every mixture with another policy loses."""
    ref, reward = world(where)
    found = state_optimum(ref, reward, 0.7, name)
    torch.testing.assert_close(found.values[:, 0], found.objective, rtol=0, atol=1e-11)
    p = found.log_probs.exp()
    for seed in range(3):
        other = table("other", seed, space=ref.space).table.detach().softmax(-1)
        for step in (0.01, 0.3, 1.0):
            mixed = TabularPolicy(ref.space, ((1 - step) * p + step * other).log())
            value = state_objective(mixed, ref, reward, 0.7, name).detach()
            assert bool((value <= found.objective + 1e-12).all())


@pytest.mark.parametrize("where", SPACES)
def test_kl_per_state_is_kl_over_sequences(where):
    """pi* = ref exp(r / beta) / Z over whole sequences, and J = beta log Z."""
    ref, reward = world(where)
    beta = 0.6
    found = state_optimum(ref, reward, beta, "kl_policy_ref")
    scores = sequence_log_probs(ref).detach() + reward / beta
    torch.testing.assert_close(found.objective, beta * scores.logsumexp(1), rtol=0, atol=1e-12)
    sequences = sequence_log_probs(found.policy(ref.space)).detach()
    torch.testing.assert_close(sequences, scores.log_softmax(1), rtol=0, atol=1e-11)


@pytest.mark.parametrize("name", ["kl_ref_policy", "chi2_policy_ref", "alpha:0.5"])
def test_no_other_divergence_is_the_same_over_sequences(name):
    """The optimum over sequences, solved for directly, is another policy."""
    ref, reward = world("with eos")
    states = sequence_log_probs(state_optimum(ref, reward, 0.6, name).policy(ref.space)).detach()
    sequences = f_tilt(sequence_log_probs(ref).detach(), reward, 0.6, name).log_prob
    assert float((states.exp() - sequences.exp()).abs().max()) > 1e-2


def test_chi_square_by_hand():
    """Two tokens, reference 1/2 each; f = (u - 1)^2, beta 1: p = 1/2 + (Q1 - Q2) / 8 while that is at most 1.

    Rewards of 00, 01, 10, 11 are 4, 0, 1, 1. After 0: p = 1, V = 4 - 1 = 3. After 1: p = 1/2, V = 1.
    At the start: p = 1/2 + 2/8 = 3/4, V = 3 * 3/4 + 1/4 - (1/2)^2 = 2.25.
    """
    ref = from_probs([0.5, 0.5], [0.5, 0.5], [0.5, 0.5], space=SequenceSpace(2, 2))
    reward = torch.tensor([[4.0, 0.0, 1.0, 1.0]], dtype=torch.float64)
    found = state_optimum(ref, reward, 1.0, "chi2_policy_ref")
    assert found.log_probs.exp()[0, :, 0].tolist() == pytest.approx([0.75, 1.0, 0.5], abs=1e-9)
    assert found.values[0].tolist() == pytest.approx([2.25, 3.0, 1.0], abs=1e-12)
    assert found.objective.tolist() == pytest.approx([2.25], abs=1e-12)


@pytest.mark.parametrize("name", ["kl_policy_ref", "kl_ref_policy", "chi2_policy_ref", "tv", "hellinger", "alpha:0.5"])
def test_limits_of_beta(name):
    """Small beta: the best sequence. Large beta: the reference."""
    ref, reward = world("with eos")
    best = state_optimum(ref, reward, 1e-4, name)
    sequences = sequence_log_probs(best.policy(ref.space)).detach().exp()
    assert torch.equal(sequences.argmax(1), reward.argmax(1)) and float(sequences.amax(1).min()) > 0.9
    far = state_optimum(ref, reward, 1e6, name)
    torch.testing.assert_close(far.log_probs.exp(), ref.table.detach().softmax(-1), rtol=0, atol=1e-5)
    torch.testing.assert_close(far.objective, expectation(ref, reward).detach(), rtol=0, atol=1e-5)


# -- the fixed point when the states are held ------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["kl_policy_ref", "kl_ref_policy", "alpha:0.5", "hellinger"])
def test_held_fixed_the_gradient_vanishes(name):
    ref, reward = world("with eos")
    rest = state_optimum(ref, reward, 0.7, name, held_fixed=True)
    policy = rest.policy(ref.space)

    def slope(held: bool) -> float:
        objective = state_objective(policy, ref, reward, 0.7, name, held_fixed=held).sum()
        return float(torch.autograd.grad(objective, policy.table)[0].abs().max())

    assert slope(held=True) < 1e-9
    assert slope(held=False) > 1e-3  # it is no stationary point of the objective itself
    assert bool((rest.objective < state_optimum(ref, reward, 0.7, name).objective - 1e-4).all())


def test_the_gradient_of_the_optimum_vanishes():
    ref, reward = world("with eos")
    for name in ("kl_policy_ref", "kl_ref_policy", "hellinger"):
        policy = state_optimum(ref, reward, 0.7, name).policy(ref.space)
        objective = state_objective(policy, ref, reward, 0.7, name).sum()
        assert float(torch.autograd.grad(objective, policy.table)[0].abs().max()) < 1e-9


def test_one_token_has_one_answer():
    """With a single step no state can move: both readings agree."""
    ref, reward = world("one token")
    for name in ("kl_policy_ref", "kl_ref_policy", "chi2_policy_ref", "tv"):
        free, held = (state_optimum(ref, reward, 0.7, name, held_fixed=h) for h in (False, True))
        torch.testing.assert_close(free.log_probs, held.log_probs)


# -- given policies --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["kl_policy_ref", "js", "chi2_policy_ref"])
@pytest.mark.parametrize("where", SPACES)
def test_objective_values_and_enumeration_agree(name, where):
    ref, reward = world(where)
    policy = table("policy", space=ref.space)
    wanted = returns_by_enumeration(policy, ref, reward, 0.4, GENERATORS[name])
    torch.testing.assert_close(state_objective(policy, ref, reward, 0.4, name), wanted, rtol=0, atol=1e-12)
    values = soft_values(policy, ref, reward, 0.4, name)
    torch.testing.assert_close(values[:, 0], wanted, rtol=0, atol=1e-12)
    slopes = [torch.autograd.grad(v.sum(), policy.table)[0] for v in (wanted, values[:, 0])]
    torch.testing.assert_close(slopes[1], slopes[0], rtol=0, atol=1e-12)


def test_visits_by_hand():
    """Tokens 0, 1 and the end 2; first token (.5, .3, .2), after 0: (.1, .6, .3), after 1: (.2, .2, .6)."""
    last = [0.25, 0.25, 0.5]
    levels_ = [[0.5, 0.3, 0.2], [0.1, 0.6, 0.3], [0.2, 0.2, 0.6], last, *[last] * 9]
    policy = from_probs(*levels_, space=SequenceSpace(3, 3, eos=2))
    found = state_visits(policy)[0].tolist()
    assert found == pytest.approx([1, 0.5, 0.3, 0, 0.05, 0.3, 0, 0.06, 0.06, 0, 0, 0, 0], abs=1e-12)


def test_expected_length_is_the_sum_of_the_visits():
    ref, _ = world("with eos")
    lengths = ref.space.sequences()[1].double().expand(2, -1)
    torch.testing.assert_close(state_visits(ref).sum(1), expectation(ref, lengths))


def test_every_sequence_ends_once():
    space = SPACES["with eos"]
    found = endings(space)
    assert sorted(found[found >= 0].tolist()) == list(range(15))
    assert found[0].tolist()[2] >= 0 and found[0].tolist()[:2] == [-1, -1]
    assert [(s.start, s.stop) for s in levels(space)] == [(0, 1), (1, 4), (4, 13)]


def test_reference_without_some_token():
    """What the reference never does, the optimum never does."""
    ref = from_probs([0.5, 0.5], [1.0, 0.0], [0.5, 0.5], space=SequenceSpace(2, 2))
    reward = torch.tensor([[0.0, 9.0, 1.0, 2.0]], dtype=torch.float64)
    found = state_optimum(ref, reward, 0.5, "kl_policy_ref")
    assert float(found.log_probs[0, 1, 1]) == -math.inf
    wanted = 0.5 * math.log(0.5 + 0.25 * math.exp(2) + 0.25 * math.exp(4))
    assert found.objective.tolist() == pytest.approx([wanted], abs=1e-12)


def test_a_scaled_divergence_is_another_beta():
    ref, reward = world("fixed length")
    half = state_optimum(ref, reward, 0.4, FDivergence("hellinger", scale=2.0))
    torch.testing.assert_close(half.log_probs, state_optimum(ref, reward, 0.8, f_divergence("hellinger")).log_probs)
