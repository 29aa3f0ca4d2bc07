"""What stands behind `--reward`: a function by its module, a reward model by its folder, an ensemble by its rule."""

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from keel.core.errors import ConfigError
from keel.parts.rewards.ensembles import RULES, RewardEnsemble
from keel.parts.rewards.models import RewardModel
from keel.parts.rewards.worker import RewardThread, RewardWorker, isolate

ModelReward = RewardModel | RewardEnsemble


def is_model(reward: Any) -> bool:
    """Whether a reward is one of models, whose scores can be over-optimised."""
    return isinstance(reward, ModelReward)


def guarded(reward: Any, timeout: float) -> Any:
    """A reward as the loop calls it: models in this process, all else under a time limit.

    Text is `module:function`, a folder or hub name of a reward model, or an ensemble, `RULE:PATH,PATH,...` with the
    rule mean, wco or uwo.

    Raises:
        ConfigError: no such module, function, folder or model.
    """
    if isinstance(reward, str):
        reward = model_of(reward) or reward
    if isinstance(reward, ModelReward):
        return reward.prepare()
    if isinstance(reward, RewardWorker | RewardThread):
        return reward
    return isolate(reward, timeout)


def model_of(text: str) -> ModelReward | None:
    """The reward model, or the ensemble, that a text names; None for `module:function`, and for what names nothing.

    Raises:
        ConfigError: an ensemble of no models, or with one of them twice.
    """
    rule, sign, paths = text.partition(":")
    if sign and rule in RULES and ("," in paths or Path(paths).expanduser().is_dir()):
        members = tuple(path.strip() for path in paths.split(",") if path.strip())
        try:
            return RewardEnsemble(members, rule)  # type: ignore[arg-type]
        except ValueError as error:
            raise ConfigError(str(error), f"--reward {text}", f"Name each model once, as {rule}:DIR,DIR.") from error
    place = Path(text).expanduser()
    if place.is_dir() or (not sign and ("/" in text or place.is_file())):
        return RewardModel(text)
    return None


def reward_name(text: str) -> str:
    """How a reward is called in metrics: the function's name, the folder's, or the rule of an ensemble.

    >>> reward_name("package.module:function"), reward_name("runs/bradley_terry/"), reward_name("uwo:runs/a,runs/b")
    ('function', 'bradley_terry', 'uwo')
    """
    found = model_of(text)
    if isinstance(found, RewardEnsemble):
        return found.rule
    if found is not None:
        place = Path(text.rstrip("/"))
        return place.parent.name if place.name == "reward_model" else place.name
    return text.rsplit(":", 1)[-1]


def of_models(rewards: Mapping[str, Callable[..., Any]]) -> bool:
    """Whether any of the rewards by name is one of models."""
    return any(is_model(reward) for reward in rewards.values())
