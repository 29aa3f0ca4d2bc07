"""The worlds of verification: every sequence is known, with its reward and its probability under each policy."""

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from jaxtyping import Float
from torch import Tensor

from keel.core.choice import generator
from keel.core.rows import Rows, cat
from keel.exact.space import SequenceSpace, TabularPolicy
from keel.exact.states import sequence_log_probs


@dataclass(frozen=True, eq=False)
class World:
    """Rewards of all sequences of all prompts, and the policies that a method may meet there.

    Args:
        space: the sequences.
        reward: of each sequence, in the order of `space.sequences()`, shape [Q, S].
        policy: logits of the live policy, [Q, X, V].
        old: logits of the policy that sampled.
        ref: logits of the reference.
        data: logits of the distribution that files or a teacher hold.
    """

    space: SequenceSpace
    reward: Float[Tensor, "Q S"]
    policy: Float[Tensor, "Q X V"]
    old: Float[Tensor, "Q X V"]
    ref: Float[Tensor, "Q X V"]
    data: Float[Tensor, "Q X V"]

    def table(self, name: str = "policy", dtype: torch.dtype = torch.float64) -> TabularPolicy:
        """One of the policies by name; an unknown name is a further model with logits of its own.

        Raises:
            KeyError: there is none of that name.
        """
        logits = getattr(self, name) if name in ("policy", "old", "ref", "data") else self._further(name)
        return TabularPolicy(self.space, logits.to(dtype))

    def at(self, policy: Float[Tensor, "Q X V"], on_policy: bool = True) -> "World":
        """The world with another live policy, which has sampled, too, if `on_policy`."""
        return replace(self, policy=policy, old=policy) if on_policy else replace(self, policy=policy)

    def rows(self, sampler: str = "old") -> Rows:
        """Every sequence of every prompt, with its reward and its probability under the sampler."""
        own = self.table(sampler)
        parts = []
        for prompt in range(self.space.prompts):
            rows = own.weighted(self.space.rows(prompt))
            parts.append(rows.with_(reward=self.reward[prompt][:, None]))
        return cat(parts)

    def log_probs(self, name: str = "policy") -> Float[Tensor, "Q S"]:
        """log-probability of every sequence of every prompt."""
        return sequence_log_probs(self.table(name)).detach()

    def _further(self, name: str) -> Tensor:
        noise = torch.randn(self.ref.shape, generator=generator("world", name), dtype=torch.float64)
        return self.ref + 0.3 * noise


def random_world(
    space: SequenceSpace,
    seed: int | str,
    *,
    distance: float,
    staleness: float = 0.0,
    rewards: Sequence[float] | None = None,
) -> World:
    """A world drawn from a seed.

    Args:
        distance: standard deviation of the policy's logits around the reference's; 0 is at the reference.
        staleness: that of the sampler's logits around the policy's; 0 is on-policy.
        rewards: the values that a reward may take; None draws normal ones.
    """
    shape = (space.prompts, space.prefixes, space.vocab)

    def noise(what: str) -> Tensor:
        return torch.randn(shape, generator=generator("verify", what, seed), dtype=torch.float64)

    sequences = len(space.sequences()[0])
    if rewards is None:
        draw = torch.randn(space.prompts, sequences, generator=generator("verify", "reward", seed), dtype=torch.float64)
    else:
        place = torch.randint(len(rewards), (space.prompts, sequences), generator=generator("verify", "reward", seed))
        draw = torch.tensor(list(rewards), dtype=torch.float64)[place]
    ref = 0.5 * noise("ref")
    policy = ref + distance * noise("policy")
    old = policy + staleness * noise("old")
    return World(space, draw, policy, old, ref, ref + 0.7 * noise("data"))
