"""The engine against autograd on whole logits, against itself on other paths, and against finite differences."""

import copy
import math
from collections.abc import Callable

import pytest
import torch
from tests.worlds import EVERYTHING, Network, noise, text_rows
from torch import Tensor, nn

from keel.core.rows import Pairs, Rows
from keel.models.heads import Critic
from keel.statistics.engine import Engine
from keel.statistics.functionals import Divergence, Entropy, LogProb, TopK, TopPEntropy, Value
from keel.statistics.stats import MissingStatistic, Stats
from keel.statistics.transforms import Chain, KeepMinP, KeepTopK, KeepTopP, Power, Temperature

ROWS = text_rows()
WEIRD = Chain((Temperature(0.7), KeepTopP(0.8), Power(1.5)))


# -- the oracle: whole logits, plain formulas, autograd --------------------------------------------------------------


def logits(model: Network, rows: Rows, temperature: float) -> Tensor:
    z = model.output(model.hidden(rows)) * model.head.scale
    z = z if model.head.softcap is None else model.head.softcap * torch.tanh(z / model.head.softcap)
    return z / temperature


def nucleus(z: Tensor, p: float) -> Tensor:
    ordered, order = z.softmax(-1).sort(-1, descending=True)
    before = ordered.cumsum(-1) - ordered
    keep = torch.zeros_like(z, dtype=torch.bool).scatter(-1, order, before < p)
    return z.masked_fill(~keep, -math.inf)


def weird(z: Tensor) -> Tensor:
    return nucleus(z / 0.7, 0.8) * 1.5


def log_prob(z: Tensor, rows: Rows) -> Tensor:
    return z.log_softmax(-1).gather(-1, rows.tokens[..., None])[..., 0]


def entropy(z: Tensor) -> Tensor:
    p = z.softmax(-1)
    return -(p * torch.where(p > 0, p, 1.0).log()).sum(-1)


def kl(a: Tensor, b: Tensor) -> Tensor:
    return (a.softmax(-1) * (a.log_softmax(-1) - b.log_softmax(-1))).sum(-1)


def js(a: Tensor, b: Tensor) -> Tensor:
    m = ((a.softmax(-1) + b.softmax(-1)) / 2).log()
    return (kl(a, m) + kl(b, m)) / 2


def last(x: Tensor, rows: Rows) -> Tensor:
    place = torch.where(rows.mask, torch.arange(x.shape[1]), -1).amax(1)
    return x[torch.arange(len(x)), place]


Oracle = Callable[[Tensor, Tensor, Rows], Tensor]
FUNCTIONALS: dict = {
    LogProb(): lambda z, q, rows: log_prob(z, rows),
    LogProb(transform=Temperature(0.7)): lambda z, q, rows: log_prob(z / 0.7, rows),
    LogProb(transform=WEIRD): lambda z, q, rows: log_prob(weird(z), rows),
    LogProb(transform=KeepTopK(7)): lambda z, q, rows: log_prob(
        z.masked_fill(z < z.topk(7, -1).values[..., -1:], -math.inf), rows
    ),
    Entropy(): lambda z, q, rows: entropy(z),
    Entropy(transform=WEIRD): lambda z, q, rows: entropy(weird(z)),
    Entropy(transform=KeepMinP(0.2)): lambda z, q, rows: entropy(
        z.masked_fill(z.softmax(-1) < 0.2 * z.softmax(-1).amax(-1, keepdim=True), -math.inf)
    ),
    TopPEntropy(0.6): lambda z, q, rows: entropy(nucleus(z, 0.6)),
    Divergence("kl_policy_ref"): lambda z, q, rows: kl(z, q),
    Divergence("kl_ref_policy"): lambda z, q, rows: kl(q, z),
    Divergence("js"): lambda z, q, rows: js(z, q),
    TopK(3): lambda z, q, rows: z.log_softmax(-1).sort(-1, descending=True).values[..., :3],
    TopK(3, under="ref"): lambda z, q, rows: z.log_softmax(-1).gather(-1, q.sort(-1, descending=True).indices[..., :3]),
    LogProb(where="last"): lambda z, q, rows: last(log_prob(z, rows), rows),
    TopK(2, where="last"): lambda z, q, rows: last(z.log_softmax(-1).sort(-1, descending=True).values[..., :2], rows),
    Divergence("js", where="last"): lambda z, q, rows: last(js(z, q), rows),
    LogProb(where="nll"): lambda z, q, rows: log_prob(z, rows)[rows.masks["nll"]],
    TopK(2, where="nll"): lambda z, q, rows: (
        z.log_softmax(-1).sort(-1, descending=True).values[..., :2][rows.masks["nll"]]
    ),
    Entropy(where="nll"): lambda z, q, rows: entropy(z)[rows.masks["nll"]],
}
PATHS = {
    "one pass": dict(max_tokens=EVERYTHING),
    "one pass, a position a chunk": dict(max_tokens=EVERYTHING, chunk_bytes=1),
    "two passes": dict(max_tokens=20),
    "two passes, a row each, two positions a chunk": dict(max_tokens=1, chunk_bytes=2 * 4 * 11),
}


def masked(value: Tensor, functional, rows: Rows) -> Tensor:
    if functional.where != "mask":
        return value
    shown = rows.mask.reshape(*rows.mask.shape, *(1,) * (value.dim() - 2))
    return torch.where(shown, value, torch.zeros_like(value))


def mixture(values: list[Tensor]) -> Tensor:
    """A loss that couples everything with everything."""
    total = torch.zeros((), dtype=torch.float64)
    for i, value in enumerate(values):
        finite = torch.where(value > -math.inf, value, torch.zeros_like(value))
        weight = noise("mixture", i, shape=tuple(value.shape))
        total = total + (weight * torch.sin(finite + i)).sum() + 0.01 * finite.sum() ** 2
    return total * torch.tanh(total)


def by_autograd(functionals, policy, ref, rows, temperature) -> tuple[Tensor, list[Tensor]]:
    policy.zero_grad()
    z = logits(policy, rows, temperature)
    with torch.no_grad():
        q = logits(ref, rows, temperature)
    values = [masked(FUNCTIONALS[f](z, q, rows), f, rows) for f in functionals]
    loss = mixture(values)
    loss.backward()
    return loss.detach(), values


def gradients(module: nn.Module) -> dict[str, Tensor]:
    found = {n: torch.zeros_like(p) if p.grad is None else p.grad.clone() for n, p in module.named_parameters()}
    module.zero_grad()
    return found


def assert_gradients(found: dict[str, Tensor], wanted: dict[str, Tensor], tolerance: float = 1e-9) -> None:
    for name, grad in wanted.items():
        torch.testing.assert_close(
            found[name], grad, rtol=tolerance, atol=tolerance * max(1.0, float(grad.abs().max()))
        )


@pytest.mark.parametrize("functional", FUNCTIONALS, ids=str)
def test_each_functional(functional):
    policy, ref = Network(seed="policy"), Network(seed="ref")
    wanted, values = by_autograd([functional], policy, ref, ROWS, 0.8)
    grads = gradients(policy)
    assert max(float(g.abs().max()) for g in grads.values()) > 1e-3
    engine = Engine({"policy": policy, "ref": ref}, temperature=0.8, max_tokens=20, chunk_bytes=3 * 4 * 11)
    loss, stats = engine.step([functional], ROWS, Stats(), lambda rows, stats: mixture([stats[functional]]))
    torch.testing.assert_close(loss, wanted, rtol=1e-10, atol=1e-10)
    torch.testing.assert_close(stats[functional], values[0].detach(), rtol=1e-10, atol=1e-10)
    assert_gradients(gradients(policy), grads)
    torch.testing.assert_close(engine.measure([functional], ROWS)[functional], stats[functional], rtol=0, atol=1e-12)


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize(
    ("shape", "temperature"), [({}, 1.0), ({"scale": 0.5, "softcap": 3.0}, 0.6)], ids=["plain", "scaled and capped"]
)
def test_all_functionals_at_once_on_every_path(path, shape, temperature):
    policy, ref = Network(seed="policy", **shape), Network(seed="ref", **shape)
    functionals = list(FUNCTIONALS)
    wanted, _ = by_autograd(functionals, policy, ref, ROWS, temperature)
    grads = gradients(policy)
    engine = Engine({"policy": policy, "ref": ref}, temperature=temperature, **PATHS[path])
    loss, _ = engine.step(functionals, ROWS, Stats(), lambda rows, stats: mixture([stats[f] for f in functionals]))
    torch.testing.assert_close(loss, wanted, rtol=1e-10, atol=1e-10)
    assert_gradients(gradients(policy), grads)
    assert all(p.grad is None for p in ref.parameters())


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("kind", ["head", "model"])
def test_values(kind, path):
    """A head on the policy's states, or a critic with a body of its own, beside a functional of the policy."""
    policy = Network(seed="policy")
    critic = critic_of(policy, kind)
    rows = ROWS
    value = critic(critic.hidden(rows) if kind == "model" else policy.hidden(rows)) * rows.mask
    z = logits(policy, rows, 1.0)
    wanted = mixture([value, masked(log_prob(z, rows), LogProb(), rows), last(value, rows)])
    wanted.backward()
    grads, critic_grads = gradients(policy), gradients(critic)
    assert float(critic_grads["weight" if kind == "head" else "head.weight"].abs().max()) > 1e-3
    needs = [Value("value"), LogProb(), Value("value", where="last")]
    engine = Engine({"policy": policy}, {"value": critic}, **PATHS[path])
    loss, _ = engine.step(needs, rows, Stats(), lambda rows, stats: mixture([stats[f] for f in needs]))
    torch.testing.assert_close(loss, wanted.detach(), rtol=1e-10, atol=1e-10)
    assert_gradients(gradients(policy), grads)
    assert_gradients(gradients(critic), critic_grads)


def critic_of(policy: Network, kind: str) -> nn.Module:
    critic = Critic(kind).build(policy, 0).double()
    with torch.no_grad():
        for i, parameter in enumerate(critic.parameters()):
            parameter += 0.5 * noise("critic", i, shape=tuple(parameter.shape))
    return critic


def test_a_head_learns_though_the_policy_is_held():
    policy = Network(seed="policy")
    critic = critic_of(policy, "head")
    held = Value("value", stop=("policy",))
    Engine({"policy": policy}, {"value": critic}).step(
        [held], ROWS, Stats(), lambda rows, stats: mixture([stats[held]])
    )
    assert not any(bool(g.any()) for g in gradients(policy).values())
    found = gradients(critic)
    mixture([critic(policy.hidden(ROWS).detach()) * ROWS.mask]).backward()
    assert_gradients(found, gradients(critic))


@pytest.mark.parametrize("path", PATHS)
def test_what_is_held_gets_no_gradient(path):
    policy, ref = Network(seed="policy"), Network(seed="ref")
    held, free = Divergence("kl_policy_ref", stop=("policy",)), LogProb()
    z, q = logits(policy, ROWS, 1.0), logits(ref, ROWS, 1.0)
    constant = masked(kl(z, q), held, ROWS).detach()
    mixture([constant, masked(log_prob(z, ROWS), free, ROWS)]).backward()
    wanted = gradients(policy)
    engine = Engine({"policy": policy, "ref": ref}, **PATHS[path])
    engine.step([held, free], ROWS, Stats(), lambda rows, stats: mixture([stats[held], stats[free]]))
    assert_gradients(gradients(policy), wanted)


def test_finite_differences():
    """The engine's gradient against its own values at moved parameters."""
    policy, ref = Network(seed="policy"), Network(seed="ref")
    functionals = [f for f in FUNCTIONALS if getattr(f, "transform", None) is None]  # filters jump
    engine = Engine({"policy": policy, "ref": ref}, max_tokens=20)
    engine.step(functionals, ROWS, Stats(), lambda rows, stats: mixture([stats[f] for f in functionals]))
    grads = gradients(policy)

    def loss() -> float:
        stats = engine.measure(functionals, ROWS)
        return float(mixture([stats[f] for f in functionals]))

    for name, parameter in policy.named_parameters():
        for index in {0, parameter.numel() // 2, parameter.numel() - 1}:
            with torch.no_grad():
                flat = parameter.view(-1)
                flat[index] += 1e-6
                up = loss()
                flat[index] -= 2e-6
                down = loss()
                flat[index] += 1e-6
            assert (up - down) / 2e-6 == pytest.approx(float(grads[name].view(-1)[index]), rel=1e-5, abs=1e-6)


# -- one gradient path, several ways ---------------------------------------------------------------------------------


def additive_loss(rows: Rows, stats: Stats) -> Tensor:
    """A weighted mean, whose denominator a slice takes from the step."""
    weight = rows.loss_mask * rows.weight[:, None]
    whole = float(weight.sum()) if rows.totals is None else rows.totals.tokens
    total = (weight * stats[LogProb()] * stats[LogProb(of=("ref",))].exp()).sum()
    return (
        total + (stats[Entropy(where="last")] * rows.weight).sum() + stats[TopPEntropy(0.7, where="nll")].sum()
    ) / whole


@pytest.mark.parametrize("dropout", [False, True])
def test_the_additive_path(dropout):
    """Frozen and live statistics of every shape; with dropout, the same noise in the same micro-batches."""
    policy, ref = Network(seed="policy", dropout=0.5), Network(seed="ref")
    live = [LogProb(), Entropy(where="last"), TopPEntropy(0.7, where="nll")]
    engine = Engine({"policy": policy, "ref": ref}, max_tokens=10, dropout=dropout)
    assert len(engine.split(ROWS)) > 2
    frozen = engine.measure([LogProb(of=("ref",)), LogProb(of=("ref",), where="nll")], ROWS)
    two_loss, two = engine.step(live, ROWS, frozen, additive_loss)
    two_grads = gradients(policy)
    one_loss, one = engine.step(live, ROWS, frozen, additive_loss, additive=True)
    torch.testing.assert_close(one_loss, two_loss, rtol=1e-12, atol=1e-12)
    assert_gradients(gradients(policy), two_grads)
    assert set(one) == set(two) == {*live, *frozen}
    for functional in one:
        torch.testing.assert_close(one[functional], two[functional], rtol=1e-12, atol=1e-12)


def test_dropout_is_replayed():
    """The second pass repeats the noise of the first: the gradient is that of the statistics that the loss saw."""
    policy = Network(seed="policy", dropout=0.5)
    engine = Engine({"policy": policy}, max_tokens=20, dropout=True)
    state = torch.random.get_rng_state()
    _, noisy = engine.step(
        [LogProb()], ROWS, Stats(), lambda rows, stats: stats[LogProb()].square().sum(), counter=(3,)
    )
    grads = gradients(policy)
    assert torch.equal(torch.random.get_rng_state(), state) and not policy.training
    wanted = torch.zeros((), dtype=torch.float64)
    for i, index in enumerate(engine.split(ROWS)):
        part = ROWS.select(index).trim()
        with engine._dropout("policy", (3, i)):
            value = masked(log_prob(logits(policy, part, 1.0), part), LogProb(), part)
        torch.testing.assert_close(value.detach(), noisy[LogProb()][index, : value.shape[1]])
        wanted = wanted + value.square().sum()
    wanted.backward()
    assert_gradients(grads, gradients(policy))


def test_dropout_differs_between_steps_and_is_off_elsewhere():
    policy = Network(seed="policy", dropout=0.5)
    engine = Engine({"policy": policy}, dropout=True)
    loss = lambda rows, stats: stats[LogProb()].sum()  # noqa: E731
    runs = [engine.step([LogProb()], ROWS, Stats(), loss, counter=c)[1][LogProb()] for c in ((0, 1), (0, 1), (0, 2))]
    assert torch.equal(runs[0], runs[1]) and not torch.allclose(runs[0], runs[2])
    plain = Engine({"policy": policy}).measure([LogProb()], ROWS)[LogProb()]
    assert torch.equal(engine.measure([LogProb()], ROWS)[LogProb()], plain)
    assert not torch.allclose(runs[0], plain)


@pytest.mark.parametrize("max_tokens", [EVERYTHING, 20])
def test_bf16_head(max_tokens):
    """Gradients agree with autograd up to bf16, whose products depend on the batch; the softmax itself is in fp32."""
    policy = Network(seed="policy", dtype=torch.bfloat16)
    z = policy.output(policy.hidden(ROWS)).float()
    values = [masked(log_prob(z, ROWS), LogProb(), ROWS), masked(entropy(z), Entropy(), ROWS)]
    wanted = values[0].mean() + values[1].square().mean()
    wanted.backward()
    grads = gradients(policy)
    engine = Engine({"policy": policy}, max_tokens=max_tokens, chunk_bytes=4 * 4 * 11)

    def loss(rows, stats):
        return stats[LogProb()].mean() + stats[Entropy()].square().mean()

    found, stats = engine.step([LogProb(), Entropy()], ROWS, Stats(), loss)
    assert stats[LogProb()].dtype == torch.float32
    torch.testing.assert_close(stats[LogProb()], values[0].detach(), rtol=0.02, atol=0.02)
    torch.testing.assert_close(found, wanted.detach(), rtol=0.02, atol=0.02)
    for name, grad in gradients(policy).items():
        assert grad.dtype == torch.bfloat16
        torch.testing.assert_close(grad, grads[name], rtol=0.05, atol=0.03 * float(grads[name].abs().max()))
    whole = engine.measure([TopK(11)], ROWS)[TopK(11)][ROWS.mask]
    assert float((whole.exp().sum(-1) - 1).abs().max()) < 1e-6


def test_a_loss_over_pairs_may_be_split():
    """Chosen and rejected rows fall into different micro-batches."""
    ones = torch.ones(2, dtype=torch.float64)
    rows = ROWS.with_(pairs=Pairs(torch.tensor([0, 3]), torch.tensor([1, 2]), ones, ones, ones, 0 * ones))

    def loss(rows, stats):
        score = stats[LogProb()].sum(1)
        return -torch.nn.functional.logsigmoid(score[rows.pairs.chosen] - score[rows.pairs.rejected]).mean()

    found = {}
    for max_tokens in (EVERYTHING, 1):
        policy = Network(seed="policy")
        value, _ = Engine({"policy": policy}, max_tokens=max_tokens).step([LogProb()], rows, Stats(), loss)
        found[max_tokens] = (value, gradients(policy))
    torch.testing.assert_close(found[1][0], found[EVERYTHING][0], rtol=1e-12, atol=1e-12)
    assert_gradients(found[1][1], found[EVERYTHING][1])


# -- what it costs ---------------------------------------------------------------------------------------------------


class Counting(nn.Linear):
    """Records the most positions that it ever saw; being no plain linear layer, its backward goes through autograd."""

    most = 0

    def forward(self, hidden):
        self.most = max(self.most, len(hidden))
        return super().forward(hidden)


@pytest.mark.parametrize("positions", [1, 4])
@pytest.mark.parametrize("max_tokens", [EVERYTHING, 20])
@pytest.mark.parametrize("kind", ["plain", "own"])
def test_logits_exist_for_a_chunk_only(kind, max_tokens, positions):
    policy = Network(seed="policy", head=Counting(6, 11) if kind == "own" else None)
    most = [0]
    policy.output.register_forward_pre_hook(lambda module, given: most.append(len(given[0])))
    engine = Engine({"policy": policy}, max_tokens=max_tokens, chunk_bytes=positions * 4 * 11)
    needs = [LogProb(), TopPEntropy(0.8), TopK(2)]
    engine.step(needs, ROWS, Stats(), lambda rows, stats: mixture([stats[f] for f in needs]))
    assert max(most) == positions
    assert kind == "plain" or policy.output.most == positions


def test_models_run_only_if_they_are_read():
    policy, ref = Network(seed="policy"), Network(seed="ref")
    engine = Engine({"policy": policy, "ref": ref}, max_tokens=EVERYTHING)
    engine.measure([LogProb(), Entropy()], ROWS)
    assert (len(policy.calls), len(ref.calls)) == (1, 0)
    engine.measure([LogProb(of=("ref",))], ROWS)
    assert (len(policy.calls), len(ref.calls)) == (1, 1)
    assert engine.measure([], ROWS) == {} and (len(policy.calls), len(ref.calls)) == (1, 1)
    engine.measure([LogProb(of=("old",))], ROWS, alias={"old": "policy"})
    assert (len(policy.calls), len(ref.calls)) == (2, 1)


def test_frozen_states_are_reused_in_the_second_pass():
    policy, ref = Network(seed="policy"), Network(seed="ref")
    engine = Engine({"policy": policy, "ref": ref}, max_tokens=20)
    batches = len(engine.split(ROWS))
    need = Divergence("js")
    engine.step([need], ROWS, Stats(), lambda rows, stats: stats[need].sum())
    assert (len(policy.calls), len(ref.calls)) == (2 * batches, batches)


@pytest.mark.parametrize("functional", [LogProb(), LogProb(where="last"), LogProb(where="nll")], ids=str)
def test_micro_batches_without_gradient_are_skipped(functional):
    """Only the last row matters to the loss: one body runs again."""
    policy = Network(seed="policy")
    engine = Engine({"policy": policy}, max_tokens=1)
    rows = ROWS.with_(masks={"nll": ROWS.mask})
    only = {"mask": lambda v: v[4].sum(), "last": lambda v: v[4], "nll": lambda v: v[-int(ROWS.lengths[4]) :].sum()}
    loss, _ = engine.step([functional], rows, Stats(), lambda rows, stats: only[functional.where](stats[functional]))
    assert len(engine.split(rows)) == 5 and len(policy.calls) == 6
    found = gradients(policy)
    z = logits(policy, ROWS, 1.0)
    token = log_prob(z, ROWS)
    wanted = token[4][ROWS.mask[4]].sum() if functional.where != "last" else last(token, ROWS)[4]
    wanted.backward()
    torch.testing.assert_close(loss, wanted.detach())
    assert_gradients(found, gradients(policy))


def test_without_any_gradient_nothing_runs_again():
    policy = Network(seed="policy")
    engine = Engine({"policy": policy}, max_tokens=1)
    loss, _ = engine.step([LogProb()], ROWS, Stats(), lambda rows, stats: stats[LogProb()].detach().sum())
    assert len(policy.calls) == 5 and not loss.requires_grad
    assert all(p.grad is None for p in policy.parameters())


# -- micro-batches ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("max_tokens", [1, 9, 14, 20, 40, EVERYTHING])
def test_micro_batches_fit_and_cover(max_tokens):
    engine = Engine({"policy": Network()}, max_tokens=max_tokens)
    plan = engine.split(ROWS)
    assert sorted(i for index in plan for i in index.tolist()) == list(range(5))
    for index in plan:
        part = ROWS.select(index).trim()
        size = len(part) * (part.prompt_ids.shape[1] + part.tokens.shape[1])
        assert size <= max_tokens or len(part) == 1


def test_rows_of_similar_length_share_a_micro_batch():
    """Two long rows and two short ones: 2 x 9 tokens and 2 x 3, not 9 + 3 twice."""
    rows = text_rows(10).select(torch.tensor([0, 3, 5, 8]))
    plan = Engine({"policy": Network()}, max_tokens=18).split(rows)
    assert [sorted(index.tolist()) for index in plan] == [[0, 2], [1, 3]]


def test_order_and_padding_do_not_change_the_numbers():
    policy = Network(seed="policy")
    engine = Engine({"policy": policy}, max_tokens=20)
    wanted = engine.measure([Entropy()], ROWS)[Entropy()]
    order = torch.tensor([3, 1, 4, 0, 2])
    torch.testing.assert_close(engine.measure([Entropy()], ROWS.select(order))[Entropy()], wanted[order])
    padded = engine.measure([Entropy()], ROWS.padded(8, 9))[Entropy()]
    torch.testing.assert_close(padded[:, :6], wanted)
    assert not padded[:, 6:].any() and not wanted[~ROWS.mask].any()


NEEDS = [LogProb(), LogProb(where="last"), TopK(2), TopK(3, where="last"), LogProb(where="nll"), Value("value")]


EMPTY = torch.zeros_like(ROWS.mask)


@pytest.mark.parametrize(
    "rows",
    [ROWS.with_(mask=EMPTY, masks={"nll": EMPTY}), ROWS.select(EMPTY[:, 0])],
    ids=["no tokens", "no rows"],
)
def test_rows_without_tokens(rows):
    policy = Network(seed="policy")
    engine = Engine({"policy": policy}, {"value": critic_of(policy, "head")})
    stats = engine.measure(NEEDS, rows)
    n = len(rows)
    assert [tuple(stats[f].shape) for f in NEEDS] == [(n, 6), (n,), (n, 6, 2), (n, 3), (0,), (n, 6)]
    loss, _ = engine.step(NEEDS, rows, Stats(), lambda rows, stats: sum(stats[f].sum() for f in NEEDS))
    assert float(loss) == 0 and not any(bool(g.any()) for g in gradients(policy).values())


# -- look-up ---------------------------------------------------------------------------------------------------------


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


def test_the_policy_is_left_as_it_was():
    policy = Network(seed="policy")
    before = copy.deepcopy(policy.state_dict())
    Engine({"policy": policy}, max_tokens=20).step(
        [LogProb()], ROWS, Stats(), lambda rows, stats: stats[LogProb()].sum()
    )
    assert all(torch.equal(before[name], value) for name, value in policy.state_dict().items())
