"""The policy taken back to where its round began, between the two halves of a round."""

from typing import TYPE_CHECKING

from keel.core.errors import ConfigError
from keel.parts.controllers.going_back import GoBack

if TYPE_CHECKING:
    from keel.train.session import Session


def check_rounds(session: "Session") -> None:
    """Say before the first step where a run would end within a look-ahead.

    Raises:
        ConfigError: the model to go back to is not a snapshot that follows the policy.
    """
    for name, item in _parts(session):
        if item.source not in session.sources or not session.sources[item.source].moving:
            fix = f"Declare models={{'{item.source}': Snapshot({2 * item.half})}}."
            raise ConfigError(f"'{item.source}' is no snapshot of the policy", f"controllers.{name}.source", fix)
        steps = session.config.train.max_steps
        if 0 < steps % (2 * item.half) <= item.half:
            text = (
                f"{steps} batches end within the look-ahead of a round, or at its end where the policy goes back: "
                f"rounds have {2 * item.half} batches; take a multiple of that for train.max_steps"
            )
            session.report("warning", {"text": text})


def go_back(session: "Session") -> None:
    """After a step, when its snapshots are taken: the policy goes back where a part says so."""
    for _, item in _parts(session):
        if item.due(session.position.step):
            session.sources[item.source].lend()
            session.optimiser.forget()


def _parts(session: "Session") -> list[tuple[str, GoBack]]:
    return [(name, item) for name, item in session.method.controllers.items() if isinstance(item, GoBack)]
