"""What a reader chose by the parameters of an address: one of a few values."""

from __future__ import annotations

from collections.abc import Iterable

from keel.core.errors import UserError, nearest


def one_of(value: str, allowed: Iterable[str], name: str) -> str | None:
    """The value, or None where nothing was chosen.

    Args:
        value: as the address has it.
        allowed: what may be chosen.
        name: of the parameter.

    Raises:
        UserError: it is none of these.
    """
    known = list(allowed)
    if not value:
        return None
    if value not in known:
        raise UserError(f"There is no '{value}'.{nearest(value, known)}", name, f"There are: {', '.join(known)}.")
    return value
