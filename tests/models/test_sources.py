"""Models by name follow the policy as their source says."""

import dataclasses

import pytest
import torch
from tests.models.test_load import states

from keel.core.config import from_config, to_config
from keel.core.errors import UserError
from keel.exact.space import SequenceSpace, TabularPolicy
from keel.models.adapters import LoRA
from keel.models.heads import ValueHead
from keel.models.load import load, reference, save
from keel.models.sources import EMA, Adapter, Initial, Pretrained, Snapshot, Soup, average, build
from keel.models.tiny import SMALL, build_tiny


def policy():
    return build_tiny("0123456789+-*/=()> ?", SMALL)


def fill(model, value: float) -> None:
    with torch.no_grad():
        for parameter in model.trainable():
            parameter.fill_(value)


def values(source) -> set[float]:
    return {round(float(v), 6) for p in source.module.parameters() for v in p.detach().unique()}


def test_initial_stays_what_it_was():
    live = policy()
    source = build(Initial(), live)
    before = states(live)
    fill(live, 1.0)
    assert not source.update(1) and not source.tensors()
    assert torch.equal(states(source), before)


def test_a_resumed_run_gives_the_initial_model_itself():
    live = policy()
    initial = reference(live)
    fill(live, 1.0)
    assert build(Initial(), live, initial).model is initial


def test_a_snapshot_moves_on_the_steps_that_every_divides():
    live = policy()
    fill(live, 0.0)
    source = build(Snapshot(every=3), live)
    seen = []
    for step in range(1, 7):
        fill(live, float(step))
        moved = source.update(step)
        assert moved == (step % 3 == 0)
        seen.append(values(source))
    assert seen == [{0.0}, {0.0}, {3.0}, {3.0}, {3.0}, {6.0}]


def test_a_snapshot_with_an_offset_and_what_it_lends():
    live = policy()
    fill(live, 0.0)
    source = build(Snapshot(every=4, offset=2), live)
    seen = []
    for step in range(1, 8):
        fill(live, float(step))
        assert source.update(step) == (step in (2, 6))
        seen.append(values(source))
    assert seen == [{0.0}, {2.0}, {2.0}, {2.0}, {2.0}, {6.0}, {6.0}]
    source.lend()
    assert values(build(Initial(), live)) == {6.0}
    fill(live, 9.0)
    assert values(source) == {6.0}  # it was lent, not given


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_an_average_follows_its_recursion_in_bf16_too(dtype):
    live = policy()
    live.module.to(dtype)
    fill(live, 0.0)
    source = build(EMA(0.999), live)
    fill(live, 1.0)
    for step in range(1, 101):
        source.update(step)
    expected = 1 - 0.999**100
    assert values(source) == {round(float(torch.tensor(expected).to(dtype)), 6)}
    assert not any(p.requires_grad for p in source.module.parameters())


def test_a_table_of_logits_has_sources_too():
    live = TabularPolicy(SequenceSpace(vocab=3, horizon=2))
    initial, source = build(Initial(), live), build(EMA(0.5), live)
    with torch.no_grad():
        live.table.fill_(1.0)
    source.update(1)
    assert values(initial) == {0.0} and values(source) == {0.5} and values(live) == {1.0}


def test_moving_models_survive_a_checkpoint():
    live = policy()
    fill(live, 0.0)
    source = build(EMA(0.9), live)
    fill(live, 1.0)
    source.update(1)
    saved = {name: tensor.clone() for name, tensor in source.tensors().items()}
    again = build(EMA(0.9), live)
    again.restore(saved)
    source.update(2)
    again.update(2)
    assert values(source) == values(again) == {0.19}


def test_with_lora_a_moving_model_owns_its_adapter_only(tmp_path):
    save(policy(), tmp_path)
    live = load(tmp_path, lora=LoRA(2))
    source = build(Snapshot(1), live)
    own, shared = dict(source.module.named_parameters()), dict(live.module.named_parameters())
    for name, parameter in shared.items():
        assert (own[name].data_ptr() == parameter.data_ptr()) == (not parameter.requires_grad)
    assert set(source.tensors()) == {name for name, p in shared.items() if p.requires_grad}


def test_a_pretrained_model_must_have_the_same_vocabulary(tmp_path):
    live = policy()
    same = build_tiny("0123456789+-*/=()> ?", SMALL, seed=1)
    save(same, tmp_path / "same")
    save(build_tiny("0123456789+-*/=()> !", SMALL), tmp_path / "other")
    source = build(Pretrained(str(tmp_path / "same")), live)
    assert torch.equal(states(source), states(same)) and not torch.equal(states(source), states(live))
    with pytest.raises(UserError, match="vocabulary"):
        build(Pretrained(str(tmp_path / "other")), live)


def test_an_adapter_that_is_not_there_is_an_error():
    with pytest.raises(UserError, match="no adapter 'sft'"):
        build(Adapter("sft"), policy())


def sisters(tmp_path, *seeds: int):
    """Models of the policy's architecture with other weights, saved."""
    found = []
    for seed in seeds:
        found.append(build_tiny("0123456789+-*/=()> ?", SMALL, seed=seed))
        save(found[-1], tmp_path / str(seed))
    return found, [str(tmp_path / str(seed)) for seed in seeds]


def named(source) -> dict[str, torch.Tensor]:
    return {name: p.detach() for name, p in source.module.named_parameters()}


def test_a_soup_is_the_average_of_the_weights(tmp_path):
    live = policy()
    others, paths = sisters(tmp_path, 1, 2)
    source = build(Soup(("initial", *paths), (0.5, 0.3, 0.2)), live)
    first, second, third = named(live), named(others[0]), named(others[1])
    assert named(source).keys() == first.keys()
    for name, value in named(source).items():
        torch.testing.assert_close(value, 0.5 * first[name] + 0.3 * second[name] + 0.2 * third[name])
    assert not any(p.requires_grad for p in source.module.parameters()) and not source.moving
    assert all(p.requires_grad for p in live.module.parameters())
    tied = source.module.get_input_embeddings().weight.data_ptr()
    wanted = live.module.get_input_embeddings().weight is live.module.get_output_embeddings().weight
    assert (source.module.get_output_embeddings().weight.data_ptr() == tied) == wanted
    assert Soup(("a", "b")).shares == (0.5, 0.5)


def test_a_soup_of_one_is_that_one_bit_for_bit(tmp_path):
    live = policy()
    live.module.to(torch.bfloat16)
    (other,), paths = sisters(tmp_path, 1)
    assert torch.equal(states(build(Soup(("initial", *paths), (1.0, 0.0)), live)), states(build(Initial(), live)))
    alone = build(Soup(tuple(paths), (1.0,)), policy())
    assert torch.equal(states(alone), states(other))


def test_a_soup_begins_with_the_initial_model_in_a_resumed_run(tmp_path):
    live = policy()
    initial = reference(live)
    _, paths = sisters(tmp_path, 1)
    fresh = build(Soup(("initial", *paths)), live)
    fill(live, 7.0)
    resumed = build(Soup(("initial", *paths)), live, initial)
    assert torch.equal(states(resumed), states(fresh)) and 7.0 not in values(initial)


def test_a_soup_in_bf16_is_rounded_once():
    """The mean of 1 and three times 1 + 2^-7 is nearest to 1 + 2^-7; summed in bf16 it would be 1."""
    tables = [TabularPolicy(SequenceSpace(vocab=3, horizon=1)) for _ in range(4)]
    bowl = TabularPolicy(SequenceSpace(vocab=3, horizon=1)).to(torch.bfloat16)
    for table, value in zip(tables, (1.0, *[1.0 + 2**-7] * 3), strict=True):
        fill_table(table, value)
        table.to(torch.bfloat16)
    average(bowl, [(str(i), table) for i, table in enumerate(tables)], (0.25,) * 4)
    assert values(bowl) == {1.007812}  # to six digits


def fill_table(table: TabularPolicy, value: float) -> None:
    with torch.no_grad():
        table.table.fill_(value)


def test_buffers_of_a_soup():
    """Floating ones are averaged, integers and those that no file holds stay those of the first model."""

    def module(value: float) -> torch.nn.Module:
        made = torch.nn.Linear(1, 1)
        made.register_buffer("mean", torch.tensor(value))
        made.register_buffer("count", torch.tensor(int(value)))
        made.register_buffer("cache", torch.tensor(value), persistent=False)
        return made

    bowl = module(2.0)
    average(bowl, [("a", module(2.0)), ("b", module(6.0))], (0.5, 0.5))
    assert (float(bowl.mean), int(bowl.count), float(bowl.cache)) == (4.0, 2, 2.0)


def test_models_that_make_no_soup_are_refused(tmp_path):
    live = policy()
    _, paths = sisters(tmp_path, 1)
    save(build_tiny("0123456789+-*/=()> ?", dataclasses.replace(SMALL, layers=1)), tmp_path / "shallow")
    save(build_tiny("0123456789+-*/=()> ?", dataclasses.replace(SMALL, feed_forward=32)), tmp_path / "narrow")
    save(build_tiny("0123456789+-*/=()> !", SMALL), tmp_path / "other")
    save(load(paths[0], lora=LoRA(2)), tmp_path / "adapter")
    for name, message in (
        ("shallow", r"shallow: it lacks the weight 'model\.layers\.1"),
        ("narrow", r"narrow: its weight '.*mlp.*' has shape"),
        ("other", "vocabulary"),
        ("adapter", "average of the factors"),
    ):
        with pytest.raises(UserError, match=message):
            build(Soup(("initial", str(tmp_path / name))), live)
    adapted = load(paths[0], lora=LoRA(2))
    with pytest.raises(UserError, match="its base"):
        build(Soup(("initial", paths[0])), adapted)
    assert torch.equal(states(build(Soup((paths[0],)), adapted)), states(build(Initial(), adapted)))
    with pytest.raises(UserError, match="language model"):
        build(Soup(("initial",)), TabularPolicy(SequenceSpace(vocab=3, horizon=2)))


@pytest.mark.parametrize(
    "wrong", [{"paths": ()}, {"paths": ("a",), "weights": (0.9,)}, {"paths": ("a", "b"), "weights": (1.0,)}]
)
def test_wrong_weights_of_a_soup_are_refused(wrong):
    with pytest.raises(ValueError):
        Soup(**wrong)


@pytest.mark.parametrize(
    "source", [Initial(), Pretrained("x"), Snapshot(4), EMA(0.5), Adapter("a"), Soup(("initial", "x"), (0.75, 0.25))]
)
def test_sources_are_plain_data(source):
    assert from_config(to_config(source)) == source


@pytest.mark.parametrize("wrong", [lambda: Snapshot(0), lambda: Snapshot(2, 2), lambda: EMA(1.0), lambda: EMA(-0.1)])
def test_wrong_settings_are_refused(wrong):
    with pytest.raises(ValueError):
        wrong()


def test_a_value_head_is_linear_and_starts_at_zero():
    head = ValueHead(4)
    hidden = torch.randn(3, 4, generator=torch.Generator().manual_seed(0))
    assert head(hidden).tolist() == [0.0, 0.0, 0.0]
    with torch.no_grad():
        head.weight.copy_(torch.tensor([1.0, 2.0, 3.0, 4.0]))
        head.bias.fill_(0.5)
    assert head(torch.tensor([[1.0, 0.0, -1.0, 2.0]], dtype=torch.bfloat16)).tolist() == [6.5]
    assert torch.equal(ValueHead(4, std=1.0, seed=3).weight, ValueHead(4, std=1.0, seed=3).weight)
