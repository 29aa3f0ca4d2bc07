"""From a fresh Python process to a trainer that could take its first step."""

import statistics
import tempfile
from collections.abc import Iterator

from benchmarks.measuring import Row, in_process
from benchmarks.models import build

COMMAND = "python -m benchmarks start"
CODE = """
import json, time
begun = time.perf_counter()
{body}
print(json.dumps({{"seconds": time.perf_counter() - begun}}))
"""
KEEL = """
from keel.models.load import load
from keel.train.session import build_session
from keel.train.setup import prepare_setup
setup = prepare_setup("grpo", {folder!r}, None, None, [{{"prompt": "w3 w4"}}] * 8,
    lambda completions, **k: [0.0] * len(completions), seed=0, name=None, config=None, settings={{"beta": 0.04}})
session = build_session(setup.config, setup.task, load({folder!r}), setup.rewards)
"""
TRL = """
from datasets import Dataset
from trl import GRPOConfig, GRPOTrainer
trainer = GRPOTrainer({folder!r}, lambda completions, **k: [0.0] * len(completions),
    args=GRPOConfig(output_dir={folder!r} + "/out", beta=0.04, use_cpu=True, report_to=[]),
    train_dataset=Dataset.from_list([{{"prompt": "w3 w4"}}] * 8))
"""


def rows(repeats: int = 5, threads: int = 2) -> Iterator[Row]:
    """The processes in turns, after one of each that fills the disk's cache."""
    with tempfile.TemporaryDirectory() as folder:
        model = build("1M", 64)
        model.module.save_pretrained(folder)
        model.tokenizer.save_pretrained(folder)
        spent: dict[str, list[float]] = {KEEL: [], TRL: []}
        for turn in range(repeats + 1):
            for body, found in spent.items():
                seconds = in_process(CODE.format(body=body.format(folder=folder)), threads)["seconds"]
                found += [seconds] if turn else []
    ours, theirs = statistics.median(spent[KEEL]), statistics.median(spent[TRL])
    yield Row("import, and a GRPO trainer ready", "default", ours, theirs, "s", theirs / ours, 2.0, "", COMMAND)
