"""Counters: uniform, independent, and the same in any order."""

import torch

from keel.core.choice import counter_seed, generator, row_ids, uniforms

ROWS = row_ids(0, 0, torch.arange(200).repeat_interleave(100), torch.arange(100).repeat(200))


def test_row_ids_are_unique_and_non_negative():
    assert len(ROWS.unique()) == 20000 and int(ROWS.min()) >= 0
    other_step = row_ids(0, 1, torch.arange(200).repeat_interleave(100), torch.arange(100).repeat(200))
    other_seed = row_ids(1, 0, torch.arange(200).repeat_interleave(100), torch.arange(100).repeat(200))
    assert len(torch.cat([ROWS, other_step, other_seed]).unique()) == 60000


def test_row_ids_tell_prompt_from_sample():
    assert row_ids(0, 0, [3], torch.tensor([5])) != row_ids(0, 0, [5], torch.tensor([3]))


def test_uniforms_are_uniform():
    """Kolmogorov-Smirnov at 20000 numbers: a deviation above 1.95 / sqrt n has probability 0.001."""
    for counter in (0, 1, 7, 511):
        u = uniforms(ROWS, counter).sort().values
        assert u[0] >= 0 and u[-1] < 1
        grid = torch.arange(1, len(u) + 1, dtype=torch.float64) / len(u)
        assert float((u - grid).abs().max()) < 1.95 / len(u) ** 0.5


def test_uniforms_of_different_counters_and_rows_are_uncorrelated():
    def correlation(a, b):
        return float(torch.corrcoef(torch.stack([a, b]))[0, 1])

    first, second = uniforms(ROWS, 0), uniforms(ROWS, 1)
    assert abs(correlation(first, second)) < 4 / len(ROWS) ** 0.5
    assert abs(correlation(first[:-1], first[1:])) < 4 / len(ROWS) ** 0.5
    consecutive = uniforms(torch.arange(20000), 0)  # ids that are no hashes, either
    assert abs(correlation(consecutive[:-1], consecutive[1:])) < 4 / 20000**0.5


def test_order_does_not_matter():
    order = torch.randperm(len(ROWS), generator=generator("order"))
    assert torch.equal(uniforms(ROWS[order], 3), uniforms(ROWS, 3)[order])
    counters = torch.arange(len(ROWS)) % 5
    mixed = uniforms(ROWS, counters)
    for counter in range(5):
        assert torch.equal(mixed[counters == counter], uniforms(ROWS[counters == counter], counter))


def test_seeds_depend_on_every_part_and_on_the_order():
    seeds = [(0, "a"), ("a", 0), (0, "a", 0), (1, "a"), (0, "b"), ("0a",), (0,), ("", 0, "a")]
    assert len({counter_seed(*seed) for seed in seeds}) == len(seeds)
    assert all(0 <= counter_seed(*seed) < 2**63 for seed in seeds)


def test_generators_leave_the_global_one_alone():
    before = torch.random.get_rng_state()
    first = torch.rand(3, generator=generator(1, "x"))
    assert torch.equal(first, torch.rand(3, generator=generator(1, "x")))
    assert not torch.equal(first, torch.rand(3, generator=generator(2, "x")))
    assert torch.equal(torch.random.get_rng_state(), before)


def test_known_numbers():
    """Pinned, because a change would change every run: splitmix64 of (row, counter)."""

    def splitmix(x):
        x = (x ^ (x >> 30)) * 0xBF58476D1CE4E5B9 % 2**64
        x = (x ^ (x >> 27)) * 0x94D049BB133111EB % 2**64
        return x ^ (x >> 31)

    golden = 0x9E3779B97F4A7C15
    for row in (0, 1, 12345, 2**62 + 5):
        for counter in (0, 3):
            mixed = splitmix((splitmix((row + golden) % 2**64) + counter * golden) % 2**64)
            assert float(uniforms(torch.tensor([row]), counter)) == (mixed >> 11) * 2.0**-53
