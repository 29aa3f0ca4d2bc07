"""Functionals of distillation: values against plain formulas, gradients against finite differences."""

import math

import pytest
import torch
from tests.worlds import noise

from keel.core.policy import Head
from keel.statistics.functionals import Divergence
from keel.statistics.positions import Positions
from keel.statistics.teachers import Binned, LogProbsAt, PlackettLuce, TopTokens, plackett_luce

N, V = 3, 7
Z, ZT = noise("student", shape=(N, V)), noise("teacher", shape=(N, V))
TOKEN = torch.tensor([2, 0, 6])
IDS = torch.tensor([[5, 1], [0, 3], [2, 4]])


def positions(
    z: torch.Tensor = Z, zt: torch.Tensor = ZT, ids: torch.Tensor = IDS, temperature: float = 1.0
) -> Positions:
    hidden = {"policy": z.clone(), "teacher": zt.clone()}
    heads = {"policy": Head(), "teacher": Head()}
    return Positions(TOKEN[: len(z)], hidden, heads, temperature=temperature, column=lambda name: ids)


def gradient(functional, grad: torch.Tensor, **settings) -> torch.Tensor:
    """The one that the engine takes: in closed form where there is one, else by autograd."""
    at = positions(**settings)
    functional(at)
    dlogits = torch.zeros_like(at.hidden["policy"])
    if hasattr(functional, "backward"):
        functional.backward(at, grad, dlogits)
        at.settle(dlogits)
        return dlogits
    leaf = at.logits("policy").detach().requires_grad_()
    (found,) = torch.autograd.grad(functional(at.with_leaf(leaf)), leaf, grad)
    return found


def differences(functional, grad: torch.Tensor, **settings) -> torch.Tensor:
    """The same by central differences."""
    z = settings.pop("z", Z)
    out = torch.zeros_like(z)
    for i in range(z.numel()):
        step = torch.zeros_like(z)
        step.view(-1)[i] = 1e-5
        up, down = (functional(positions(z=z + s * step, **settings)) for s in (1, -1))
        out.view(-1)[i] = (grad * (up - down)).sum() / 2e-5
    return out


EVERY = [
    LogProbsAt("teacher_ids"),
    LogProbsAt("teacher_ids", rest=True),
    PlackettLuce(),
    PlackettLuce(k=3, temperature=1.7, renormalise=True),
    Binned(bins=3),
    Binned(temperature=2.0),
    Divergence("kl_ref_policy", "teacher", temperature=2.0),
    Divergence("kl_policy_ref", "teacher", temperature=0.5, against_temperature=3.0),
    Divergence("js:0.1", "teacher", temperature=1.0, against_temperature=2.0),
    Divergence("tv", "teacher", temperature=2.0),
]


@pytest.mark.parametrize("functional", EVERY, ids=lambda f: f.name)
def test_gradients_are_those_of_the_values(functional):
    shape = functional(positions()).shape
    grad = noise("upstream", shape=tuple(shape))
    torch.testing.assert_close(gradient(functional, grad), differences(functional, grad), rtol=1e-6, atol=1e-8)


def test_temperatures_are_those_of_softened_distributions():
    p, q = (Z / 0.5).softmax(-1), (ZT / 3).softmax(-1)
    found = Divergence("kl_policy_ref", "teacher", temperature=0.5, against_temperature=3.0)(positions())
    torch.testing.assert_close(found, (p * (p.log() - q.log())).sum(-1))
    # beside the temperature of all models
    both = Divergence("kl_policy_ref", "teacher", temperature=2.0)(positions(temperature=1.5))
    torch.testing.assert_close(both, Divergence("kl_policy_ref", "teacher", temperature=3.0)(positions()))


def test_a_temperature_of_one_is_the_plain_divergence():
    plain = Divergence("js", "teacher")
    assert Divergence("js", "teacher", temperature=1.0, against_temperature=1.0) == plain
    assert "temperature" not in plain.name
    assert "temperature=2" in Divergence("js", "teacher", temperature=2.0).name
    with pytest.raises(ValueError, match="positive"):
        Divergence("js", "teacher", temperature=0.0)


def test_far_logits_at_a_temperature_keep_a_finite_gradient():
    """Where the policy has lost an outcome the KL is infinite, and the gradient that of what it still has."""
    z = Z.clone()
    z[0, 1] = -math.inf
    functional = Divergence("kl_ref_policy", "teacher", temperature=2.0)
    assert functional(positions(z=z)).isinf().tolist() == [True, False, False]
    found = gradient(functional, torch.ones(N, dtype=Z.dtype), z=z)
    p, teacher = (z / 2).softmax(-1), (ZT / 2).softmax(-1)
    teacher[0, 1] = 0.0
    torch.testing.assert_close(found, (p * teacher.sum(-1, keepdim=True) - teacher) / 2)


def test_named_tokens_and_the_rest():
    p = Z.softmax(-1)
    found = LogProbsAt("teacher_ids", rest=True)(positions())
    torch.testing.assert_close(found[:, :2], p.log().gather(-1, IDS))
    torch.testing.assert_close(found[:, 2].exp() + found[:, :2].exp().sum(-1), torch.ones(N, dtype=Z.dtype))


def test_where_all_are_named_there_is_no_rest_and_no_gradient_of_it():
    ids = torch.arange(V).expand(N, V)
    functional = LogProbsAt("teacher_ids", rest=True)
    assert bool((functional(positions(ids=ids))[:, -1] == -math.inf).all())
    grad = torch.cat([noise("upstream", shape=(N, V)), torch.full((N, 1), math.nan, dtype=Z.dtype)], -1)
    found = gradient(functional, grad, ids=ids)
    torch.testing.assert_close(found, gradient(LogProbsAt("teacher_ids"), grad[:, :V], ids=ids))


def test_the_likeliest_tokens():
    found = TopTokens(2)(positions())
    p = ZT.softmax(-1)
    values, ids = p.topk(2, -1)
    torch.testing.assert_close(found[:, :2], ids.to(Z))
    torch.testing.assert_close(found[:, 2:4], values.log())
    torch.testing.assert_close(found[:, 4].exp(), 1 - values.sum(-1))
    assert TopTokens(99)(positions()).shape == (N, 2 * V + 1)


def test_bins_add_up_and_enough_of_them_are_the_probabilities():
    p = Z.softmax(-1)
    wanted = torch.stack([p[:, [0, 3, 6]].sum(-1), p[:, [1, 4]].sum(-1), p[:, [2, 5]].sum(-1)], -1)
    torch.testing.assert_close(Binned(3)(positions()), wanted)
    torch.testing.assert_close(Binned(V, temperature=2.0)(positions()), (Z / 2).softmax(-1))


# -- Plackett-Luce ---------------------------------------------------------------------------------------------------

S = torch.tensor([[1.0, 2.0, 0.5, -1.0, 0.0]], dtype=torch.float64)
T = torch.tensor([[1.5, 2.5, 0.0, -0.5, 1.0]], dtype=torch.float64)
Y = torch.tensor([0])


def test_a_ranking_by_hand():
    s = S.clone().requires_grad_()
    loss = plackett_luce(s, T, Y)
    assert float(loss.detach()) == pytest.approx(0.687482, abs=5.1e-7)
    (grad,) = torch.autograd.grad(loss.sum(), s)
    wanted = torch.tensor([[-0.169299, -0.048045, 0.180882, 0.050991, -0.014528]], dtype=torch.float64)
    torch.testing.assert_close(grad, wanted, rtol=0, atol=5.1e-7)
    assert float(grad.sum()) == pytest.approx(0, abs=1e-12)
    # the second outcome is the teacher's first: with it as the label nothing is forced to the front
    assert float(plackett_luce(S, T, torch.tensor([1]))) == pytest.approx(0.645420, abs=5.1e-7)


def test_the_terms_of_the_ranking():
    order, w = [0, 1, 4, 2, 3], T.softmax(-1)[0]
    terms = [float(w[o] * (S[0, order[i:]].logsumexp(0) - S[0, o])) for i, o in enumerate(order)]
    assert terms == pytest.approx([0.336183, 0.198708, 0.142996, 0.009596, 0.0], abs=5.1e-7)
    assert [float(w[o]) for o in order] == pytest.approx([0.213526, 0.580423, 0.129510, 0.047644, 0.028898], abs=5.1e-7)


def test_limits_of_the_ranking():
    assert torch.equal(plackett_luce(S, T, Y, k=4), plackett_luce(S, T, Y))
    torch.testing.assert_close(plackett_luce(S + 7, T, Y), plackett_luce(S, T, Y))
    certain = torch.full_like(T, -1e9).scatter(-1, Y[:, None], 0.0)
    assert float(plackett_luce(S, certain, Y)) == pytest.approx(1.574438, abs=5.1e-7)  # the cross-entropy
    # of the label and the teacher's two likeliest others, with weights of the vocabulary or of these three
    three = plackett_luce(S[:, [0, 1, 4]], T[:, [0, 1, 4]], Y)
    torch.testing.assert_close(plackett_luce(S, T, Y, k=2, renormalise=True), three)
    share = T.softmax(-1)[0, [0, 1, 4]].sum()
    torch.testing.assert_close(plackett_luce(S, T, Y, k=2), share * three)


def test_half_precision_ranks_in_single():
    found = plackett_luce(S.bfloat16(), T.bfloat16(), Y)
    assert found.dtype == torch.float32 and float(found) == pytest.approx(0.687482, rel=1e-2)
