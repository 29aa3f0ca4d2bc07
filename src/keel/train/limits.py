"""When a run is over: its last step, or the budget of tokens or seconds that is spent."""

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from keel.train.session import Session


def budget_spent(session: "Session") -> float:
    """The share of the tokens or seconds that is spent, of whichever is nearer to its end; 0 without such a limit."""
    train, position = session.config.train, session.position
    tokens = position.tokens / train.max_train_tokens if train.max_train_tokens is not None else 0.0
    seconds = position.seconds / train.max_train_seconds if train.max_train_seconds is not None else 0.0
    return max(tokens, seconds)


def is_over(session: "Session") -> bool:
    """Whether there is no further step."""
    return session.position.step >= session.config.train.max_steps or budget_spent(session) >= 1


def overshoot(session: "Session") -> str | None:
    """What the last step has spent beyond the budget, in words; None where nothing is."""
    train, position = session.config.train, session.position
    said = []
    if train.max_train_tokens is not None and position.tokens > train.max_train_tokens:
        beyond = position.tokens - train.max_train_tokens
        said.append(f"{position.tokens:,} tokens, {beyond:,} beyond the budget of {train.max_train_tokens:,}")
    if train.max_train_seconds is not None and position.seconds > train.max_train_seconds:
        beyond_s = position.seconds - train.max_train_seconds
        said.append(f"{position.seconds:.1f} s, {beyond_s:.1f} s beyond the budget of {train.max_train_seconds:g} s")
    return f"ended after step {position.step} with {' and '.join(said)}" if said else None
