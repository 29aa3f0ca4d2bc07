"""The built-in preferences: completions of the built-in model on a task, compared by a stated rule."""

from keel.models.load import load
from keel.parts.rewards.score import score
from keel.rollouts.choose import choose_generator
from keel.rollouts.sampling import Sampling
from keel.tasks.preferences import Kind, Preference, Preferences
from keel.tasks.task import Task
from keel.train.base import ensure_base
from keel.train.encode import Encoder
from keel.train.session import Reporter, silent


def built_in_preferences(task: Task, kind: Kind, seed: int = 0, report: Reporter = silent) -> Preferences:
    """Pairs of completions of the built-in model: correct over wrong, and among correct ones shorter over longer."""
    policy = load(ensure_base(task, report=report))
    encoder, drawing = Encoder(policy), choose_generator(policy, "auto")
    splits = []
    for name, examples, count in (("train", task.train, 512), ("held_out", task.held_out, 64)):
        some = [examples[i] for i in range(min(count, len(examples)))]
        sampling = Sampling(max_completion_length=task.max_completion_length)
        rows = drawing.generate([encoder.prompt(e.prompt) for e in some], 8, sampling, seed=seed)
        texts = [encoder.decode(rows.tokens[i][rows.mask[i]].tolist()) for i in range(len(rows))]
        owners = [some[i] for i in rows.group.tolist()]
        columns = {key: [e.columns[key] for e in owners] for key in some[0].columns}
        tokens = [rows.tokens[i][rows.mask[i]].tolist() for i in range(len(rows))]
        values = score(task.rewards, [e.prompt for e in owners], texts, tokens, columns, rows.group).values.sum(1)
        found = []
        for g, example in enumerate(some):
            own = (rows.group == g).nonzero().flatten().tolist()
            ranked = sorted(own, key=lambda i: (-float(values[i]), len(texts[i])))
            best, worst = ranked[0], ranked[-1]
            if float(values[best]) > float(values[worst]):
                found.append(Preference(example.prompt, (texts[best], texts[worst]), (1.0, 0.0), len(found)))
        splits.append(found)
    return Preferences(task.name, kind, *splits)
