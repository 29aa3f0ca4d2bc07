"""Models that judge: implicit process rewards, digits, and written judgements."""

from typing import Literal

from keel.core.aggregate import Aggregation
from keel.method import Claim, Method
from keel.models.sources import Initial, Pretrained
from keel.parts.advantages.to_go import CentredToGo
from keel.parts.rewards.implicit import ImplicitProcessReward, Level
from keel.parts.rewards.transforms import WeightedSum
from keel.parts.terms.judge_distillation import JudgeDistillation
from keel.parts.terms.links import NCA, LogSigmoid
from keel.parts.terms.pairs import PairLoss
from keel.parts.terms.scores import LogRatio
from keel.parts.terms.unpaired import UnpairedLoss
from keel.recipes.policy_gradient import KLPlacement, grpo
from keel.recipes.preference import dpo
from keel.recipes.registry import recipe


def dpo_at(beta: float = 0.05) -> Method:
    """DPO with the beta of implicit reward models; what their loss of pairs is."""
    return dpo(beta)


@recipe(
    paper=69,
    baseline="dpo",
    neutral={"loss": "dpo"},
    reduces_to=dpo_at,
    preset={"train.learning_rate": 5e-7},
)
def implicit_prm(beta: float = 0.05, loss: Literal["ce", "kto", "dpo", "nca"] = "ce") -> Method:
    """A reward model of outcomes as log-ratio to the initial model, whose partial sums reward steps without labels.

        r = beta sum_t (log pi - log ref)_t,      -l log sigmoid(r) - (1 - l) log sigmoid(-r)

    `ImplicitProcessReward` and `ImplicitScore` read the model that comes out of it.

    Args:
        beta: of the log-ratio.
        loss: ce and kto learn from labels (`prompt`, `completion`, `label`), one response of a prompt suffices; dpo and
            nca from pairs. All of them fit the same r.

    Source: "Free Process Rewards without Process Labels", 2024; PRIME-RL/ImplicitPRM.
    """
    losses = {
        "ce": UnpairedLoss("log_sigmoid", LogRatio(), beta, "none"),
        "kto": UnpairedLoss("sigmoid", LogRatio(), beta),
        "dpo": PairLoss(LogSigmoid(), LogRatio(), beta),
        "nca": PairLoss(NCA(), LogRatio(), beta),
    }
    return Method(
        kind="pairs",
        terms={"outcome": losses[loss]},
        aggregation=Aggregation("sequence_mean_token_sum"),
        models={"ref": Initial()},
        claim=dpo(beta).claim if loss == "dpo" else Claim("likelihood of the labels, by log-ratios", form="words"),
    )


@recipe(paper=69, baseline="grpo", neutral={"prm_beta": 0.0})
def grpo_implicit_prm(
    prm: str | None = None,
    prm_reference: str | None = None,
    prm_beta: float = 0.05,
    level: Level = "token",
    separators: tuple[int, ...] = (),
    credit: Literal["sequence", "token"] = "token",
    **grpo_options,
) -> Method:
    """GRPO with the process rewards of an implicit reward model beside the outcome.

    Args:
        prm: what `implicit_prm` trained, a run's folder, a folder or hub name; it has to be named before training.
        prm_reference: the model that it started from; None is the policy before training.
        prm_beta: coefficient of its log-ratio; 0 loads neither and is GRPO.
        level: token or step.
        separators: ids of the tokens that end a step.
        credit: token gives each token the rewards from it on; sequence gives all tokens the sum, which is what a reward
            model of outcomes would give.

    Source: "Free Process Rewards without Process Labels", 2024; "Process Reinforcement through Implicit Rewards", 2025.
    """
    method = grpo(**grpo_options)
    if not prm_beta:
        return method
    process = ImplicitProcessReward("prm", "prm_reference", prm_beta, separators, level)
    first = Initial() if prm_reference is None else Pretrained(prm_reference)
    centre = {"centre": CentredToGo()} if credit == "token" else {}
    return method.replacing(
        transforms={"sum": WeightedSum(), "process": process, **method.transforms},
        advantage={**method.advantage, **centre},
        models={**method.models, "prm": Pretrained(prm or ""), "prm_reference": first},
        claim=Claim("E_pi[r] with rewards of steps on the way, less beta KL(pi || ref)", form="words"),
    )


@recipe(paper=179, baseline="sft", neutral={"student": 0.0, "distil": 0.0}, preset={"train.learning_rate": 3e-4})
def self_judge(student: float = 0.3, distil: float = 2.0) -> Method:
    """Supervised training of a judge with a reference in its prompt, which teaches itself to judge without one.

        CE_T + student CE_S + distil KL( sg[p_T] || p_S )

    The data have `prompt` with the reference, `prompt_without_reference`, and the digit as `completion`;
    `keel.parts.rewards.judges.judge_data` writes them, and `DigitJudge` reads the judge.

    Args:
        student: coefficient of the cross-entropy without a reference.
        distil: coefficient of the KL.

    Source: "Self-Judge: Selective Instruction Following with Alignment Self-Evaluation", 2024; nusnlp/Self-J.
    """
    return Method(
        kind="supervised",
        terms={"judge": JudgeDistillation(student, distil)},
        claim=Claim("likelihood of the scores with and without a reference, and the KL between both", form="words"),
    )


@recipe(paper=208, baseline="grpo", preset={"train.learning_rate": 4e-7})
def spct(beta: float = 0.08, num_generations: int = 4, kl: KLPlacement = "k3_ratio", **grpo_options) -> Method:
    """GRPO on judgements: principles, a critique and scores, of which the best response must get the highest.

    The task is `keel.tasks.judging:Judging` on preferences (`--task keel.tasks.judging:Judging --set
    task.options.data=pairs.jsonl`). Its reward is 1 or -1, so groups that are all right or all wrong teach nothing.

    Args:
        beta: coefficient of the KL to the initial model, .08 for 27B and .002 for 16B; too little, and the form of the
            judgements is lost.
        num_generations: the group size.
        kl: form of the KL.

    Source: "Inference-Time Scaling for Generalist Reward Modeling", 2025.
    """
    return grpo(beta=beta, num_generations=num_generations, kl=kl, **grpo_options)
