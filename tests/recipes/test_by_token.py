"""What an update does to each token: the parts of the loss, and its gradient, taken apart and put together again."""

import pytest
import torch
from tests.worlds import models_of, outcome

from keel.core.aggregate import Aggregation
from keel.core.rows import Rows
from keel.method import Method
from keel.models.sources import Initial
from keel.parts.advantages.group import GroupCentre
from keel.parts.terms.penalties import NegativeEntropy, SampledKL, Summand
from keel.parts.terms.surrogate import Clipped, LogLikelihood, Surrogate
from keel.parts.weights.importance import TruncatedImportance
from keel.recipes.registry import recipe_named, recipes
from keel.rollouts.rollout import Rollout
from keel.statistics.functionals import Entropy, LogProb
from keel.statistics.stats import Stats

ONLINE = [name for name, recipe in recipes().items() if recipe().kind == "online"]
ONLY_LOG_PROBS = [name for name in ONLINE if {f.name for f in recipe_named(name)().live_needs()} == {"log_prob"}]
OLD, REF = LogProb(of=("old",)), LogProb(of=("ref",))


def two_tokens(advantage: float, gap: list[float]) -> tuple[Rows, Stats]:
    """One row of two tokens with ratios exp(gap), and a third that is padding."""
    mask = torch.tensor([[True, True, False]])
    rows = Rows.build(torch.zeros(1, 1, dtype=torch.long), mask[:, :1], torch.zeros(1, 3, dtype=torch.long), mask)
    old = torch.tensor([[-1.0, -2.0, 0.0]])
    live = old + torch.tensor([[*gap, 0.0]])
    rows = rows.with_(advantage=torch.full((1, 3), advantage), logp={"behaviour": old - torch.tensor([0.5, 0.0, 0.0])})
    return rows, Stats({LogProb(): live, OLD: old, REF: old - 1.0, Entropy(): torch.tensor([[0.3, 0.6, 0.0]])})


def method(**slots) -> Method:
    return Method(rollout=Rollout(), advantage={"centre": GroupCentre()}, **slots)


def test_the_numbers_of_a_clipped_step():
    """rho = (1.5, 1): the first token is beyond the clip, and its gradient 0; of the second it is -A rho / 2."""
    found = method(surrogate=Surrogate(Clipped(0.2))).by_token(*two_tokens(2.0, [0.405465108, 0.0]), {})
    assert found["ratio"][0, :2].tolist() == pytest.approx([1.5, 1.0])
    assert found["term/policy"][0, :2].tolist() == pytest.approx([-2.4, -2.0])
    assert found["gradient"][0].tolist() == pytest.approx([0.0, -1.0, 0.0])
    assert set(found) == {"ratio", "term/policy", "gradient", "gradient/policy"}


def test_the_numbers_of_weights_and_terms():
    """Weights min(e^0.5, 1.2) and 1; k2 of a gap of 1 is 1/2, its slope coef / 2; an entropy bonus has none there."""
    terms = {"kl": Summand(SampledKL("k2"), 0.3), "bonus": Summand(NegativeEntropy(), 0.1)}
    weights = {"cap": TruncatedImportance(1.2)}
    parts = method(surrogate=Surrogate(LogLikelihood()), weights=weights, terms=terms, models={"ref": Initial()})
    found = parts.by_token(*two_tokens(1.0, [0.0, 0.0]), {})
    assert found["weight/cap"][0].tolist() == pytest.approx([1.2, 1.0, 1.0])
    assert found["term/kl"][0, :2].tolist() == pytest.approx([0.15, 0.15])
    assert found["term/bonus"][0, :2].tolist() == pytest.approx([-0.03, -0.06])
    assert found["gradient/policy"][0].tolist() == pytest.approx([-0.6, -0.5, 0.0])
    assert found["gradient/kl"][0].tolist() == pytest.approx([0.15, 0.15, 0.0])
    assert found["gradient"][0].tolist() == pytest.approx([-0.45, -0.35, 0.0])
    assert found["gradient/by/entropy"][0].tolist() == pytest.approx([-0.05, -0.05, 0.0])
    assert not any(value.requires_grad for value in found.values())


@pytest.mark.parametrize("name", ONLINE)
def test_the_parts_make_the_loss(name):
    """Aggregated, what is said of each token is what each part adds to the loss."""
    made = recipe_named(name)()
    step = outcome(made)
    stats, states = made.with_old(step.stats), made.initial_states()
    found, wanted = made.by_token(step.rows, stats, states), made.contributions(step.rows, stats, states)
    torch.testing.assert_close(sum(wanted.values()), step.loss.double() if wanted else 0.0)
    for term, value in wanted.items():
        if f"term/{term}" not in found:
            assert not isinstance(made.terms[term], Summand)
            continue
        per = made.terms[term].per if term in made.terms else None
        inside = found[f"mask/{made.terms[term].where}"] if per == "where" else None
        put_together = made.aggregation(found[f"term/{term}"], step.rows, inside, per or "batch")
        torch.testing.assert_close(put_together, value)
    assert set(found) >= {*(f"mask/{n}" for n in made.masks), *(f"weight/{n}" for n in made.weights)}


@pytest.mark.parametrize("name", ONLY_LOG_PROBS)
def test_the_gradient_of_the_tokens_is_that_of_the_step(name):
    """sum_t gradient_t d log pi(y_t) / d theta = d loss / d theta, where the loss reads nothing else of the policy."""
    made = recipe_named(name)()
    step = outcome(made)
    found = made.by_token(step.rows, made.with_old(step.stats), made.initial_states())
    policy, rows = models_of(made)["policy"], step.rows
    temperature = made.rollout.temperature
    table = policy.table.detach().clone().requires_grad_()
    prefixes = policy.space.prefix_index(rows.tokens)
    log_probs = (table[rows.prompt_ids[:, :1], prefixes] / temperature).log_softmax(-1)
    chosen = log_probs.gather(-1, rows.tokens[..., None])[..., 0]
    (grad,) = torch.autograd.grad((found["gradient"] * chosen * rows.mask).sum(), table)
    torch.testing.assert_close(grad, step.grads["policy.table"])


def test_a_term_that_knows_no_tokens_shows_its_gradient():
    class Spread:
        """(max - min) of the log-probabilities: one number for the batch."""

        needs = (LogProb(),)

        def __call__(self, rows, stats):
            values = stats[LogProb()][rows.mask]
            return values.max() - values.min()

    rows, stats = two_tokens(1.0, [0.0, 0.0])
    found = Method(kind="supervised", aggregation=Aggregation(), terms={"spread": Spread()}).by_token(rows, stats, {})
    assert "term/spread" not in found and found["gradient/spread"].tolist() == [[1.0, -1.0, 0.0]]
