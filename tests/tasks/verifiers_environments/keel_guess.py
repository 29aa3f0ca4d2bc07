"""A hidden number, guessed in turns; the environment plays the user."""

import verifiers.v1 as vf

__all__ = ["GuessEnv", "GuessTaskset"]


class GuessData(vf.TaskData):
    hidden: int = 0


class GuessTask(vf.Task[GuessData]):
    pass


class GuessTaskset(vf.Taskset[GuessTask, vf.TasksetConfig]):
    INFINITE = True

    def load(self):
        number = 0
        while True:
            yield GuessTask(GuessData(prompt=f"Game {number}. Guess.", hidden=number % 10), self.config.task)
            number += 1


class GuessConfig(vf.EnvConfig):
    player: vf.AgentConfig = vf.AgentConfig()


class GuessEnv(vf.Env[GuessConfig]):
    async def run(self, task, agents):
        won = 0.0
        async with agents.player.interaction(task) as game:
            segment = await game.turn()
            while not segment.terminated:
                guess = int(segment.last_reply)
                if guess == task.data.hidden:
                    won = 1.0
                    break
                segment = await game.turn("higher" if guess < task.data.hidden else "lower")
        game.trace.record_reward("won", won)
