"""A small network on a frozen model's states: values, predictions of reward and length, chances of a better restart."""

import json
from collections.abc import Callable
from pathlib import Path

import torch
from jaxtyping import Float
from torch import Tensor, nn

from keel.core.choice import counter_seed, generator
from keel.core.errors import DataError


class StateHead(nn.Module):
    """W_2 silu(W_1 norm(h)) + b, from states to `outputs` numbers; the states are scaled to unit variance first.

    Args:
        dim: size of a state.
        outputs: numbers for each state.
        width: of the hidden layer.
        seed: of the initial weights.
    """

    mean: Tensor
    scale: Tensor

    def __init__(self, dim: int, outputs: int = 1, width: int = 256, seed: int = 0):
        super().__init__()
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(counter_seed(seed, "state_head"))
            self.first, self.last = nn.Linear(dim, width), nn.Linear(width, outputs)
        nn.init.zeros_(self.last.weight)
        self.register_buffer("mean", torch.zeros(dim))
        self.register_buffer("scale", torch.ones(dim))

    def forward(self, hidden: Float[Tensor, "n D"]) -> Float[Tensor, "n O"]:
        normed = (hidden.to(self.mean.dtype) - self.mean) * self.scale
        return self.last(nn.functional.silu(self.first(normed)))


def fit(
    states: Float[Tensor, "n D"],
    loss: Callable[[Float[Tensor, "m O"], Tensor], Float[Tensor, ""]],
    *,
    outputs: int = 1,
    width: int = 256,
    epochs: int = 20,
    batch_size: int = 2048,
    learning_rate: float = 2e-3,
    seed: int = 0,
) -> StateHead:
    """A head whose outputs minimise a loss over given states, by AdamW with a cosine schedule.

    Args:
        states: of the frozen model; they stay where they are, so that no forward pass of the model is needed.
        loss: (outputs, their places among the states) -> the mean loss.
        outputs, width: see `StateHead`.
        epochs, batch_size, learning_rate: of the training.
        seed: of the weights and of the order.

    Raises:
        DataError: no states.
    """
    if not len(states):
        raise DataError("there are no states to learn from", "fit")
    states = states.detach().float()
    head = StateHead(states.shape[1], outputs, width, seed).to(states.device)
    head.mean.copy_(states.mean(0))
    head.scale.copy_(1 / states.std(0).clamp(min=1e-6) if len(states) > 1 else head.scale)
    optimiser = torch.optim.AdamW(head.parameters(), lr=learning_rate, weight_decay=1e-3)
    batches = max(1, -(-len(states) // batch_size))
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimiser, epochs * batches)
    for epoch in range(epochs):
        order = torch.randperm(len(states), generator=generator(seed, "fit", epoch)).to(states.device)
        for places in order.chunk(batches):
            optimiser.zero_grad()
            loss(head(states[places]), places).backward()
            optimiser.step()
            schedule.step()
    return head.requires_grad_(False)


def save_head(head: StateHead, path: str | Path, facts: dict) -> None:
    """Write `head.safetensors` and `head.json` into a folder."""
    from safetensors.torch import save_file

    folder = Path(path)
    folder.mkdir(parents=True, exist_ok=True)
    save_file({name: tensor.contiguous() for name, tensor in head.state_dict().items()}, folder / "head.safetensors")
    shape = {"dim": len(head.mean), "outputs": head.last.out_features, "width": head.first.out_features}
    (folder / "head.json").write_text(json.dumps({**facts, **shape}, indent=1), encoding="utf-8")


def load_head(path: str | Path) -> tuple[StateHead, dict]:
    """The inverse of `save_head`.

    Raises:
        DataError: the folder holds no head.
    """
    from safetensors.torch import load_file

    folder = Path(path)
    if not (folder / "head.json").is_file() or not (folder / "head.safetensors").is_file():
        raise DataError("holds no head.json and head.safetensors", str(folder), "Write one with `keel fit-value`.")
    facts = json.loads((folder / "head.json").read_text(encoding="utf-8"))
    head = StateHead(facts["dim"], facts["outputs"], facts["width"])
    head.load_state_dict(load_file(folder / "head.safetensors"))
    return head.requires_grad_(False), facts
