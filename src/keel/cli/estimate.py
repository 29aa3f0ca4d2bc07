"""What a run will need, measured on one batch that changes nothing."""

import time
from typing import Any

from keel.train.online import live_functionals, prepare
from keel.train.session import build_session
from keel.train.setup import load_model

SHOWN = 4


def estimate(setup: Any) -> dict[str, Any]:
    """Parameters, memory, seconds for a step, and the first rendered batch.

    One batch is prepared and differentiated, without an update. Memory counts weights, gradients, both moments of the
    optimiser, frozen copies, and the states and logits of one micro-batch.
    """
    config = setup.config
    policy = load_model(config.model, setup.source, setup.tokenizer, config.seed)
    session = build_session(config, setup.task, policy, setup.rewards, preferences=setup.preferences)
    try:
        begun = time.monotonic()
        batch = prepare(session)
        rows = batch.rows.select(batch.rows.main)
        frozen = batch.frozen.select(batch.rows.main)
        method = session.method
        session.engine.step(
            live_functionals(session, frozen),
            rows,
            frozen,
            lambda r, s: method.loss(r, method.with_old(s), session.states),
            additive=method.additive,
        )
        updates = config.train.num_iterations
        seconds = (time.monotonic() - begun) * (1 if updates == 1 else (1 + updates) / 2)
    finally:
        session.optimiser.zero_grad()
        session.close()
    total = sum(p.numel() for p in policy.module.parameters())
    trained = sum(p.numel() for p in policy.module.parameters() if p.requires_grad)
    width = next(p.element_size() for p in policy.module.parameters())
    copies = sum(1 for name in method.models if not policy.adapted)
    hidden = policy.config.hidden_size * getattr(policy.config, "num_hidden_layers", 1)
    engine = session.engine
    activations = engine.max_tokens * hidden * 34 * width + 4 * engine.chunk_bytes_on(policy.device)
    memory = width * (total * (1 + copies) + 3 * trained) + activations
    return {
        "parameters": total,
        "trained_parameters": trained,
        "memory_gib": memory / 2**30,
        "seconds_per_step": seconds,
        "minutes": seconds * config.train.max_steps / 60,
        "first_batch": [[session.encoder.show(prompt), text] for prompt, text in batch.texts[:SHOWN]],
        **({} if session.preferences is None else {"comparisons": _compared(session, batch.rows, batch.texts)}),
    }


def _compared(session: Any, rows: Any, texts: list[Any]) -> list[dict[str, Any]]:
    """The first prompts with what is compared of each, and what the data say of it."""
    found: dict[int, dict[str, Any]] = {}
    said = rows.columns["score"] if rows.label is None else rows.label
    for (prompt, text), number, score in zip(texts, rows.group.tolist(), said.tolist(), strict=False):
        one = found.setdefault(number, {"prompt": session.encoder.show(prompt), "completions": [], "scores": []})
        one["completions"].append(text)
        one["scores"].append(score)
    return list(found.values())[:SHOWN]
