"""Sums with one turn: 0+1=, 1+2=, ..."""

import verifiers.v1 as vf

__all__ = ["SumTaskset"]


class SumData(vf.TaskData):
    answer: int = 0


class SumTask(vf.Task[SumData]):
    @vf.reward(weight=2.0)
    async def correct(self, task, trace) -> float:
        if trace.last_reply == "crash":
            raise ValueError("no number")
        return float(trace.last_reply == str(task.answer))

    @vf.reward(weight=0.5)
    async def short(self, trace) -> float:
        return float(len(trace.last_reply) < 5)


class SumConfig(vf.TasksetConfig):
    count: int = 8


class SumTaskset(vf.Taskset[SumTask, SumConfig]):
    def load(self):
        for i in range(self.config.count):
            yield SumTask(SumData(prompt=f"{i}+{i + 1}=", system_prompt="Add.", answer=2 * i + 1), self.config.task)
