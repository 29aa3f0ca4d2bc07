"""Trainers of TRL, timed step by step."""

import contextlib
import io
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from benchmarks.models import build

Way = Callable[[], list[float]]


def clocked(
    trainer: Any,
    arguments: Any,
    shape: str,
    vocabulary: int,
    data: Sequence[Mapping[str, Any]],
    settings: Mapping[str, Any],
    **given: Any,
) -> Way:
    """Seconds of the step of one turn, generation included.

    Args:
        trainer, arguments: classes of TRL.
        shape, vocabulary: of the model; see `build`.
        data: what it learns from.
        settings: of `arguments`, beside those that all trainers have here.
        given: what else the trainer is made of.
    """
    from datasets import Dataset
    from transformers import AutoModelForCausalLM, TrainerCallback, TrainerState

    class Clock(TrainerCallback):
        """Seconds of each step."""

        def __init__(self) -> None:
            self.begun, self.spent = 0.0, []

        def on_step_begin(self, args, state, control, **known) -> None:
            self.begun = time.perf_counter()

        def on_step_end(self, args, state, control, **known) -> None:
            self.spent.append(time.perf_counter() - self.begun)

    model = build(shape, vocabulary)
    folder = tempfile.TemporaryDirectory()
    model.module.save_pretrained(folder.name)  # the reference is loaded from where the model came
    asked = arguments(
        output_dir=str(Path(folder.name) / "out"),
        learning_rate=1e-6,
        max_steps=1,
        save_strategy="no",
        report_to=[],
        use_cpu=True,
        disable_tqdm=True,
        logging_strategy="no",
        **settings,
    )
    clock = Clock()
    made = trainer(
        model=AutoModelForCausalLM.from_pretrained(folder.name),
        args=asked,
        train_dataset=Dataset.from_list(list(data)),
        processing_class=model.tokenizer,
        callbacks=[clock],
        **given,
    )

    def way() -> list[float]:
        clock.spent.clear()
        made.state = TrainerState()
        with contextlib.redirect_stdout(io.StringIO()):
            made.train()
        return list(clock.spent)

    way.folder = folder  # type: ignore[attr-defined]  # lives as long as the trainer
    return way
