"""What a run began with, in `initial.json`: a run that goes on has the same model and the same data."""

import hashlib
import json
import re
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from keel.core.errors import RunError
from keel.models.language import LanguageModel
from keel.models.load import checksum
from keel.parts.rewards.stored_teacher import StoredTeacher
from keel.tasks.preferences import Preference
from keel.tasks.task import Example
from keel.train.checkpoint import write_text
from keel.train.setup import IN_MEMORY, Setup

FILE = "initial.json"
_SAID = (  # of a row; its number says only where it stands
    "prompt", "completion", "completions", "scores", "probability", "weight", "margin", "domain", "columns", "ratings",
)  # fmt: skip
_ADDRESS = re.compile(r"0x[0-9a-f]+")  # of an object in memory


def check_initial(path: Path, initial: LanguageModel, setup: Setup, fresh: bool) -> None:
    """Note what a run begins with; the reference of a resumed run must be the model that it began with.

    Raises:
        RunError: the model is another one, or it cannot be read which one it was.
    """
    file = path / FILE
    found = checksum(initial.module)
    if fresh:
        name = str(setup.source) if isinstance(setup.source, (str, Path)) else IN_MEMORY
        write_text(file, json.dumps({"path": name, "checksum": found, "data": data_digests(setup)}, indent=1))
        return
    try:
        before = json.loads(file.read_text(encoding="utf-8"))["checksum"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise RunError(
            f"it cannot be read which model this run began with ({type(error).__name__})",
            str(file),
            "Put the file back, or start a run of another --name.",
        ) from error
    if before != found:
        raise RunError(
            "the initial model is not the one that this run began with", str(path), "Give the same --model, unchanged."
        )


def check_data(path: Path, setup: Setup) -> None:
    """A run goes on over the data that it began with; one that says nothing of its data is believed.

    Raises:
        RunError: they are others; the files are named.
    """
    try:
        facts = json.loads((path / FILE).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return  # nothing has begun, or `check_initial` says that it cannot be read
    before = facts.get("data") if isinstance(facts, dict) else None
    if not isinstance(before, dict) or not before:
        return
    found = data_digests(setup)
    changed = [key for key, digest in before.items() if found.get(key) != digest]
    if changed:
        places = dict.fromkeys(_place(setup, key) for key in changed)
        fix = "Give the same data, unchanged, or start a run of another --name."
        raise RunError("the data are not those this run began with", ", ".join(places), fix)


def data_digests(setup: Setup) -> dict[str, str]:
    """Digests of one's own data as they were read, by the key of the configuration that names them.

    Built-in tasks have none: their name and options, which the configuration has, say what they hold.
    """
    config = setup.config
    found: dict[str, str] = {}
    if config.task.data is not None:
        source = setup.task if setup.preferences is None else setup.preferences
        found |= {"task.data": _digest(source.train), "task.held_out": _digest(source.held_out)}
    for name, item in config.method.transforms.items():
        if isinstance(item, StoredTeacher):
            with open(item.path, "rb") as file:
                read = hashlib.file_digest(file, lambda: hashlib.blake2b(digest_size=16))
            found[f"transforms.{name}.path"] = read.hexdigest()
    return found


def _place(setup: Setup, key: str) -> str:
    """The file behind a key, for messages."""
    config = setup.config
    if key.startswith("transforms."):
        return str(getattr(config.method.transforms.get(key.split(".")[1]), "path", key))
    if key == "task.held_out" and isinstance(config.task.held_out, str):
        return config.task.held_out
    data = config.task.data
    named = [data] if isinstance(data, str) else list(data or ())
    return "data" if IN_MEMORY in named else ", ".join(named)


def _digest(rows: Iterable[Example | Preference]) -> str:
    """Of what rows say and of their order, which decides when each is learnt."""
    found = hashlib.blake2b(digest_size=16)
    encoder = json.JSONEncoder(sort_keys=True, default=_plain)
    for row in rows:
        said = {key: value for key, value in vars(row).items() if key in _SAID}
        try:
            text = encoder.encode(said)
        except TypeError:  # a dictionary in a column has keys that are no text
            text = _plain(said)
        found.update(text.encode() + b"\n")
    return found.hexdigest()


def _plain(value: Any) -> Any:
    """What JSON does not know, the same in every process."""
    if isinstance(value, set | frozenset):
        return sorted(map(repr, value))
    if hasattr(value, "tolist") and type(plain := value.tolist()) is not type(value):  # some have no plain form
        return plain
    return _ADDRESS.sub("", repr(value))
