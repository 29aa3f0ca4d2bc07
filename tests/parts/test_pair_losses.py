"""Losses of pairs against the numbers of their reference table, their limits, gradients, masks and refusals.

V1 and V2 are pairs whose log-probabilities sum to the table's numbers, spread evenly over the tokens; the padding holds
garbage.
"""

import math
from dataclasses import replace

import pytest
import torch
from tests.parts.k8 import ALIKE
from torch import Tensor

from keel.core.errors import ConfigError, MethodError
from keel.core.rows import Pairs, Rows, cat
from keel.divergences.family import NAMES
from keel.method import Method
from keel.models.sources import EMA, Initial
from keel.parts.controllers.score_shift import ScoreShift
from keel.parts.terms.features import LengthFeature, LostLikelihood
from keel.parts.terms.length_weights import SharedLength
from keel.parts.terms.links import (
    EXO,
    NCA,
    APODown,
    APOZero,
    BCOPair,
    Bregman,
    DiscoPOP,
    Hinge,
    LogSigmoid,
    SPPOHard,
    SquaredToTarget,
)
from keel.parts.terms.pair_weights import WPO, ScoreGap
from keel.parts.terms.pairs import PairLoss, Side
from keel.parts.terms.score_maps import AlphaReward, FPrime, LogOdds
from keel.parts.terms.scores import LogRatio
from keel.recipes.registry import recipe_named
from keel.statistics.functionals import LogProb
from keel.statistics.squared_mass import LogSquaredMass
from keel.statistics.stats import Stats

V = ((-12.0, -15.0, -13.0, -14.0, 10, 12), (-10.0, -16.0, -11.5, -15.25, 8, 14))  # c, r, c0, r0, lengths
REF, MASS = LogProb(of=("ref",)), LogSquaredMass(stop=("policy",))
GARBAGE = 7.0


def pair(which: int, score=(1.0, 0.0), dtype=torch.float64, label=1.0, margin=0.0) -> tuple[Rows, Stats]:
    """One pair, the chosen completion second; log pi is a leaf."""
    c, r, c0, r0, long, short = V[which]
    lengths = torch.tensor([short, long])
    width = int(lengths.max()) + 2
    mask = torch.arange(width) < lengths[:, None]

    def spread(sums: tuple[float, float]) -> Tensor:
        each = torch.tensor(sums, dtype=dtype) / lengths
        return torch.where(mask, each[:, None], torch.tensor(GARBAGE, dtype=dtype))

    ids, ones = torch.zeros(2, width, dtype=torch.long), torch.ones(1, dtype=dtype)
    rows = Rows.build(
        ids[:, :1],
        torch.ones(2, 1, dtype=torch.bool),
        ids,
        mask,
        weight=torch.ones(2, dtype=dtype),
        group=torch.zeros(2, dtype=torch.long),
        masks={"nll": mask & torch.tensor([[False], [True]])},
        columns={"score": torch.tensor([score[1], score[0]], dtype=dtype)},
        pairs=Pairs(torch.tensor([1]), torch.tensor([0]), ones, ones, label * ones, margin * ones),
    )
    known = {
        LogProb(): spread((r, c)).requires_grad_(),
        REF: spread((r0, c0)),
        MASS: torch.full_like(spread((0, 0)), -0.5),
    }
    return rows, Stats(known)


def loss_of(method: Method, which: int, **known) -> tuple[float, float, float]:
    """The loss, and its derivatives by log pi(y_w) and by log pi(y_l), where every token has the same one."""
    rows, stats = pair(which, **known)
    loss = method.loss(rows, stats, {})
    (grad,) = torch.autograd.grad(loss, stats[LogProb()])
    assert not bool(grad[~rows.mask].any())  # padding
    return float(loss.detach()), float(grad[1, 0]), float(grad[0, 0])


def make(name: str, **arguments) -> Method:
    return recipe_named(name)(**arguments)


def loss(link, score=None, beta=0.1, **more) -> Method:
    """A single term."""
    score = score or LogRatio()
    names = {n for f in PairLoss(link, score, beta, **more).needs for n in f.of} - {"policy"}
    return Method(
        kind="pairs", terms={"pairs": PairLoss(link, score, beta, **more)}, models=dict.fromkeys(names, Initial())
    )


TABLE = {
    "dpo": (make("dpo"), 0.598139, 0.586962),
    "dpo reference-free": (make("dpo", reference_free=True), 0.554355, 0.437488),
    "cdpo": (make("cdpo"), 0.618139, 0.609462),
    "cdpo is an option of dpo": (make("dpo", label_smoothing=0.1), 0.618139, 0.609462),
    "robust dpo": (make("robust_dpo"), 0.573139, 0.558837),
    "ipo": (make("ipo"), 23.200278, 22.647401),
    "ipo, summed": (make("ipo_sum"), 9.0, 7.5625),
    "hinge": (make("hinge"), 0.8, 0.775),
    "hinge, reference-free": (make("hinge", reference_free=True), 0.7, 0.4),
    "slic": (make("slic", delta=5.0), 3.2, 1.0),
    "simpo": (make("simpo"), 0.970968, 0.980760),
    "simpo, beta 2": (make("simpo", beta=2.0, gamma=1.0), 1.241154, 1.474279),
    "alpha_po": (make("alpha_po"), 0.969855, 0.983096),
    "cpo, preference": (make("cpo", cpo_alpha=0.0), 0.554355, 0.437488),
    "cpo": (make("cpo"), 1.754355, 1.687488),
    "orpo": (make("orpo"), 1.265837, 1.327290),
    "tpo, preference": (make("dpo", beta=0.01, reference_free=True), 0.678260, 0.663597),
    "apo_zero": (make("apo_zero"), 0.950042, 0.943829),
    "apo_down": (make("apo_down"), 0.975145, 0.981416),
    "exo": (make("exo"), 2.422015, 2.380645),
    "nca": (make("nca"), 1.338793, 1.334611),
    "bco": (make("bco_pair"), 1.288793, 1.277307),
    "bco, shifted": (make("bco_pair").set("terms.pairs.link.shift", 0.05), 1.289417, 1.276996),
    "discopop": (make("discopop"), 0.814763, 0.796192),
    "dpo_norm": (make("dpo_norm"), 0.684023, 0.681166),
    "dpo_norm, beta 5": (make("dpo_norm", beta=5.0), 0.336365, 0.262045),
    "sppo": (make("sppo_pairs"), 32.0, 30.3125),
    "sft": (make("sft_pairs"), 1.2, 1.25),
    "wpo, basic": (make("wpo", aligned=False), 0.051616, 0.053630),
    "wpo, aligned": (make("wpo"), 0.140306, 0.145781),
    "ld_dpo": (make("ld_dpo"), 0.601899, 0.594129),
    "f_dpo, forward KL": (make("f_dpo", divergence="forward_kl"), 0.582517, 0.602930),
    "f_dpo, JS": (make("f_dpo", divergence="js"), 0.644397, 0.647468),
    "f_dpo, alpha 0.5": (make("f_dpo", divergence="alpha:0.5"), 0.594349, 0.599705),
    "f_dpo, alpha 0.3": (make("f_dpo", divergence="alpha:0.3"), 0.596783, 0.595937),
    "f_dpo, TRL's coefficient 0.7": (make("f_dpo", divergence="alpha:0.7", scaling="keel"), 0.596783, 0.595937),
    "rpo, summed": (make("rpo"), 0.604139, 0.591962),
    "rpo, averaged": (make("rpo", form="averaged", eta=0.2), 0.838139, 0.836962),
    "r_dpo with the table's sign": (make("r_dpo", alpha=-0.01), 0.589185, 0.560766),
    "odpo, offset 0.1": (make("odpo", alpha=0.0, offset=0.1), 0.644397, 0.632599),
    "rebel, gap 0.5": (make("rebel_pairs"), 0.09, 0.075625),
    "bregman, logistic": (make("bregman_po", h="logistic"), 0.598139, 0.586962),
    "flex_dpo": (make("flex_dpo", beta_minus=0.02), 0.634946, 0.614046),
}  # fmt: skip


@pytest.mark.parametrize("name", TABLE)
@pytest.mark.parametrize("which", [0, 1], ids=["V1", "V2"])
def test_the_reference_table(name, which):
    method, *wanted = TABLE[name]
    score = (0.5, 0.0) if name.startswith("rebel") else (1.0, 0.0)
    assert loss_of(method, which, score=score)[0] == pytest.approx(wanted[which], abs=ALIKE)


def test_parts_of_the_table():
    """The log-odds of ORPO, and the weights of WPO."""
    for which, odds, basic, aligned in ((0, 0.070803, 0.086294, 0.234570), (1, -0.153619, 0.091368, 0.248365)):
        rows, stats = pair(which)
        first, second = PairLoss(LogSigmoid(), LogRatio((), norm="mean", map=LogOdds()), 1.0).scores(rows, stats)
        assert float((first - second).detach()) == pytest.approx(odds, abs=ALIKE)
        plain = loss_of(make("dpo"), which)[0]
        for weight, wanted in ((WPO(aligned=False), basic), (WPO(), aligned)):
            weighted = loss_of(loss(LogSigmoid(), weight=weight), which)[0]
            assert weighted / plain == pytest.approx(wanted, abs=ALIKE)


def test_what_the_table_does_not_hold():
    """Worked out by hand: R-DPO as it is derived, ODPO's logarithm and margin, DPOP, Basu's power divergence."""
    assert loss_of(make("r_dpo", alpha=0.01), 0)[0] == pytest.approx(math.log1p(math.exp(-0.18)), abs=1e-12)
    assert loss_of(make("odpo"), 0, score=(3.0, 1.0))[0] == pytest.approx(math.log1p(2 * math.exp(-0.2)), abs=1e-12)
    by_score = make("odpo", alpha=0.5, gap="score")
    assert loss_of(by_score, 0, score=(3.0, 1.0))[0] == pytest.approx(math.log1p(math.exp(0.8)), abs=1e-12)
    of_data = make("odpo", alpha=0.5, gap="data")
    assert loss_of(of_data, 0, margin=2.0)[0] == pytest.approx(math.log1p(math.exp(0.8)), abs=1e-12)
    # V1's chosen completion has gained: nothing to pay; against a swapped pair it has lost one nat
    assert loss_of(make("dpop"), 0)[0] == pytest.approx(0.598139, abs=ALIKE)
    rows, stats = pair(0)
    turned = replace(rows.pairs, chosen=rows.pairs.rejected, rejected=rows.pairs.chosen)
    lost = make("dpop", lam=3.0).loss(rows.with_(pairs=turned), stats, {})
    assert float(lost.detach()) == pytest.approx(math.log1p(math.exp(0.2 + 0.3)), abs=1e-12)
    # h of order k: (R^(1+k) - 1) / (1 + k) - (R^-k - 1) / k at R = exp(-z), z = 0.2
    k, ratio = 0.5, math.exp(-0.2)
    wanted = (ratio ** (1 + k) - 1) / (1 + k) - (ratio**-k - 1) / k
    assert loss_of(make("bregman_po", h="alpha:1.5"), 0)[0] == pytest.approx(wanted, abs=1e-12)
    assert loss_of(make("bregman_po"), 0)[0] == pytest.approx(wanted / 4, abs=1e-12)
    assert loss_of(make("bregman_po", h="2*js"), 0)[0] == pytest.approx(2 * (0.598139 - math.log(2)), abs=2 * ALIKE)
    kl = loss_of(make("bregman_po", h="reverse_kl"), 0)[0]  # R - 1 + log R
    assert kl == pytest.approx(ratio - 1 - 0.2, abs=1e-12)


# -- gradients -------------------------------------------------------------------------------------------------------


def test_the_signs_that_the_table_pins():
    _, chosen, rejected = loss_of(make("dpo"), 0)
    assert chosen == pytest.approx(-0.045017, abs=ALIKE) and rejected == pytest.approx(0.045017, abs=ALIKE)
    assert loss_of(make("ipo"), 0)[1] == pytest.approx(-0.963333, abs=ALIKE)
    assert loss_of(make("ipo_sum"), 0)[1] == pytest.approx(-6.0, abs=ALIKE)
    assert loss_of(make("apo_zero"), 0)[1] == pytest.approx(-0.024938, abs=ALIKE)
    assert loss_of(make("exo"), 0)[1] == pytest.approx(-0.166003, abs=ALIKE)


GRADIENTS = {name: TABLE[name][0] for name in TABLE if not name.startswith("wpo")} | {
    "dpop": make("dpop"),
    "bregman": make("bregman_po"),
    "r_dpo": make("r_dpo"),
    **{
        f"f_dpo {n}": make("f_dpo", divergence=n)
        for n in ("jeffreys", "chi2", "neyman", "hellinger", "kl_chi2", "alpha:-0.5")
    },
}


@pytest.mark.parametrize("name", GRADIENTS)
def test_gradients_are_those_of_the_value(name):
    """By central differences at a token of each side."""
    method = GRADIENTS[name]
    rows, stats = pair(1)
    (grad,) = torch.autograd.grad(method.loss(rows, stats, {}), stats[LogProb()])
    live = stats[LogProb()].detach()
    for b, t in ((0, 0), (0, 13), (1, 0), (1, 7)):
        step = torch.zeros_like(live)
        step[b, t] = 1e-6
        up, down = (method.loss(rows, stats.merged({LogProb(): live + s}), {}) for s in (step, -step))
        assert float(up - down) / 2e-6 == pytest.approx(float(grad[b, t]), abs=2e-8)


def test_the_weight_of_wpo_is_held_constant():
    plain, weighted = loss_of(make("dpo"), 1), loss_of(make("wpo"), 1)
    assert weighted[1] == pytest.approx(0.248365 * plain[1], rel=1e-5) and weighted[2] == pytest.approx(-weighted[1])


def test_flex_gradients():
    """In probability space the rejected side feels pi_w / pi_l times what the chosen one feels; with Flex less."""
    for beta_minus, wanted in ((0.1, (-0.215563, 4.311259, 20.0)), (0.02, (None, None, 4.0))):
        pi = torch.tensor([0.2, 0.01], dtype=torch.float64, requires_grad=True)
        rows, _ = pair(0)
        one = rows.with_(mask=torch.arange(rows.tokens.shape[1])[None].expand(2, -1) < 1)
        live = torch.zeros(rows.tokens.shape, dtype=torch.float64).index_put(
            (torch.tensor([1, 0]), torch.tensor([0, 0])), pi.log()
        )
        ref = torch.zeros_like(live.detach())
        ref[:, 0] = torch.tensor([0.12, 0.15], dtype=torch.float64).log()
        method = make("flex_dpo", beta_minus=beta_minus)
        (grad,) = torch.autograd.grad(method.loss(one, Stats({LogProb(): live, REF: ref}), {}), pi)
        assert float(-grad[1] / grad[0]) == pytest.approx(wanted[2], abs=1e-9)
        if wanted[0] is not None:
            assert grad.tolist() == pytest.approx(list(wanted[:2]), abs=ALIKE)
    _, chosen, rejected = loss_of(make("flex_dpo", beta_minus=0.02), 0)
    margin = 0.1 * 1 - 0.02 * -1
    assert chosen + rejected == pytest.approx(-0.08 / (1 + math.exp(margin)), abs=1e-12)


def test_discopop_rises_around_a_lead_of_0():
    """At z = 0 its slope is (1 - log 2) / (4 tau) - 3/4."""
    none = torch.zeros(1, dtype=torch.float64)
    for tau, wanted in ((0.05, 0.784264), (1.0, -0.673287)):
        z = none.clone().requires_grad_()
        (slope,) = torch.autograd.grad(DiscoPOP(tau)(z, none, none).sum(), z)
        assert float(slope) == pytest.approx(wanted, abs=ALIKE)


# -- limits ----------------------------------------------------------------------------------------------------------

LIMITS = {
    "f_dpo reverse KL": (make("f_dpo", divergence="reverse_kl"), make("dpo")),
    "f_dpo alpha 0": (make("f_dpo", divergence="alpha:0"), make("dpo")),
    "f_dpo alpha 1 is the forward KL": (make("f_dpo", divergence="alpha:1"), make("f_dpo", divergence="forward_kl")),
    "flex_dpo": (make("flex_dpo", beta_minus=0.1), make("dpo")),
    "rpo": (make("rpo", eta=0.0), make("dpo")),
    "rpo, averaged": (make("rpo", eta=0.0, form="averaged"), make("dpo")),
    "ld_dpo": (make("ld_dpo", tail=1.0), make("dpo")),
    "r_dpo": (make("r_dpo", alpha=0.0), make("dpo")),
    "odpo": (make("odpo", alpha=0.0), make("dpo")),
    "dpop": (make("dpop", lam=0.0), make("dpo")),
    "bregman_po": (make("bregman_po", h="logistic"), make("dpo")),
    "tr_dpo": (make("tr_dpo", alpha=0.0), make("dpo")),
    "cdpo": (make("cdpo", label_smoothing=0.0), make("dpo")),
    "robust_dpo": (make("robust_dpo", label_smoothing=0.0), make("dpo")),
    "alpha_po": (make("alpha_po", alpha=0.0), make("simpo")),
    "cpo": (make("cpo", cpo_alpha=0.0), make("dpo", reference_free=True)),
}


@pytest.mark.parametrize("name", LIMITS)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_limits_bit_for_bit(name, dtype):
    found, wanted = (loss_of(method, 1, dtype=dtype) for method in LIMITS[name])
    assert found == wanted


def test_small_alpha_is_near_its_limit():
    near = [(make("f_dpo", divergence="alpha:1e-6"), make("dpo")), (make("alpha_po", alpha=1e-6), make("simpo"))]
    for small, limit in near:
        assert loss_of(small, 1)[0] == pytest.approx(loss_of(limit, 1)[0], abs=1e-6)


@pytest.mark.parametrize("divergence", ["reverse_kl", "forward_kl", "js", "alpha:0.5", "jeffreys", "chi2", "hellinger"])
def test_every_f_starts_at_log_2(divergence):
    rows, stats = pair(1)
    same = stats.merged({LogProb(): stats[REF]})
    assert float(make("f_dpo", divergence=divergence).loss(rows, same, {})) == pytest.approx(math.log(2), abs=1e-12)


def test_margins_of_f_dpo():
    x = torch.tensor([1.0, -1.0], dtype=torch.float64)
    for name, wanted in (("reverse_kl", 2.0), ("forward_kl", 2.350402), ("2*js", 1.0), ("alpha:0.5", 2.084381)):
        first, second = FPrime(name)(x).tolist()
        assert first - second == pytest.approx(wanted, abs=ALIKE)


# -- what they are made of -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["dpo", "orpo", "discopop", "f_dpo, forward KL", "wpo, aligned", "slic", "exo"])
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-5), (torch.bfloat16, 3e-2)])
def test_precisions(name, dtype, tolerance):
    assert loss_of(TABLE[name][0], 1, dtype=dtype)[0] == pytest.approx(TABLE[name][2], rel=tolerance)


@pytest.mark.parametrize("name", ["dpo", "ipo", "ld_dpo", "orpo", "wpo, aligned", "r_dpo with the table's sign", "cpo"])
def test_padding_and_company(name):
    """More columns, and a second pair of weight 0, change nothing."""
    method, *wanted = TABLE[name]
    (rows, stats), (more, beside) = pair(0), pair(1)
    wide = rows.padded(1, 20)
    widened = Stats({f: torch.nn.functional.pad(v, (0, 20 - v.shape[1]), value=-3.0) for f, v in stats.items()})
    assert float(method.loss(wide, widened, {}).detach()) == pytest.approx(wanted[0], abs=ALIKE)
    longer = Stats({f: torch.nn.functional.pad(v, (0, 20 - v.shape[1]), value=-3.0) for f, v in beside.items()})
    both = Stats({f: torch.cat([widened[f], longer[f]]) for f in widened})
    out = more.padded(1, 20)
    nothing = replace(out.pairs, measure=0 * out.pairs.measure)
    out = out.with_(weight=0 * out.weight, group=out.group + 1, pairs=nothing)
    assert float(method.loss(cat([wide, out]), both, {}).detach()) == pytest.approx(wanted[0], abs=ALIKE)


def test_tails_follow_tokens_and_not_columns():
    """The first min(L_w, L_l) tokens that a model chose are shared, whatever lies between them."""
    mask = torch.tensor([[1, 0, 1, 1, 0], [1, 1, 0, 0, 0]]).bool()
    ids = torch.zeros(2, 5, dtype=torch.long)
    rows = Rows.build(ids[:, :1], torch.ones(2, 1, dtype=torch.bool), ids, mask)
    side = Side(rows, Stats({}), torch.tensor([0]), torch.tensor([1]))
    assert SharedLength(0.25)(side)[0][mask[0]].tolist() == [1.0, 1.0, 0.25]


def test_extreme_scores_are_finite():
    """A rejected completion that has lost 1,000 nats, and a certain one."""
    rows, stats = pair(0)
    for shift in (-1000.0, 0.0):
        live = stats[LogProb()].detach().clone()
        live[0, :12] = shift / 12
        if not shift:
            live[1, :10] = 0.0
        for name in (*NAMES, "alpha:-0.5", "alpha:0.5", "alpha:2.5"):
            if name in ("tv", "alpha"):
                continue
            for method in (make("f_dpo", divergence=name), make("bregman_po", h=name)):
                leaf = live.float().requires_grad_()
                known = Stats({LogProb(): leaf, REF: stats[REF].float()})
                value = method.loss(rows, known, {})
                (grad,) = torch.autograd.grad(value, leaf)
                assert bool(value.isfinite()) and bool(grad.isfinite().all()), name
        for name in ("orpo", "discopop", "alpha_po", "exo", "dpop"):
            leaf = live.float().requires_grad_()
            value = make(name).loss(rows, Stats({LogProb(): leaf, REF: stats[REF].float()}), {})
            (grad,) = torch.autograd.grad(value, leaf)
            assert bool(value.isfinite()) and bool(grad.isfinite().all()), name


def test_labels_and_margins_of_the_data():
    """A label of 0.9 is a smoothing of 0.1 of that pair."""
    assert loss_of(make("dpo"), 1, label=0.9)[0] == pytest.approx(0.609462, abs=ALIKE)
    assert loss_of(loss(LogSigmoid(), margin=1.0), 1, margin=0.1)[0] == pytest.approx(0.632599, abs=ALIKE)


@pytest.mark.parametrize("link", [NCA(), BCOPair(), APOZero(), APODown(), SPPOHard()])
def test_links_of_both_scores_feel_a_common_shift(link):
    first, second, none = torch.tensor([0.3]), torch.tensor([-0.2]), torch.zeros(1)
    assert link.both and not torch.allclose(link(first, second, none), link(first + 1, second + 1, none))


@pytest.mark.parametrize(
    "link", [LogSigmoid(), Hinge(), SquaredToTarget(), EXO(), DiscoPOP(), Bregman(), Bregman("chi2")]
)
def test_links_of_the_difference_do_not(link):
    first, second, none = (torch.tensor([x], dtype=torch.float64) for x in (0.3, -0.2, 0.0))
    assert not link.both
    torch.testing.assert_close(link(first, second, none), link(first + 1, second + 1, none))
    torch.testing.assert_close(link(first, second, none + 0.1), link(first - 0.1, second, none))


# -- refusals --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("link", [NCA(), BCOPair(), APOZero(), APODown(), SPPOHard()])
def test_scores_known_up_to_a_constant_are_refused(link):
    for score in (LogRatio(map=FPrime("js")), LogRatio(map=FPrime("forward_kl")), LogRatio((), map=AlphaReward(0.5))):
        with pytest.raises(MethodError, match="up to a constant"):
            PairLoss(link, score)
    PairLoss(link, LogRatio(map=FPrime("reverse_kl")))


def test_scales_that_differ_are_refused():
    score = LogRatio(map=FPrime("js"))
    with pytest.raises(MethodError, match="cancels only where"):
        PairLoss(LogSigmoid(), score, rejected=LogRatio(map=FPrime("js"), scale=0.5))
    PairLoss(LogSigmoid(), score, rejected=LogRatio(map=FPrime("js"), features=(LengthFeature(0.1),)))


BAD = {
    "epsilon must": lambda: EXO(0.0),
    "epsilon must be in": lambda: EXO(0.5),
    "unit must": lambda: SquaredToTarget(unit=0.0),
    "unit must not": lambda: SPPOHard(0.0),
    "tau must": lambda: DiscoPOP(0.0),
    "no curvature": lambda: Bregman("tv"),
    "no divergence 'kl'": lambda: Bregman("kl"),
    "is flat": lambda: FPrime("tv"),
    "no divergence 'nonsense'": lambda: FPrime("nonsense"),
    "tail must": lambda: SharedLength(1.5),
    "coef must": lambda: LostLikelihood(-1.0),
    "decay must": lambda: ScoreShift(decay=1.0),
    "kappa must": lambda: EMA(1.0),
    "every must": lambda: EMA(0.4, 0),
    "label_smoothing must": lambda: make("robust_dpo", label_smoothing=0.5),
    "alpha must": lambda: make("tr_dpo", alpha=1.5),
}


@pytest.mark.parametrize("text", BAD)
def test_bad_settings(text):
    with pytest.raises((ValueError, ConfigError), match=text):
        BAD[text]()


def test_a_gap_needs_scores():
    rows, stats = pair(0)
    with pytest.raises(MethodError, match="data have none"):
        loss(LogSigmoid(), margin=1.0, gap=ScoreGap()).loss(rows.with_(columns={}), stats, {})
