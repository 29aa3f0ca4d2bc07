"""Two agents, neither with a model of its own."""

import verifiers.v1 as vf
from keel_sums import SumTaskset as Sums

__all__ = ["PairEnv", "PairTaskset"]


class PairTaskset(Sums):
    pass


class PairConfig(vf.EnvConfig):
    one: vf.AgentConfig = vf.AgentConfig()
    other: vf.AgentConfig = vf.AgentConfig()


class PairEnv(vf.Env[PairConfig]):
    async def run(self, task, agents):
        await agents.one.run(task)
        await agents.other.run(task)
