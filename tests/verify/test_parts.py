"""Every registered part on the worlds of verification: a new one is held to this without a line here."""

import dataclasses

import pytest
import torch
from tests.cases import Case, part_cases

from keel.method import Method
from keel.verify.population import expected_update
from keel.verify.recipes import worlds
from keel.verify.world import World

# Parts that read what a loop puts beside the rows, which no world has, and parts of teachers, whose tables stay where
# they are when the prompts are turned.
BESIDE = {"part-mixed_target", "part-stored_divergence", "part-win_rate_regression"}
TAUGHT = {"teacher"}

EACH = pytest.mark.parametrize(
    "case", [c for c in part_cases() if c.method.kind == "online" and c.name not in BESIDE], ids=str
)


def turned(world: World) -> World:
    """The same world with its prompts in the other order."""
    tensors = {f.name: getattr(world, f.name) for f in dataclasses.fields(world) if f.name != "space"}
    return dataclasses.replace(world, **{name: value.flip(0) for name, value in tensors.items()})


def update(method: Method, world: World, dtype: torch.dtype = torch.float64) -> torch.Tensor:
    return expected_update(method, world, dtype=dtype).direction


@EACH
def test_the_update_is_finite_and_the_same_for_prompts_in_another_order(case: Case):
    world = worlds()["far, off-policy"]
    found = update(case.method, world)
    assert bool(found.isfinite().all()) and float(found.abs().max()) > 1e-4
    if not TAUGHT & set(case.method.models):
        torch.testing.assert_close(update(case.method, turned(world)).flip(0), found, rtol=1e-9, atol=1e-12)


@EACH
def test_low_precision(case: Case):
    """The same rounded weights in bf16 and in fp32."""
    world = worlds()["far, off-policy"]
    rounded = dataclasses.replace(
        world,
        policy=world.policy.bfloat16().double(),
        old=world.old.bfloat16().double(),
        ref=world.ref.bfloat16().double(),
    )
    exact, low = update(case.method, rounded, torch.float32), update(case.method, rounded, torch.bfloat16)
    assert float((low - exact).norm()) <= 0.05 * float(exact.norm())
