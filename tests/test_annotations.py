"""That the checks of annotations find what they are for, although most calls go unchecked."""

import beartype
import jaxtyping
import torch
from jaxtyping import Float
from torch import Tensor

from tests import annotations


def test_a_wrong_annotation_is_found_at_once_and_again_and_again():
    @annotations.jaxtyped(typechecker=beartype.beartype)
    def square(x: Float[Tensor, "n"]) -> Float[Tensor, "n n"]:
        return x

    found = []
    for i in range(annotations.FIRST + 2 * annotations.EVERY):
        try:
            square(torch.zeros(2))
        except jaxtyping.TypeCheckError:
            found.append(i)
    assert found == [*range(annotations.FIRST + 1), annotations.FIRST + annotations.EVERY]


def test_the_functions_of_keel_are_among_them():
    from keel.core import aggregate

    assert aggregate.ratio.__wrapped__.__code__.co_filename == aggregate.__file__
