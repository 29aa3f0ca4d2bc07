"""Several policies writing the same tokens: what fusion, contrast and guidance need.

    log p_0, reward, value and meter    the main chain's
    others                              read every token that is written, and say what they would have written next

A joint chain is a token chain, so every sampler runs on it; a kernel made of several policies is a proposal like any
other, and SMC corrects it towards the tilt of the main one.
"""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from keel.core.chain import Prefix, TokenChain
from keel.core.chance import Choice
from keel.core.errors import UserError


@dataclass(frozen=True, eq=False)
class Memories:
    """What each chain of a joint one remembers.

    Args:
        main: of the main chain.
        others: of the others by name; empty for completions, which only the main chain writes.
    """

    main: Any
    others: dict[str, Any]


class JointChain(TokenChain):
    """A chain and others over the same vocabulary, all of which read the tokens that the main one's sampler writes.

    The main chain alone decides when a completion ends. `scored` counts the tokens that each other chain reads: all but
    the last one of a completion. `complete` draws from the main chain without the others.

    Args:
        main: p_0, reward, value and meter.
        others: by name; the same prompts (other texts for them, or another model), and the same tokens.

    Raises:
        UserError: prompts or horizons differ; on `init`, vocabularies of different sizes.
    """

    def __init__(self, main: TokenChain, others: Mapping[str, TokenChain]):
        for name, chain in others.items():
            for what in ("prompts", "horizon"):
                wanted, found = getattr(main, what), getattr(chain, what)
                if wanted != found:
                    raise UserError(
                        f"{what} must be that of the main chain, {wanted}, not {found}",
                        f"chain '{name}'",
                        "Joint chains write the same completions.",
                    )
        super().__init__(main.prompts, main.horizon, main.pad)
        self.main, self.others = main, dict(others)
        self.meter, self.device = main.meter, main.device

    @property
    def dtype(self) -> torch.dtype:
        """Of log-probabilities."""
        return self.main.dtype

    def log_probs(self, x: Prefix) -> Float[Tensor, "B V"]:
        """log p_0 of the main chain."""
        return self.main.log_probs(_of_main(x))

    def other(self, name: str, x: Prefix) -> Float[Tensor, "B V"]:
        """log-probabilities of the next token under another chain; arbitrary for finished states.

        Raises:
            UserError: there is no chain of this name, or the states are completions that the others have not read.
        """
        if name not in self.others:
            known = ", ".join(f"'{known}'" for known in self.others) or "none"
            raise UserError(f"there is no chain named '{name}'", "JointChain", f"It holds: {known}.")
        if x.memory is None or name not in x.memory.others:
            raise UserError("completions of the main chain alone were not read by the others", f"chain '{name}'")
        found = self.others[name].log_probs(replace(x, memory=x.memory.others[name]))
        return found.to(device=self.device)

    def init(self, n: int) -> Prefix:
        """See `Chain`."""
        x = super().init(n)
        size = self.log_probs(x).shape[1]
        for name in self.others:
            found = self.other(name, x).shape[1]
            if found != size:
                raise UserError(
                    f"a vocabulary of {found} tokens does not match the main chain's {size}",
                    f"chain '{name}'",
                    "Give models that share a tokenizer and the size of their embeddings.",
                )
        return x

    def at(self, tokens: Int[Tensor, "B T"], length: Int[Tensor, "B"], prompt: Int[Tensor, "B"]) -> Prefix:
        """See `TokenChain`; each chain its own way."""
        x = self.main.at(tokens, length, prompt)
        others = {name: chain.at(tokens, length, prompt).memory for name, chain in self.others.items()}
        return replace(x, memory=Memories(x.memory, others))

    def complete(self, x: Prefix, m: int, rng: Choice, where: Bool[Tensor, "B"] | None = None) -> Prefix:
        """See `Chain`; the others do not read what is written."""
        done = self.main.complete(_of_main(x), m, rng, where)
        return replace(done, memory=Memories(done.memory, {}))

    def reward(self, x: Prefix, where: Bool[Tensor, "B"] | None = None) -> Float[Tensor, "B"]:
        """See `Chain`."""
        return self.main.reward(_of_main(x), where)

    def value(self, x: Prefix, rng: Choice, where: Bool[Tensor, "B"] | None = None) -> Float[Tensor, "B"]:
        """See `Chain`; the main chain's, unless the joint one has a value of its own, which may read all of them."""
        return super().value(x, rng, where) if self.value_of else self.main.value(_of_main(x), rng, where)

    def _start(self, prompt: Int[Tensor, "B"]) -> Memories:
        return Memories(self.main._start(prompt), {name: chain._start(prompt) for name, chain in self.others.items()})

    def _moved(self, memory: Memories | None, index: Int[Tensor, "n"], x: Prefix) -> Memories | None:
        if memory is None:
            return None
        moved = {
            name: self.others[name]._moved(old, index, replace(x, memory=old)) for name, old in memory.others.items()
        }
        return Memories(self.main._moved(memory.main, index, _of_main(x)), moved)

    def _stepped(self, memory: Memories, tokens: Int[Tensor, "B"], x: Prefix) -> Memories:
        stepped = {
            name: self.others[name]._stepped(old, tokens, replace(x, memory=old)) for name, old in memory.others.items()
        }
        read = (~x.done).long() * len(stepped)
        self.meter.scored.index_add_(0, x.prompt.cpu(), read.cpu())
        return Memories(self.main._stepped(memory.main, tokens, _of_main(x)), stepped)

    def _ended(self, x: Prefix, tokens: Int[Tensor, "B"]) -> Int[Tensor, "B"]:
        return self.main._ended(_of_main(x), tokens)


def joined(chain: TokenChain, kernel: Any) -> JointChain:
    """The chain, for a kernel that reads other policies.

    Raises:
        UserError: it is no joint chain.
    """
    if not isinstance(chain, JointChain):
        raise UserError(
            "reads other policies, but the chain has one only",
            type(kernel).__name__,
            "Give JointChain(main, {name: chain}).",
        )
    return chain


def _of_main(x: Prefix) -> Prefix:
    """The same states as the main chain knows them; bare ones stay bare."""
    return replace(x, memory=None if x.memory is None else x.memory.main)
