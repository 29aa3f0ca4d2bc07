"""Joint chains: they are the main chain, whatever reads along; and what reads along knows what was written."""

from dataclasses import dataclass
from typing import Any

import pytest
import torch
from jaxtyping import Float, Int
from tests.rollouts.architectures import model
from tests.sampling.chain3 import BETA, MEAN, PRIOR, SPACE, Z, chain, leaf_law, leaves
from torch import Tensor

from keel.core.chain import Prefix, TokenChain
from keel.core.chance import Sample, law
from keel.core.errors import UserError
from keel.exact.chain import TabularChain
from keel.exact.space import SequenceSpace, TabularPolicy
from keel.rollouts.chain import LocalChain
from keel.rollouts.local import LocalGenerator
from keel.rollouts.sampling import Sampling
from keel.sampling.best_of import BestOf
from keel.sampling.contrast import Guidance
from keel.sampling.joint import JointChain
from keel.sampling.smc import SMC

OTHER = TabularPolicy(SPACE, torch.randn(1, 7, 2, generator=torch.Generator().manual_seed(3)).double())


def table(policy: TabularPolicy, copies: int = 1) -> TabularChain:
    rewards = torch.zeros(1, len(policy.space.sequences()[0]))
    return TabularChain(policy, rewards, torch.zeros(copies, dtype=torch.long))


def joint(copies: int = 1, value: Float[Tensor, "Q X"] | None = None) -> JointChain:
    return JointChain(chain(copies, value), {"other": table(OTHER, copies)})


@dataclass(frozen=True)
class Proposal:
    """The other chain as the proposal."""

    def log_q(self, chain, x, rng, beta):
        found = chain.other("other", x)
        return torch.where(x.done[:, None], chain.log_probs(x), found)


class Recorder(TokenChain):
    """Uniform over two tokens; its memory is the text that it has read, so that every move shows."""

    def log_probs(self, x: Prefix) -> Float[Tensor, "B V"]:
        return torch.full((len(x), 2), 0.5).log()

    def _start(self, prompt: Int[Tensor, "B"]) -> Any:
        return [f"{p}:" for p in prompt.tolist()]

    def _moved(self, memory: Any, index: Int[Tensor, "n"], x: Prefix) -> Any:
        assert x.memory is memory
        return [memory[i] for i in index.tolist()]

    def _stepped(self, memory: Any, tokens: Int[Tensor, "B"], x: Prefix) -> Any:
        assert x.memory is not None and len(x) == len(memory)
        return [text + str(token) for text, token in zip(memory, tokens.tolist(), strict=True)]


def test_a_joint_chain_is_its_main_chain():
    sampler = SMC(2, BETA, "multinomial", ess_threshold=2.0)
    alone = law(lambda copies, rng: sampler(chain(copies, MEAN), rng))
    both = law(lambda copies, rng: sampler(joint(copies, MEAN), rng))
    torch.testing.assert_close(both[0], alone[0], rtol=0, atol=0)
    for name in ("log_w", "log_z", "reward", "pick"):
        torch.testing.assert_close(getattr(both[1], name), getattr(alone[1], name), rtol=0, atol=0)
    assert int(both[1].meter.generated.sum()) == int(alone[1].meter.generated.sum())
    assert int(both[1].meter.rewards.sum()) == int(alone[1].meter.rewards.sum())


def test_memories_move_and_step_with_the_states():
    both = JointChain(Recorder(2, 3, 0), {"a": Recorder(2, 3, 0), "b": Recorder(2, 3, 0)})
    x = both.extend(both.init(2), torch.tensor([0, 1, 0, 1]))
    x = both.select(x, torch.tensor([1, 1, 2, 0]))
    x = both.extend(x, torch.tensor([0, 1, 1, 1]))
    expected = ["0:10", "0:11", "1:01", "0:01"]
    assert x.memory.main == x.memory.others["a"] == x.memory.others["b"] == expected


def test_states_that_have_written_something_already():
    both = JointChain(Recorder(2, 3, 0), {"a": Recorder(2, 3, 0)})
    x = both.at(torch.tensor([[1, 1], [0, 1]]), torch.tensor([2, 2]), torch.tensor([1, 0]))
    assert x.memory.main == x.memory.others["a"] == ["1:11", "0:01"]
    assert not bool(x.done.any()) and both.meter.scored.sum() == 0


def test_the_same_language_model_under_another_prompt():
    policy = model("qwen3")
    generator, sampling = LocalGenerator(policy), Sampling(max_completion_length=6)
    prompts, lame = [[5, 6, 7, 8], [9, 10]], [[6], [4, 4, 9, 13, 20]]
    chains = [LocalChain(generator, texts, sampling) for texts in (prompts, lame)]
    both = JointChain(chains[0], {"lame": chains[1]})
    x = both.init(2)
    for tokens in ([4, 5, 6, 7], [11, 12, 13, 14]):
        x = both.select(both.extend(x, torch.tensor(tokens)), torch.tensor([1, 0, 3, 2]))
    with torch.no_grad():
        for row in range(4):
            for texts, found in ((prompts, both.log_probs(x)), (lame, both.other("lame", x))):
                ids = torch.tensor([texts[row // 2] + x.text(row)])
                whole = policy.module(input_ids=ids).logits[0, -1].log_softmax(-1)
                torch.testing.assert_close(found[row], whole, atol=1e-4, rtol=0)
    found = SMC(2, kernel=Guidance("lame", 2.0))(both, Sample(0))
    assert bool(found.states.done.all()) and int(both.meter.scored.sum()) > 8


def test_the_others_are_counted_by_the_tokens_that_they_read():
    both = JointChain(chain(2), {"a": table(OTHER, 2), "b": table(OTHER, 2)})
    SMC(4, BETA)(both, Sample(0))
    assert both.meter is both.main.meter
    assert both.meter.generated.tolist() == [12, 12]
    assert both.meter.scored.tolist() == [16, 16]  # of three tokens the last one need not be read


def test_whole_completions_are_the_main_chains_alone():
    found = BestOf(3)(joint(2), Sample(1))
    assert torch.equal(leaves(found), leaves(BestOf(3)(chain(2), Sample(1))))
    assert found.meter.scored.sum() == 0


def test_another_chain_as_the_proposal_is_corrected_towards_the_tilt_of_main():
    sampler = SMC(2, BETA, ess_threshold=0.9, kernel=Proposal())
    probability, found = law(lambda copies, rng: sampler(joint(copies, MEAN), rng))
    assert float((probability * found.log_z.exp()).sum()) == pytest.approx(Z, abs=1e-6)


def test_the_law_without_a_kernel_is_the_prior():
    torch.testing.assert_close(leaf_law(SMC(1, BETA)), PRIOR, atol=1e-12, rtol=0)
    probability, found = law(lambda copies, rng: SMC(1, BETA)(joint(copies), rng))
    mine = torch.zeros(8).double().index_add(0, leaves(found), probability)
    torch.testing.assert_close(mine, PRIOR, atol=1e-12, rtol=0)


def test_what_does_not_fit_is_refused():
    wide = TabularPolicy(SequenceSpace(vocab=3, horizon=3))
    with pytest.raises(UserError, match=r"'other'.*vocabulary of 3 tokens.*2"):
        JointChain(chain(), {"other": table(wide)}).init(1)
    long = TabularPolicy(SequenceSpace(vocab=2, horizon=4))
    with pytest.raises(UserError, match=r"'other'.*horizon.*3, not 4"):
        JointChain(chain(), {"other": table(long)})
    with pytest.raises(UserError, match=r"prompts.*1, not 2"):
        JointChain(chain(), {"other": table(OTHER, 2)})
    with pytest.raises(UserError, match=r"no chain named 'lame'.*'other'"):
        joint().other("lame", joint().init(1))
