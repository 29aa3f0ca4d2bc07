"""What a target is, for people: a table, sentences with the numbers, and a page with the masses drawn."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from keel.report.page import document, figures, prose, table, text, write
from keel.report.target_figure import Group, masses
from keel.targets.survey import Facts, Found, Survey

DRAWN = 6  # prompts drawn on a page
SAID = 3  # targets of which each gets a sentence; of more, the first and the last do
SAME = 0.01  # total variation below which two distributions are called the same
COLUMNS = {
    "reward": "reward",
    "kl": "KL",
    "entropy": "entropy",
    "good": "good",
    "largest": "likeliest",
    "surviving": "kept",
    "effective": "worth",
}
INTRODUCTION = (
    "The distribution that is best under a reward and a penalty on the distance from a reference: where training would "
    "arrive if nothing stood in its way. Nothing was trained for this page."
)
LEGEND = (
    "Means over prompts. KL to the reference and entropy in nats; good: mass on outcomes with a reward of at least "
    "{good:g}; likeliest: mass of the likeliest good answer; kept: good answers with at least {keep:.0%} of the mass; "
    "worth: as many equally likely good answers have the same entropy."
)


@dataclass(frozen=True)
class TargetReport:
    """What was asked for, and what that is.

    Args:
        survey: the outcomes and their reference.
        found: a distribution for each thing asked for.
        sampled: completions drawn of each prompt; 0 if the outcomes were given.
        left_out: prompts whose completions could not be scored.
    """

    survey: Survey
    found: tuple[Found, ...]
    sampled: int = 0
    left_out: int = 0

    def to_json(self) -> dict[str, Any]:
        """All numbers, for programs; what is not finite is null."""
        survey = self.survey
        return _plain(
            {
                "good_from": survey.threshold,
                "keep": survey.keep,
                "good_modes": survey.good_modes,
                "samples_per_prompt": self.sampled,
                "prompts_left_out": self.left_out,
                "unseen": self.unseen,
                "reference": asdict(survey.reference),
                "even": asdict(self.even),
                "targets": [found.to_json() for found in self.found],
                "findings": self.findings(),
                "prompts": [self._prompt_json(place) for place in range(len(survey.prompts))],
            }
        )

    def _prompt_json(self, place: int) -> dict[str, Any]:
        survey, listed = self.survey, self.survey.prompts[place]
        outcomes = [
            {
                "name": listed.names[i],
                "mode": listed.modes[i],
                "reward": float(listed.reward[i]),
                "good": bool(survey.good[place, i]),
                "ref": float(listed.log_ref[i].exp()),
                "target": [float(found.log_prob[place, i].exp()) for found in self.found],
            }
            for i in self.order(place)
        ]
        return {"prompt": listed.prompt, "unseen": listed.unseen, "outcomes": outcomes}

    def order(self, place: int) -> list[int]:
        """Outcomes of a prompt, the good ones first, each kind by reference probability."""
        survey, count = self.survey, len(self.survey.prompts[place].names)
        key = survey.log_ref[place, :count].exp() + 2 * survey.good[place, :count].double()
        return key.argsort(descending=True, stable=True).tolist()

    def groups(self, place: int) -> list[Group]:
        """Answers of a prompt, the good ones first, each kind by reference probability."""
        survey, listed = self.survey, self.survey.prompts[place]
        every = torch.stack([survey.log_ref[place], *(found.log_prob[place] for found in self.found)], -1).exp()
        held: dict[tuple[str, float], list[int]] = {}
        for i in self.order(place):
            held.setdefault((listed.modes[i], float(listed.reward[i])), []).append(i)
        groups = [
            Group(mode, reward, bool(survey.good[place, at[0]]), len(at), tuple(every[at].sum(0).tolist()))
            for (mode, reward), at in held.items()
        ]
        return sorted(groups, key=lambda group: (not group.good, -group.masses[0]))

    @property
    def unseen(self) -> float:
        """Mean reference probability of what is not listed."""
        return sum(listed.unseen for listed in self.survey.prompts) / len(self.survey.prompts)

    @property
    def without_good(self) -> int:
        """Prompts that have no good outcome among those listed."""
        return int((~self.survey.good.any(-1)).sum())

    @cached_property
    def even(self) -> Facts:
        """The even distribution over the good outcomes of each prompt (the reference where there is none)."""
        good = self.survey.good
        level = torch.zeros_like(self.survey.log_ref).masked_fill(~good, -math.inf)
        some = good.any(-1, keepdim=True)
        return self.survey.facts(torch.where(some, level, self.survey.log_ref).log_softmax(-1))

    def restricted(self) -> Float[Tensor, "n S"]:
        """log of the reference restricted to the good outcomes of each prompt."""
        good = self.survey.good
        kept = self.survey.log_ref.masked_fill(~good & good.any(-1, keepdim=True), -math.inf)
        return kept.log_softmax(-1)

    def findings(self) -> list[str]:
        """What the numbers mean, in sentences."""
        return [*self._source(), *self._collapse(), *self._notes()]

    def _source(self) -> Iterator[str]:
        survey = self.survey
        count = len(survey.prompts)
        outcomes = sum(len(listed.names) for listed in survey.prompts) / count
        where = "1 prompt" if count == 1 else f"{count} prompts"
        if self.sampled:
            yield (
                f"{where}, {self.sampled} completions of each, {outcomes:.4g} different ones on average. They hold "
                f"{1 - self.unseen:.1%} of the reference; all that follows is about these alone."
            )
            yield self._unseen_good()
        else:
            rest = f" They hold {1 - self.unseen:.1%} of the reference; the rest is left out." if self.unseen else ""
            yield f"{where}, {outcomes:.4g} outcomes{' on average' if count > 1 else ''}.{rest}"
        if self.left_out:
            yield f"{_count(self.left_out, 'prompt')} could not be scored and left the survey."
        if self.without_good:
            yield (
                f"{_count(self.without_good, 'prompt')} of {count} had no good outcome (reward of at least "
                f"{survey.threshold:g}): no tilt of the reference can ask for what was never seen there."
            )

    def _unseen_good(self) -> str:
        """Good mass of the reference by exact probabilities of what was seen, and by counting."""
        survey = self.survey
        listed = [
            float(prompt.log_ref[survey.good[place, : len(prompt.names)]].exp().sum())
            for place, prompt in enumerate(survey.prompts)
        ]
        shares = [
            float(survey.good[place][prompt.samples].double().mean())
            for place, prompt in enumerate(survey.prompts)
            if prompt.samples is not None
        ]
        share, count = sum(shares) / len(shares), len(shares)
        error = math.sqrt(sum(s * (1 - s) for s in shares) / self.sampled) / count
        return (
            f"Good completions that were seen have probability {sum(listed) / count:.1%} under the reference; counting "
            f"samples gives {share:.1%} ± {error:.1%} for all good ones, seen or not."
        )

    def _collapse(self) -> Iterator[str]:
        survey, even = self.survey, self.even
        tilts = [found for found in self.found if found.fit is None]
        if self.without_good == len(survey.prompts) or not tilts:
            return
        alike = self._equal_rewards()
        if alike and int(survey.good.sum(-1).max()) > 1:
            moved_most = max(self._odds_moved(found) for found in tilts)
            within = f"to within {moved_most:.0e} in log-odds" if moved_most else "exactly"
            yield (f"Equal rewards keep their reference odds, under every divergence and every beta (here {within}).")
        restricted = self.restricted()
        for found in tilts if len(tilts) <= SAID else [tilts[0], tilts[-1]]:
            moved = 0.5 * (found.log_prob.exp() - restricted.exp()).abs().sum(-1).mean()
            good = f"{_places(found.facts.good)} of the mass is on good answers (reference {survey.reference.good:.1%})"
            held = (
                f"The likeliest good answer holds {found.facts.largest:.1%} of the target; under the reference it held "
                f"{survey.reference.largest_of_good:.1%} of the good mass"
            )
            if survey.good_modes <= 1:
                yield f"{found.wish.label}: {good}."
            elif alike and float(moved) < SAME:
                yield (
                    f"{found.wish.label}: {good}; the target is the reference restricted to them. {held}: what "
                    "collapse there is, is asked for."
                )
            else:
                yield f"{found.wish.label}: {good}. {held}."
        if survey.good_modes > 1:
            first = tilts[0].facts
            yield (
                f"Of {survey.good_modes:.3g} good answers{' a prompt' if len(survey.prompts) > 1 else ''}, "
                f"{first.surviving:.3g} keep at least {survey.keep:.0%} of the first target; together they are worth "
                f"{first.effective:.2f} equal ones. `mara` with threshold {survey.threshold:g} asks for all good "
                f"completions alike: of those listed, the likeliest answer would hold {even.largest:.1%}, and the "
                f"answers be worth {even.effective:.2f} equal ones."
            )

    def _notes(self) -> Iterator[str]:
        for found in self.found:
            if found.wish.kl_budget is not None:
                yield self._budget(found)
            lost = int(((found.log_prob == -math.inf) & (self.survey.log_ref > -math.inf)).sum())
            if lost and found.wish.beta is not None:
                yield f"{found.wish.label}: probability exactly 0 for {_count(lost, 'outcome')} of the reference."
            if found.fit is not None:
                yield _fit(found)
            if found.partition is not None:
                p = found.partition
                error = float(p.standard_error.square().mean() / len(p.log_z)) ** 0.5
                low = f" Few samples make it too low, by about {-float(p.bias.mean()):.2g} here." if p.samples else ""
                spread = f" ± {error:.2g}" if p.samples else ""
                yield f"{found.wish.label}: log Z {float(p.log_z.mean()):.4f}{spread}.{low}"
                if p.warning:
                    yield f"{found.wish.label}: {p.warning}"

    def _budget(self, found: Found) -> str:
        if found.beta == 0:
            return (
                f"{found.wish.label}: that is as much as the best outcomes can use ({found.facts.kl:.4g} nats); the "
                "target is the reference restricted to them."
            )
        return f"{found.wish.label}: beta {found.beta:.4g} spends it."

    def _equal_rewards(self) -> bool:
        survey = self.survey
        spread = [
            row[good].max() - row[good].min()
            for row, good in zip(survey.reward, survey.good, strict=True)
            if good.any()
        ]
        return all(float(s) == 0 for s in spread)

    def _odds_moved(self, found: Found) -> float:
        """Largest change of the log-odds of two good outcomes with mass."""
        change = torch.where(self.survey.good, found.log_prob - self.survey.log_ref, math.nan)
        worst = 0.0
        for row in change:
            finite = row[row.isfinite()]
            worst = max(worst, float(finite.max() - finite.min()) if len(finite) else 0.0)
        return worst

    def rows(self) -> list[tuple[str, list[str]]]:
        """The table: a label and the columns of `COLUMNS`, the reference first."""
        named = [("reference", self.survey.reference)]
        named += [(self.label(found), found.facts) for found in self.found]
        named.append(("even over good (mara)", self.even))
        return [(name, [_cell(facts, key) for key in COLUMNS]) for name, facts in named]

    def label(self, found: Found) -> str:
        """What was asked for, with the beta that was found."""
        return f"{found.wish.label} (beta {found.beta:.3g})" if found.wish.kl_budget is not None else found.wish.label

    def terminal(self) -> str:
        """The table as text."""
        rows = self.rows()
        width = max(len(name) for name, _ in rows) + 2
        lines = ["".join([" " * width, *(f"{name:>10}" for name in COLUMNS.values())])]
        lines += [f"{name:<{width}}" + "".join(f"{cell:>10}" for cell in cells) for name, cells in rows]
        return "\n".join(lines)

    @property
    def legend(self) -> str:
        """What the columns of the table are."""
        return LEGEND.format(good=self.survey.threshold, keep=self.survey.keep)

    def write_html(self, path: str | Path, command: str | None = None) -> Path:
        """Write a page that stands alone.

        Raises:
            UserError: the file cannot be written.
        """
        items = "".join(f"<li>{prose(sentence)}</li>" for sentence in self.findings())
        rows = [[text(name), *cells] for name, cells in self.rows()]
        labels = ["reference", *(self.label(found) for found in self.found)]
        prompts = self.survey.prompts[:DRAWN]
        drawn = [masses(listed.prompt, labels, self.groups(place)) for place, listed in enumerate(prompts)]
        again = f"<footer>Made again by <code>{text(command)}</code>.</footer>" if command else ""
        title = "What these settings ask for"
        return write(
            path,
            document(
                f"{title} – Keel",
                [
                    f'<header>\n<h1>{title}</h1>\n<p class="muted">{text(INTRODUCTION)}</p>\n</header>',
                    table(["", *COLUMNS.values()], rows, self.legend),
                    f"<ul>{items}</ul>",
                    figures(drawn, "target"),
                    again,
                ],
            ),
        )


def _fit(found: Found) -> str:
    fit = found.fit
    assert fit is not None
    errors = fit.standard_error
    shown = ", ".join(
        f"{float(v):.4g}" + (f" ± {float(errors[k]):.2g}" if errors is not None else "")
        for k, v in enumerate(fit.multipliers)
    )
    risk = f" So many samples put the fitted target about {fit.risk:.2g} nats off." if fit.risk is not None else ""
    return f"{found.wish.label}: multiplier{'s' if len(fit.multipliers) > 1 else ''} {shown}.{risk}"


def _cell(facts: Facts, key: str) -> str:
    value = getattr(facts, key)
    if math.isnan(value):
        return "–"
    return f"{value:.1%}" if key in ("good", "largest") else f"{value + 0.0:.3f}".replace("-0.000", "0.000")


def _places(share: float) -> str:
    """A share with enough digits to tell it from 1."""
    return f"{share:.1%}" if share < 0.9995 else f"{share:.3%}" if share < 0.999995 else "all"


def _count(number: int, thing: str) -> str:
    return f"{number} {thing}{'' if number == 1 else 's'}"


def _plain(data: Any) -> Any:
    """Data that JSON can hold."""
    if isinstance(data, dict):
        return {key: _plain(value) for key, value in data.items()}
    if isinstance(data, (list, tuple)):
        return [_plain(value) for value in data]
    return None if isinstance(data, float) and not math.isfinite(data) else data
