"""Functionals and their statistics: looked up, selected by rows, named, and refused."""

import pytest
import torch
from tests.statistics.whole_logits import ROWS, logits
from tests.worlds import Network

from keel.statistics.engine import Engine
from keel.statistics.functionals import Divergence, Entropy, LogProb, TopK, Value
from keel.statistics.stats import MissingStatistic
from keel.statistics.transforms import KeepMinP


def test_a_missing_statistic_is_named():
    stats = Engine({"policy": Network()}).measure([LogProb()], ROWS)
    with pytest.raises(MissingStatistic, match=r"divergence\(js, ref\) was not measured.*needs.*Measured: log_prob\."):
        stats[Divergence("js")]
    with pytest.raises(KeyError):
        Engine({"policy": Network()}).measure([LogProb(of=("ref",))], ROWS)


def test_selecting_rows_of_statistics():
    engine = Engine({"policy": Network(seed="policy")})
    needs = [LogProb(), TopK(2), Entropy(where="last"), LogProb(where="nll"), TopK(2, where="nll")]
    stats = engine.measure(needs, ROWS)
    index = torch.tensor([2, 0])
    found, wanted = stats.select(index), engine.measure(needs, ROWS.select(index))
    for need in needs:
        assert torch.equal(found[need], wanted[need])
    twice = stats.merged({}).detached().select(torch.tensor([3, 2, 0])).select(torch.tensor([1, 2]), width=5)
    assert torch.equal(twice[LogProb(where="nll")], wanted[LogProb(where="nll")])
    assert torch.equal(twice[LogProb()], wanted[LogProb()][:, :5])


def test_names():
    assert LogProb().name == "log_prob" and Entropy(of=("ref",)).name == "entropy(ref)"
    assert LogProb(of=("old",), transform=KeepMinP(0.02)).name == "log_prob(old, min_p=0.02)"
    assert Divergence("forward_kl").name == "divergence(kl_ref_policy, ref)"
    assert Divergence("js", first="old").name == "divergence(js, old, ref)"
    assert TopK(3, under="ref").name == "top_k(policy, 3, under=ref)"
    assert Value("value", of=("old",)).name == "value(old, value)"
    assert TopK(2, under="policy") == TopK(2) and TopK(2, of=("old",), under="old") == TopK(2, of=("old",))
    assert Divergence("reverse_kl") == Divergence("kl_policy_ref") and TopK(3, under="ref").of == ("policy", "ref")


def test_top_k_of_another_model_by_id():
    """Identities and log-probabilities come in one order, so that a loss may put them together."""
    policy, ref = Network(seed="policy"), Network(seed="ref")
    engine = Engine({"policy": policy, "ref": ref})
    ids, probs = TopK(3, of=("ref",), ids=True), TopK(3, under="ref")
    stats = engine.measure([ids, probs], ROWS)
    z, q = logits(policy, ROWS, 1.0), logits(ref, ROWS, 1.0)
    chosen = q.sort(-1, descending=True).indices[..., :3]
    assert torch.equal(stats[ids][ROWS.mask], chosen[ROWS.mask].float())
    wanted = z.log_softmax(-1).gather(-1, chosen).detach()
    torch.testing.assert_close(stats[probs][ROWS.mask], wanted[ROWS.mask], rtol=0, atol=1e-12)


@pytest.mark.parametrize(
    ("make", "what"),
    [
        (lambda: Divergence("chi3"), "there is no divergence"),
        (lambda: Divergence("js", against="policy", first="ref"), "put the policy first"),
        (lambda: TopK(0), "at least 1"),
    ],
)
def test_functionals_refuse(make, what):
    with pytest.raises(ValueError, match=what):
        make()
