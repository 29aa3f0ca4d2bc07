"""Methods that name the distribution that they want, and bring the policy to it."""

from collections.abc import Mapping
from typing import Any, Literal

from keel.core.aggregate import Aggregation
from keel.divergences.family import f_divergence
from keel.method import Claim, Method
from keel.models.sources import Initial, Pretrained
from keel.parts.rewards.moments import MomentFeatures
from keel.parts.terms.matching import Baseline, MatchTarget, PosteriorMatching
from keel.parts.terms.moments import MomentTarget
from keel.parts.terms.targets import BestOfNTarget, PosteriorTarget, TeacherTarget, TiltTarget
from keel.recipes.registry import recipe
from keel.rollouts.rollout import Rollout

Drawn = Literal["old", "behaviour"]


@recipe(paper=3)
def f_dpg(
    divergence: str = "js",
    target: Literal["tilt", "best_of_n", "teacher"] = "tilt",
    beta: float = 0.1,
    n: int = 4,
    teacher: str | None = None,
    baseline: Baseline = "recent",
    samples: Drawn = "old",
    cap: float | None = None,
    num_generations: int = 32,
    temperature: float = 1.0,
) -> Method:
    """REINFORCE towards an explicit target P with the pseudo-reward -f'(pi / P), which minimises D_f(pi || P).

    Args:
        divergence: of policy and target: js, kl_ref_policy (KL(P || pi), DPG), kl_policy_ref (KL(pi || P)), tv, ...
        target: tilt, ref exp(r / beta) / Z; best_of_n, the best of n draws of the reference; teacher, another model.
        beta: of the tilt.
        n: of best-of-n, estimated within the group, which should be well above it.
        teacher: folder or hub name, for target teacher.
        baseline: mean of the last 1024 pseudo-rewards, of the others of the group, or none.
        samples: weigh by pi over the policy that prepared the batch, or over what was recorded when it was drawn.
        cap: bound of the log-weights; the metric `target/capped` counts where it acts.
        num_generations: completions a prompt; the paper takes 1024, of 16 prompts a step, at a learning rate of
            1.41e-5. Z is estimated from them.
        temperature: of the sampler.

    Source: "Aligning Language Models with Preferences through f-divergence Minimization", 2023.
    """
    parts, models = _target(target, beta, n, teacher, samples)
    claim = Claim(
        f"{divergence}(pi, {target})", "sequence", divergence, "beta" if target == "tilt" else None, "target", target
    )
    loss = MatchTarget(parts, divergence, samples, baseline, cap=cap)
    return _matching(loss, models, claim, num_generations, temperature)


@recipe(paper=3, baseline="f_dpg", neutral={"divergence": "js"})
def dpg(divergence: str = "kl_ref_policy", **f_dpg_options) -> Method:
    """Distributional policy gradient: KL(P || pi), whose pseudo-reward is P / pi; it keeps all that the target has.

    Args:
        divergence: of policy and target.

    Source: "A Distributional Approach to Controlled Text Generation", 2021; "On Reinforcement Learning and Distribution
    Matching for Fine-Tuning Language Models with no Catastrophic Forgetting", 2022.
    """
    return f_dpg(divergence=divergence, **f_dpg_options)


@recipe(paper=3)
def gdc(
    moments: Mapping[str, float] | None = None,
    divergence: str = "kl_ref_policy",
    multipliers: Mapping[str, float] | None = None,
    fit_batches: int = 4,
    track: float = 0.0,
    baseline: Baseline = "leave_one_out",
    samples: Drawn = "old",
    cap: float | None = None,
    num_generations: int = 32,
    temperature: float = 1.0,
) -> Method:
    """Generative distributional control: the nearest policy to the reference under which rewards have given means.

    The target is P = ref exp(lambda . phi) / Z, phi the reward functions that `moments` names. lambda is the same for
    all prompts, and the means are those over all prompts.

    Args:
        moments: name of a reward function -> the mean that it shall have; `reward` is the sum of all; a name may be
            `file.py:function`. A mean of 1, or 0, of a function with values 0 and 1 binds every single completion.
            None is {"reward": 0.5}.
        divergence: of policy and target.
        multipliers: name -> lambda; None fits them on the first batches.
        fit_batches: batches from which lambda is fitted.
        track: after the fit, lambda moves by this times the distance of each batch's mean from its moment; 0 is the
            paper's, which leaves lambda as it is.
        baseline: none, recent or leave_one_out, as in f_dpg.
        samples: as in f_dpg.
        cap: as in f_dpg.
        num_generations: completions a prompt.
        temperature: of the sampler.

    Source: "A Distributional Approach to Controlled Text Generation", 2021; conditional: "Controlling Conditional
    Language Models without Catastrophic Forgetting", 2022.
    """
    wanted, functions = _named(moments or {"reward": 0.5})
    given = None if multipliers is None else _named(multipliers)[0]
    _check_moments(wanted, given, divergence)
    names = tuple(wanted)
    lambdas = None if given is None else tuple(given.get(name, 0.0) for name in names)
    target = MomentTarget(names, tuple(wanted.values()), lambdas, fit_batches, track, samples=samples)
    claim = Claim("KL(P || pi), P = ref exp(lambda . phi) / Z", "sequence", divergence, None, "target", "moments")
    method = _matching(
        MatchTarget(target, divergence, samples, baseline, cap=cap),
        {"ref": Initial()},
        claim,
        num_generations,
        temperature,
    )
    return method.replacing(rewards=functions, transforms={"moments": MomentFeatures(names)})


@recipe(paper=19)
def posterior(
    beta: float = 0.1,
    baseline: Baseline = "leave_one_out",
    num_generations: int = 8,
    temperature: float = 1.0,
) -> Method:
    """RL with a KL penalty as inference: KL(pi || P) to the posterior P = ref exp(r / beta) / Z by policy gradient.

    Its gradient is that of E[r] - beta KL(pi || ref), divided by -beta; its value is the variational gap
    log Z - E[r] / beta + KL(pi || ref), which says how far the policy is from its own optimum.

    Args:
        beta: of the tilt.
        baseline: with leave_one_out Z cancels.
        num_generations: completions a prompt.
        temperature: of the sampler.

    Source: "RL with KL penalties is better viewed as Bayesian inference", 2022.
    """
    claim = Claim("KL(pi || ref exp(r / beta) / Z)", "sequence", "kl_policy_ref", "beta", "target", "tilt")
    loss = MatchTarget(TiltTarget(beta), "kl_policy_ref", baseline=baseline)
    return _matching(loss, {"ref": Initial()}, claim, num_generations, temperature)


@recipe(paper=216)
def brain(
    beta: float = 0.1,
    likelihood: Literal["exponential", "sigmoid"] = "exponential",
    centre: float = 0.0,
    samples: Drawn = "old",
    num_generations: int = 8,
    temperature: float = 1.0,
) -> Method:
    """BRAIn: forward KL to the posterior given a good answer, target and policy both normalised over the group.

    Args:
        beta: scale of the reward in the likelihood, gamma of the paper; with `exponential` P is the tilt by it.
        likelihood: exp(r / beta), or sigmoid((r - centre) / beta), the chance to be better than reward `centre`.
        centre: in units of reward, for `sigmoid`.
        samples: what is taken for the proposal.
        num_generations: completions a prompt, 8 in the paper; fewer bias it strongly.
        temperature: of the sampler.

    Source: "BRAIn: Bayesian Reward-conditioned Amortized Inference for natural language generation from feedback",
    2024.
    """
    name = "tilt" if likelihood == "exponential" else "posterior"
    claim = Claim("KL(P || pi), self-normalised", "sequence", "kl_ref_policy", "beta", "target", name)
    loss = PosteriorMatching(PosteriorTarget(beta, centre, likelihood), samples)
    return _matching(loss, {"ref": Initial()}, claim, num_generations, temperature)


def _matching(loss: Any, models: Mapping[str, Any], claim: Claim, num_generations: int, temperature: float) -> Method:
    return Method(
        rollout=Rollout(num_generations=num_generations, temperature=temperature),
        aggregation=Aggregation("sequence_mean_token_sum"),
        terms={"match": loss},
        models=models,
        claim=claim,
    )


def _target(name: str, beta: float, n: int, teacher: str | None, samples: Drawn) -> tuple[Any, dict[str, Any]]:
    """The target, and the models that it reads."""
    if (name == "teacher") != (teacher is not None):
        raise ValueError("target 'teacher' and the argument teacher (a folder or hub name) go together")
    if teacher is not None:
        return TeacherTarget(), {"teacher": Pretrained(teacher)}
    return TiltTarget(beta) if name == "tilt" else BestOfNTarget(n, samples=samples), {"ref": Initial()}


def _named(values: Mapping[str, float]) -> tuple[dict[str, float], dict[str, str]]:
    """Values by the short names of reward functions, and the functions that were given as `place:function`."""
    short = {name.rsplit(":", 1)[-1]: value for name, value in values.items()}
    if len(short) != len(values):
        raise ValueError("two reward functions have the same name")
    return short, {name.rsplit(":", 1)[-1]: name for name in values if ":" in name}


def _check_moments(moments: Mapping[str, float], multipliers: Mapping[str, float] | None, divergence: str) -> None:
    for name in multipliers or {}:
        if name not in moments:
            raise ValueError(f"there is a multiplier for '{name}', but no moment")
    hard = [name for name, moment in moments.items() if moment in (0.0, 1.0)]
    if hard and f_divergence(divergence).f_prime_at_infinity == float("inf"):
        what = f"the mean {moments[hard[0]]:g} of '{hard[0]}' rules out completions that the policy still makes"
        raise ValueError(f"{what}, so {divergence} is infinite: take kl_ref_policy, js, tv or hellinger")
