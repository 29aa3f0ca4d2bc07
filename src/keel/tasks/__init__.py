"""Prompts with verifiers: countdown, the data sets of reasoning-gym, and files of one's own."""

from keel.tasks.data import DataTask, load_data
from keel.tasks.environment import Answer, Ended, Environment, InteractiveTask
from keel.tasks.load import load_task, task_names
from keel.tasks.task import Example, RewardFunction, Task, check_disjoint, completion_text, final_answer

__all__ = [
    "Answer",
    "DataTask",
    "Ended",
    "Environment",
    "Example",
    "InteractiveTask",
    "RewardFunction",
    "Task",
    "check_disjoint",
    "completion_text",
    "final_answer",
    "load_data",
    "load_task",
    "task_names",
]
