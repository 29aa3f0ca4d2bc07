"""Numbers per token as compact bytes: names and shapes in JSON, values as little-endian float32; never a pickle."""

import json
import math
import struct
from collections.abc import Mapping

import numpy as np

from keel.core.errors import KeelError

_MAGIC = b"KN1\n"
_LENGTH = struct.Struct("<I")


def pack(numbers: Mapping[str, np.ndarray]) -> bytes:
    """Arrays of any shape by name, as bytes; NaN and infinities are kept.

    Layout: `KN1\\n`, length of the header (uint32), header `[["name", [shape]], ...]`, the values of each array.
    """
    arrays = {name: np.asarray(values, dtype="<f4") for name, values in numbers.items()}
    header = json.dumps([[name, list(a.shape)] for name, a in arrays.items()], separators=(",", ":")).encode()
    return b"".join([_MAGIC, _LENGTH.pack(len(header)), header, *(a.tobytes() for a in arrays.values())])


def unpack(data: bytes, where: str = "numbers per token") -> dict[str, np.ndarray]:
    """The inverse of `pack`.

    Raises:
        KeelError: the bytes were not written by `pack`, or are damaged.
    """
    start = len(_MAGIC) + _LENGTH.size
    if data[: len(_MAGIC)] != _MAGIC or len(data) < start:
        raise _damaged(where)
    (length,) = _LENGTH.unpack_from(data, len(_MAGIC))
    try:
        header = [(str(name), tuple(int(side) for side in shape)) for name, shape in json.loads(data[start:][:length])]
        sizes = [math.prod(shape) for _, shape in header]
    except (ValueError, TypeError) as error:
        raise _damaged(where) from error
    if any(side < 0 for _, shape in header for side in shape) or start + length + 4 * sum(sizes) != len(data):
        raise _damaged(where)
    values = np.frombuffer(data, dtype="<f4", offset=start + length)
    ends = np.cumsum([0, *sizes])
    return {
        name: values[ends[i] : ends[i + 1]].reshape(shape).astype(np.float32) for i, (name, shape) in enumerate(header)
    }


def _damaged(where: str) -> KeelError:
    return KeelError("The stored numbers are damaged.", where, "The rest of the run can still be read.")
