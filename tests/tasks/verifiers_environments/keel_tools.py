"""One question that takes a tool."""

import verifiers.v1 as vf

__all__ = ["ToolTaskset"]


class Calculator(vf.Toolset[vf.ToolsetConfig, vf.State]):
    TOOL_PREFIX = "calculator"

    @vf.tool
    def double(self, number: int) -> str:
        """Twice the number."""
        return str(2 * number)


class ToolTask(vf.Task[vf.TaskData]):
    @classmethod
    def toolsets(cls, config):
        return [Calculator(vf.ToolsetConfig())]

    @vf.reward
    async def right(self, task, trace) -> float:
        return float(trace.last_reply == "42")


class ToolTaskset(vf.Taskset[ToolTask, vf.TasksetConfig]):
    def load(self):
        for i in range(3):
            yield ToolTask(vf.TaskData(prompt=f"Question {i}: what is twice 21?"), self.config.task)


if __name__ == "__main__":
    Calculator.run()
