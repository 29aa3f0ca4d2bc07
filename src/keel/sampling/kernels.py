"""Kernels: how the next token is proposed, where the probabilities of all next tokens are at hand."""

from dataclasses import dataclass, fields, replace
from typing import Any, Protocol, runtime_checkable

import torch
from jaxtyping import Bool, Float
from torch import Tensor
from torch.nn.functional import pad

from keel.core.chain import FIELDS, Chain, Prefix, TokenChain
from keel.core.chance import Choice
from keel.core.errors import UserError
from keel.core.registry import part


@runtime_checkable
class Kernel(Protocol):
    """From states to the log-probabilities of the next token that are really drawn from."""

    def log_q(self, chain: TokenChain, x: Prefix, rng: Choice, beta: float) -> Float[Tensor, "B V"]:
        """Log-probabilities, unnormalised; a finished state goes on as log p_0 says.

        Args:
            chain: holds log p_0 and the values.
            x: where.
            rng: for values that need randomness.
            beta: of the sampler.
        """
        ...


@part("twisted")
@dataclass(frozen=True)
class Twisted:
    """q = p_0 exp(V_hat / beta) over the k likeliest tokens, the others with the mean value of those (or not at all).

    With the exact value and all tokens it is p* itself.

    Args:
        k: tokens whose value is asked for; None takes all.

    Source: twisted sequential Monte Carlo; the kernel of value-augmented sampling.
    """

    k: int | None = None

    def log_q(self, chain: TokenChain, x: Prefix, rng: Choice, beta: float) -> Float[Tensor, "B V"]:
        """See `Kernel`."""
        log_p = chain.log_probs(x)
        tokens, values = successor_values(chain, x, self.k, rng)
        gain = values / beta
        if tokens.shape[1] < log_p.shape[1]:
            gain = gain - gain.mean(1, keepdim=True)  # the tokens not asked for have the mean value
        raised = log_p + torch.zeros_like(log_p, dtype=gain.dtype).scatter(1, tokens, gain)
        return torch.where(x.done[:, None], log_p.to(raised), raised)


def successor_values(chain: TokenChain, x: Prefix, k: int | None, rng: Choice) -> tuple[Tensor, Float[Tensor, "B k"]]:
    """The k likeliest next tokens and the value of the state after each; those of finished states are 0."""
    tokens, log_p = chain.successors(x, k)
    width = tokens.shape[1]
    repeated = chain.select(x, torch.arange(len(x), device=tokens.device).repeat_interleave(width))
    after = chain.extend(repeated, tokens.flatten())
    possible = (log_p.flatten() > -torch.inf) & ~repeated.done
    chain.meter.add("scored", possible.long())
    return tokens, chain.value(after, rng, possible).view(len(x), width)


def propose(
    chain: Chain, x: Any, rng: Choice, kernel: Kernel | None, beta: float
) -> tuple[Any, Float[Tensor, "B"], Float[Tensor, "B"]]:
    """One action of each state, its log p_0 and its log q.

    Raises:
        UserError: a kernel needs the probabilities of all next tokens, and the chain has none.
    """
    if kernel is None:
        action, log_p = chain.propose(x, 1, rng)
        return action, log_p[:, 0], log_p[:, 0]
    tokens = by_token(chain, type(kernel).__name__.lower())
    log_q = kernel.log_q(tokens, x, rng, beta).log_softmax(-1)
    action, log_p = tokens.propose(x, 1, rng, log_q=log_q)
    return action, log_p[:, 0], log_q.gather(1, action[:, None])[:, 0]


def by_token(chain: Chain, name: str) -> TokenChain:
    """The chain, if it writes single tokens, the probability of every next one at hand.

    Args:
        name: of what needs that.

    Raises:
        UserError: it goes by steps, of text or of anything else.
    """
    if not isinstance(chain, TokenChain):
        raise UserError(
            "works on single tokens, but this chain goes by steps",
            name,
            "Step by token, or take a sampler that needs nothing but draws, such as smc without a kernel.",
        )
    return chain


def bare(x: Any) -> Any:
    """Finished states without what they would need to go on."""
    return replace(x, memory=None) if isinstance(x, Prefix) else x


def either(where: Bool[Tensor, "B"], new: Any, old: Any) -> Any:
    """States (or actions) of one batch where it says so and of another elsewhere, without memory.

    >>> either(torch.tensor([True, False]), torch.tensor([[1, 2], [3, 4]]), torch.zeros(2, 2).long()).tolist()
    [[1, 2], [0, 0]]

    Args:
        where: shape [B].
        new, old: tensors, or dataclasses of tensors, all with B in front. Rows of tokens may have been cut to the
            longest one: the shorter rows are filled up.
    """
    if isinstance(new, Tensor):
        width = max(new.shape[-1], old.shape[-1])
        new, old = (x if x.dim() == 1 else pad(x, (0, width - x.shape[-1])) for x in (new, old))
        return torch.where(where.view(-1, *[1] * (new.dim() - 1)), new, old)
    names = FIELDS if isinstance(new, Prefix) else [field.name for field in fields(new)]
    return replace(bare(new), **{name: either(where, getattr(new, name), getattr(old, name)) for name in names})
