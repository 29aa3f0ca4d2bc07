"""Learning from given completions."""

from keel.core.aggregate import Aggregation, Mode
from keel.method import Claim, Method
from keel.parts.terms.penalties import NegativeLogLikelihood, Summand
from keel.recipes.registry import recipe


@recipe()
def sft(aggregation: Mode = "token_mean") -> Method:
    """Supervised fine-tuning: -log pi of the tokens of given completions, the prompt not counted.

    Args:
        aggregation: how token losses become one number.

    Source: maximum likelihood.
    """
    return Method(
        kind="supervised",
        aggregation=Aggregation(aggregation),
        terms={"nll": Summand(NegativeLogLikelihood(), 1.0)},
        claim=Claim("-KL(data || pi)", form="data"),
    )
