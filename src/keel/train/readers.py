"""Models that read along and predict: a head on the policy's own states, or on those of a copy trained for it.

A head on the frozen policy costs nothing when sampling, and learns little. A copy learns far more, and reads every
token beside the policy.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from keel.core.chain import Chain, Prefix, TokenChain
from keel.core.chance import Sample as Chance
from keel.core.choice import generator
from keel.core.errors import UserError
from keel.core.rows import Rows, Stop
from keel.models.language import LanguageModel
from keel.models.load import load, save
from keel.models.state_head import StateHead, fit, load_head, save_head
from keel.rollouts.chain import LocalChain
from keel.rollouts.local import LocalGenerator, evaluating
from keel.rollouts.openai_chain import OpenAIChain
from keel.rollouts.sampling import Sampling
from keel.sampling.joint import JointChain
from keel.tasks.task import Example, RewardFunction
from keel.train.draws import TextReward
from keel.train.encode import Encoder
from keel.train.session import Reporter, silent

BATCH = 256  # rows whose states are measured at once
BESIDE = "reader"  # name of the model that reads along
Loss = Callable[[Float[Tensor, "n O"], Int[Tensor, "n"], Int[Tensor, "n"]], Float[Tensor, ""]]


@dataclass(frozen=True, eq=False)
class Experience:
    """Samples of the frozen policy, scored.

    Args:
        rows: prompts and completions; a group for each prompt, its samples together.
        reward: of each, shape [B].
        count: samples of each prompt.
    """

    rows: Rows
    reward: Float[Tensor, "B"]
    count: int

    @property
    def tokens(self) -> int:
        """Drawn in all."""
        return int(self.rows.mask.sum())

    @property
    def held(self) -> Bool[Tensor, "B"]:
        """Every eighth prompt, by which predictions are judged."""
        return self.rows.group % 8 == 7


def experience(
    engine: LocalGenerator,
    examples: Sequence[Example],
    functions: Mapping[str, RewardFunction],
    sampling: Sampling,
    *,
    encoder: Encoder,
    num_generations: int,
    seed: int,
) -> Experience:
    """Draw completions of each example from the policy and score them."""
    ids = [encoder.prompt(example.prompt) for example in examples]
    chain = LocalChain(engine, ids, sampling, data_index=[example.index for example in examples])
    found = chain.complete(chain.init(1), num_generations, Chance(seed))
    return Experience(chain.rows(found), TextReward(functions, examples, encoder)(found), num_generations)


@dataclass(frozen=True, eq=False)
class Reader:
    """A head, and the model whose states it reads.

    Args:
        head: from states to numbers.
        body: its own model; None reads the policy's states.
    """

    head: StateHead
    body: LanguageModel | None = None

    def __call__(self, chain: Chain, x: Prefix, finished: bool = True) -> Float[Tensor, "B O"]:
        """The numbers after each state; arbitrary for finished ones that are not asked for.

        Unfinished states of a chain that this reader stands beside come from caches; all others are read again from
        their beginning, and those tokens are counted as scored. A text that ended by itself is judged before its end
        token: readers are trained on the states from which tokens were chosen.
        """
        cached = self._cached(chain, x)
        missing = (x.done & finished) if cached is not None else (~x.done | finished)
        if cached is not None and not bool(missing.any()):
            return self.head(cached)
        chain.meter.add("scored", torch.where(missing, x.length, 0), x.prompt)
        index = missing.nonzero(as_tuple=True)[0]
        main: Any = chain.main if isinstance(chain, JointChain) else chain
        read = Prefix(*(getattr(x, name)[index] for name in ("tokens", "logp", "length", "stop", "prompt")))
        model = self.body or _policy_of(main)
        before_end = read.length - (read.stop == int(Stop.EOS)).long()  # nothing was learnt after an end token
        states = last_states(model, main.rows(read).to(model.device), before_end.to(model.device))
        found = states.new_zeros(len(x), states.shape[1]) if cached is None else cached.float()
        return self.head(found.index_copy(0, index.to(found.device), states)).to(x.length.device)

    def _cached(self, chain: Chain, x: Prefix) -> Float[Tensor, "B D"] | None:
        if isinstance(chain, JointChain) and BESIDE in chain.others and x.memory is not None:
            beside = chain.others[BESIDE]
            if isinstance(beside, LocalChain) and beside.model is self.body and BESIDE in x.memory.others:
                return beside.hidden(replace(x, memory=x.memory.others[BESIDE]))
        if self.body is None and isinstance(chain, LocalChain) and x.memory is not None:
            return chain.hidden(x)
        return None

    def beside(self, chain: LocalChain | OpenAIChain) -> TokenChain | None:
        """The chain of the reader's own model over the same prompts; None where it reads the policy's states.

        None as well where the two are on different devices: then texts are read from their beginning.
        """
        if self.body is None or self.body.device != chain.device:
            return None
        sampling = Sampling(max_completion_length=chain.horizon)  # it reads, and draws nothing
        return LocalChain(LocalGenerator(self.body), chain.texts, sampling, data_index=chain.data_index)

    def save(self, path: str | Path, **facts: Any) -> None:
        """Write it into a folder, as safetensors and JSON; a model of its own in the transformers format."""
        if self.body is not None:
            save(self.body, Path(path))
        save_head(self.head, path, {**facts, "own_body": self.body is not None})

    @staticmethod
    def load(path: str | Path, device: str | None = None) -> tuple["Reader", dict]:
        """The inverse of `save`: the reader and the facts.

        Raises:
            DataError: the folder holds no head.
        """
        head, facts = load_head(path)
        body = load(str(path), device=device) if facts["own_body"] else None
        return Reader(head if body is None else head.to(body.device), body), facts


def fit_reader(
    seen: Experience,
    policy: LanguageModel,
    loss: Loss,
    *,
    outputs: int = 1,
    own_body: bool = True,
    seed: int = 0,
    report: Reporter = silent,
    **training: Any,
) -> Reader:
    """A reader trained on the prompts of an experience that are not held out.

    Args:
        seen: samples of the frozen policy.
        policy: the policy.
        loss: (outputs [n, O], sample of each [n], tokens written before each [n]) -> mean loss.
        outputs: O.
        own_body: train a copy of the policy, not a head on the policy's states alone.
        seed: decides the order and the head's weights.
        report: called with (event, facts).
        training: of `train_body`, or of `keel.models.state_head.fit`.
    """
    known = (~seen.held).nonzero(as_tuple=True)[0]
    rows = seen.rows.select(known)
    if own_body:
        body, head = train_body(policy, rows, known, loss, outputs=outputs, seed=seed, report=report, **training)
        return Reader(head, body)
    row, place = rows.mask.nonzero(as_tuple=True)
    head = fit(
        states_of(policy, rows),
        lambda out, chosen: loss(out, known[row[chosen]], place[chosen]),
        outputs=outputs,
        seed=seed,
        **training,
    )
    return Reader(head)


def train_body(
    policy: LanguageModel,
    rows: Rows,
    number: Int[Tensor, "B"],
    loss: Loss,
    *,
    outputs: int = 1,
    epochs: int = 2,
    batch_size: int = 256,
    learning_rate: float = 1e-3,
    seed: int = 0,
    report: Reporter = silent,
) -> tuple[LanguageModel, StateHead]:
    """A copy of the policy and a head, trained together on the state before every token.

    AdamW with a one-cycle schedule and gradients clipped at norm 1.

    Args:
        rows: samples.
        number: what the loss calls each of them.
    """
    body = policy.copy()
    head = StateHead(policy.config.hidden_size, outputs, seed=seed).to(policy.device)
    parameters = [*body.module.parameters(), *head.parameters()]
    for parameter in parameters:
        parameter.requires_grad_(True)
    optimiser = torch.optim.AdamW(parameters, lr=learning_rate, weight_decay=0.01)
    steps = epochs * -(-len(rows) // batch_size)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimiser, learning_rate, total_steps=steps, pct_start=0.1)
    report("phase", {"name": "reader", "steps": steps, "text": "training the predictions"})
    done = 0
    for epoch in range(epochs):
        order = torch.randperm(len(rows), generator=generator(seed, "reader", epoch)).to(rows.device)
        for places in order.split(batch_size):
            some = rows.select(places).trim()
            with body.mixed():
                states = body.hidden(some)[some.mask]
            row, place = some.mask.nonzero(as_tuple=True)
            optimiser.zero_grad()
            loss(head(states.float()), number[places][row], place).backward()
            torch.nn.utils.clip_grad_norm_(parameters, 1.0)
            optimiser.step()
            schedule.step()
            done += 1
            report("progress", {"done": done, "total": steps})
    report("done", {})
    for parameter in parameters:
        parameter.requires_grad_(False)
    return body, head


def held_out_outputs(
    reader: Reader, seen: Experience, policy: LanguageModel
) -> tuple[Float[Tensor, "n O"], Int[Tensor, "n"], Int[Tensor, "n"]]:
    """The reader's outputs before every token of the prompts held out, with the sample and place of each."""
    held = seen.held.nonzero(as_tuple=True)[0]
    rows = seen.rows.select(held)
    row, place = rows.mask.nonzero(as_tuple=True)
    return reader.head(states_of(reader.body or policy, rows)), held[row], place


def states_of(model: LanguageModel, rows: Rows) -> Float[Tensor, "n D"]:
    """The model's states before every token of the rows, batch by batch, without gradients."""
    found = []
    with evaluating(model), model.mixed():
        for places in torch.arange(len(rows), device=rows.device).split(BATCH):
            some = rows.select(places).trim()
            found.append(model.for_head(model.hidden(some))[some.mask].float())
    return torch.cat(found)


def _policy_of(chain: Any) -> LanguageModel:
    """The policy whose states a head reads.

    Raises:
        UserError: it runs on a server.
    """
    model = getattr(chain, "model", None) or getattr(chain.generator, "model", None)
    if model is None:
        raise UserError(
            "this prediction reads the policy's own states, and a server shows none",
            "value",
            "Give one with a model of its own: keel fit-value without --head-only.",
        )
    return model


def last_states(model: LanguageModel, rows: Rows, length: Int[Tensor, "B"]) -> Float[Tensor, "B D"]:
    """The model's state after the last token of each row, by a pass over all of it."""
    if not len(rows):
        return torch.zeros(0, model.config.hidden_size, device=model.device)
    rows = rows.padded(0, int(length.max()) + 1)
    with evaluating(model), model.mixed():
        states = model.for_head(model.hidden(rows)).float()
    return states.gather(1, length[:, None, None].expand(-1, 1, states.shape[2]))[:, 0]
