"""Reward models from pairs of completions."""

from keel.core.aggregate import Aggregation
from keel.method import Claim, Method
from keel.models.heads import RewardHead
from keel.models.sources import Initial
from keel.parts.controllers.ahead import LookAhead
from keel.parts.rewards.strength import Mode, PreferenceStrength
from keel.parts.terms.early_learning import EarlyLearning
from keel.parts.terms.links import LogSigmoid
from keel.parts.terms.pairs import PairLoss
from keel.parts.terms.reward_models import Centring
from keel.parts.terms.scores import HeadScore
from keel.parts.terms.state_contrast import Contrastive, On
from keel.recipes.registry import recipe

PRESET = {"train.learning_rate": 1e-4}


@recipe(preset=PRESET)
def bradley_terry(margin: float = 0.0, centring: float = 0.0, label_smoothing: float = 0.0) -> Method:
    """A reward model by the likelihood of Bradley and Terry: -log sigmoid(R_chosen - R_rejected).

    Args:
        margin: factor of the margin that the data state for each pair; 0 leaves it out.
        centring: coefficient of (R_chosen + R_rejected)^2, 0.01 in the literature; 0 leaves it out.
        label_smoothing: share of pairs that are taken to be in the wrong order.

    Source: Ouyang et al., "Training Language Models to Follow Instructions with Human Feedback", 2022; margin of
        "Llama 2", 2023; defaults of TRL.
    """
    score = HeadScore()
    pairs = PairLoss(LogSigmoid(), score, beta=1.0, margin=margin, label_smoothing=label_smoothing)
    return Method(
        kind="reward",
        terms={"pairs": pairs, "centring": Centring(centring, score)},
        aggregation=Aggregation("sequence_mean_token_mean"),
        heads={"reward": RewardHead()},
        claim=Claim("the rewards behind the comparisons, up to a constant of each prompt"),
    )


@recipe(paper=199, baseline="bradley_terry", preset=PRESET)
def preference_strength_rm(
    mode: Mode = "flip_soft", share: float = 0.2, members: int = 2, folds: int = 2, label_smoothing: float = 0.0
) -> Method:
    """A reward model whose pairs are flipped, softened or given a margin by how strongly other models prefer them.

    Args:
        mode: flip, soft, margin, flip_soft or flip_margin.
        share: of the pairs, the weakest, that are flipped.
        members, folds: reward models for each part of the data, and parts.
        label_smoothing: share of pairs that are taken to be in the wrong order.

    Source: Wang et al., "Secrets of RLHF in Large Language Models Part II: Reward Modeling", 2024.
    """
    margin = 1.0 if mode.endswith("margin") else 0.0
    strength = PreferenceStrength(mode, share, members, folds)
    claim = Claim("the rewards behind comparisons of which other models have taken the noise", form="words")
    return bradley_terry(margin, 0.0, label_smoothing).replacing(transforms={"strength": strength}, claim=claim)


@recipe(paper=199, baseline="bradley_terry", neutral={"coef": 0.0}, preset=PRESET)
def contrastive_rm(coef: float = 0.1, on: On = "states", temperature: float = 0.05, **reward_options) -> Method:
    """A reward model whose states of different texts are kept apart by a contrastive term (SimCSE).

    Args:
        coef: of the term.
        on: states of the completions, or differences of the two of a pair.
        temperature: of the term.

    Source: Wang et al., "Secrets of RLHF in Large Language Models Part II: Reward Modeling", 2024.
    """
    term = Contrastive(coef, on, temperature)
    claim = Claim("the rewards behind the comparisons, and states of different texts apart", form="words")
    return bradley_terry(**reward_options).adding(terms={"contrast": term}).replacing(claim=claim)


@recipe(paper=120, baseline="bradley_terry", neutral={"coef": 0.0}, preset=PRESET)
def early_learning_rm(coef: float = 3.0, decay: float = 0.7, **reward_options) -> Method:
    """A reward model that is held to what it believed of each pair early on, so that wrong labels lose their gradient.

    Args:
        coef: of the term; above 2 p / (2 p - 1) a model that is sure by p resists a label that says otherwise.
        decay: of the running mean of what the model believed of a pair.

    Source: "Early-Learning Regularization Prevents Memorization of Noisy Labels", 2020, of classes; a comparison is one
        of two classes.
    """
    claim = Claim("the rewards behind comparisons of which some are the wrong way round", form="words")
    term = EarlyLearning(coef, decay)
    return bradley_terry(**reward_options).adding(terms={"early": term}).replacing(claim=claim)


@recipe(paper=199, baseline="bradley_terry", neutral={"rate": 0.0}, preset=PRESET)
def meta_rm(rate: float = 1e-3, num_generations: int = 4, **reward_options) -> Method:
    """A reward model whose gradients are taken a step ahead, where rewards of unlabelled samples differ more (MetaRM).

    Args:
        rate: of the step ahead.
        num_generations: samples of a prompt, drawn by the model `sampler`, the policy before training.

    Source: Wang et al., "Secrets of RLHF in Large Language Models Part II: Reward Modeling", 2024.
    """
    ahead = LookAhead(rate, num_generations)
    return bradley_terry(**reward_options).adding(controllers={"ahead": ahead}, models={"sampler": Initial()})
