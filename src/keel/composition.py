"""Compositions without a meaning, which are refused when they are built, with the reason."""

from typing import TYPE_CHECKING

from keel.core.config import get_path
from keel.core.errors import MethodError, nearest
from keel.parts.replay.rehearsal import Rehearsal
from keel.parts.replay.stored import Replay
from keel.parts.terms.penalties import Summand
from keel.parts.terms.surrogate import LogLikelihood

if TYPE_CHECKING:
    from keel.method import Method

ALWAYS = ("policy", "old")
DATA_MASKS = ("nll", "distil")  # spans that rows from a file may bring along


def check(method: "Method") -> None:
    """That every name is known, and every part in a place where it can do what it is for.

    Raises:
        MethodError: what is wrong, where, and what would be right.
    """
    _check_models(method)
    _check_masks_and_heads(method)
    _check_phases(method)
    _check_taught(method)
    _check_controllers(method)
    _check_replay(method)


def _check_models(method: "Method") -> None:
    known = (*ALWAYS, *method.models)
    for path, item in [*method.parts(), ("surrogate", method.surrogate)]:
        for functional in getattr(item, "needs", ()) or ():
            for name in functional.of:
                if name not in known:
                    raise MethodError(
                        f"{functional.name} reads the model '{name}', which is not declared.{nearest(name, known)}",
                        path,
                        f"Add it: models={{'{name}': Initial()}}.",
                    )
    for name in method.models:
        if name in ALWAYS:
            raise MethodError(f"the name '{name}' is Keel's own and cannot be declared", f"models.{name}")


def _check_masks_and_heads(method: "Method") -> None:
    for name, item in method.terms.items():
        where = item.where if isinstance(item, Summand) else None
        if where is not None and where not in (*method.masks, *DATA_MASKS):
            raise MethodError(f"there is no mask '{where}'.{nearest(where, method.masks)}", f"terms.{name}.where")
    for path, item in method.parts():
        for head in getattr(item, "heads_read", ()):
            if head not in method.heads:
                raise MethodError(
                    f"there is no head '{head}'.{nearest(head, method.heads)}",
                    path,
                    f"Add it: heads={{'{head}': Critic()}}.",
                )


def _check_phases(method: "Method") -> None:
    for path, item in method.parts():
        slot = path.split(".")[0]
        if slot not in ("transforms", "advantage"):
            continue
        for functional in getattr(item, "needs", ()):
            if "policy" in functional.of:
                what = f"{functional.name} reads the live policy, but this part runs before the update"
                fix = "Read of=('old',) there, or make it a weight, a mask or a term."
                raise MethodError(what, path, fix)
    if method.surrogate is not None and not method.advantage and method.kind in ("online", "distillation"):
        raise MethodError(
            "a surrogate needs an advantage, but the chain is empty",
            "advantage",
            "Add one, such as {'centre': GroupCentre()}.",
        )
    if method.kind == "online" and method.rollout is None:
        raise MethodError("an online method needs a rollout", "rollout", "Give rollout=Rollout().")


def _check_taught(method: "Method") -> None:
    given, written = (None, None) if method.rollout is None else (method.rollout.given, method.rollout.written)
    if method.kind == "distillation" and method.rollout is not None and method.rollout.sampler is not None:
        fix = "Leave rollout.sampler out, or use a recipe with a reward."
        raise MethodError("a sampler follows a reward, and distillation has none", "rollout.sampler", fix)
    if method.kind != "distillation" and given:
        what = "completions that are given are for methods of kind distillation"
        raise MethodError(what, "rollout", "Leave rollout.given out.")
    writers, beside = ((), ()) if method.rollout is None else (method.rollout.writers, method.rollout.beside)
    if writers and (method.kind not in ("distillation", "online") or (beside and method.kind != "online")):
        what = "other models write for methods of kind distillation or online, and beside the policy for online ones"
        raise MethodError(what, "rollout", "Leave rollout.written and rollout.beside out.")
    if method.kind == "online" and written is not None and (method.surrogate is not None or written.alpha < 1):
        what = "online, another model writes alone, and for losses that compare what it writes: no policy gradient"
        raise MethodError(what, "rollout.written", "Leave it out, or take a loss of pairs.")
    for name in writers:
        if name not in method.models:
            what = f"there is no model '{name}' to write.{nearest(name, method.models)}"
            where = "rollout.written.model" if written is not None and written.model == name else "rollout.beside"
            raise MethodError(what, where, f"Add it: models={{'{name}': Pretrained(path)}}.")


def _check_controllers(method: "Method") -> None:
    owned: dict[str, str] = {}
    for name, path in method.owned():
        if path in owned:
            both = f"'{owned[path]}' and '{name}'"
            raise MethodError(f"'{path}' is owned by the controllers {both}", f"controllers.{name}")
        owned[path] = name
        try:
            get_path(method, path)
        except (KeyError, AttributeError):
            what = f"it owns '{path}', which the method does not have"
            raise MethodError(what, f"controllers.{name}.path") from None


def _check_replay(method: "Method") -> None:
    for kind in (Replay, Rehearsal):
        if len(found := [name for name, item in method.replay.items() if isinstance(item, kind)]) > 1:
            raise MethodError(f"'{found[0]}' and '{found[1]}' are of one kind, and there is room for one", "replay")
    if method.replay and method.kind != "online":
        raise MethodError("is for online methods: other rows come from a file anyway", "replay", "Remove it.")
    if method.replayed is not None and method.surrogate is None:
        raise MethodError("replayed rows enter the policy term, and this method has none", "replay")
    if method.replayed is not None and method.replayed.weighting == "token" and _likelihood(method):
        what = "weighting 'token' is the ratio of the surrogate, and this one has none"
        raise MethodError(what, "replay", "Take truncated or sequence, or another surrogate.")
    _check_rehearsal(method)


def _check_rehearsal(method: "Method") -> None:
    readers = {n: t for n, t in method.terms.items() if getattr(t, "stream", "main") == "regulariser"}
    for name, term in readers.items():
        if (where := getattr(term, "where", None)) is not None and where not in DATA_MASKS:
            what = f"mask '{where}' is one of the batch, and this term reads the rows of a regulariser"
            raise MethodError(what, f"terms.{name}.where", f"Known there: {', '.join(DATA_MASKS)}.")
    for name, item in method.replay.items():
        if not isinstance(item, Rehearsal):
            continue
        if not readers:
            fix = "Add one, such as Summand(NegativeLogLikelihood(), 0.1, stream='regulariser')."
            raise MethodError("no term reads the rows that are rehearsed", f"replay.{name}", fix)
        stored = [n for n, term in readers.items() if getattr(term, "reads_stored", False)]
        if stored and item.source != "samples":
            what = f"'{stored[0]}' compares with who wrote the rows, which {item.source} does not record"
            raise MethodError(what, f"replay.{name}.source", "Take samples.")


def _likelihood(method: "Method") -> bool:
    return method.surrogate is not None and isinstance(method.surrogate.f, LogLikelihood)
