"""Bang-bang control of an entropy by a temperature: above 1 while there is too little of it, below 1 while too much."""


def switched_temperature(entropy: float, target: float, high: float, low: float) -> float:
    """`high` while the entropy is at most the target, else `low`.

    >>> switched_temperature(0.3, 0.5, 1.2, 0.8), switched_temperature(0.6, 0.5, 1.2, 0.8)
    (1.2, 0.8)

    Args:
        entropy, target: in nats per token.
    """
    return high if entropy <= target else low


def check_switch(target: float, high: float, low: float) -> None:
    """The ranges of what `switched_temperature` takes."""
    if target < 0:
        raise ValueError(f"target must not be negative, got {target}")
    if not 0 < low <= 1 <= high:
        raise ValueError(f"temperatures must satisfy 0 < low <= 1 <= high, not low={low}, high={high}")
