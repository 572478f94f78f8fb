"""Tasks: where examples come from and how answers are checked, one file a task.

task_named("chain")(n_ops=3).examples("train", limit=10)
"""

from innerloop.checks.imported import imported
from innerloop.errors import InputError, nearest
from innerloop.tasks.arithmetic import GsmHard, MultiArith, Svamp
from innerloop.tasks.chain import Chain
from innerloop.tasks.competition_math import Math
from innerloop.tasks.countdown import Countdown
from innerloop.tasks.gsm8k import Gsm8k
from innerloop.tasks.igsm import Igsm
from innerloop.tasks.latin import Latin
from innerloop.tasks.multiplication import Mult4x4, Mult5x5, Multiplication
from innerloop.tasks.phop import PHop
from innerloop.tasks.plain import Plain
from innerloop.tasks.prontoqa import ProntoQA
from innerloop.tasks.prosqa import ProsQA
from innerloop.tasks.reversal import Reversal
from innerloop.tasks.star import Star
from innerloop.tasks.strategyqa import StrategyQA
from innerloop.tasks.task import FileTask, Task
from innerloop.tasks.text import Text
from innerloop.tasks.tracking import Tracking

__all__ = [
    "TASKS",
    "Chain",
    "Countdown",
    "FileTask",
    "Gsm8k",
    "GsmHard",
    "Igsm",
    "Latin",
    "Math",
    "Mult4x4",
    "Mult5x5",
    "MultiArith",
    "Multiplication",
    "PHop",
    "Plain",
    "ProntoQA",
    "ProsQA",
    "Reversal",
    "Star",
    "StrategyQA",
    "Svamp",
    "Task",
    "Text",
    "Tracking",
    "task_named",
]

_CLASSES: tuple[type[Task], ...] = (
    Chain,
    Latin,
    Tracking,
    Star,
    Countdown,
    Multiplication,
    PHop,
    Reversal,
    Plain,
    ProsQA,
    ProntoQA,
    Gsm8k,
    GsmHard,
    Svamp,
    MultiArith,
    Math,
    StrategyQA,
    Mult4x4,
    Mult5x5,
    Igsm,
    Text,
)
TASKS: dict[str, type[Task]] = {task.name: task for task in _CLASSES}


def task_named(name: str) -> type[Task]:
    """Return the task class of that name; ``my_package.module.Class`` is one of one's own.

    Raises:
        InputError: there is none, or what has that name is no task.
    """
    if name in TASKS:
        return TASKS[name]
    if "." not in name:
        raise InputError(f"no task '{name}'{nearest(name, TASKS)}: choose one of {', '.join(TASKS)}")
    found = imported(f"task '{name}'", name)
    if not (isinstance(found, type) and issubclass(found, Task)):
        raise InputError(f"task '{name}' is no class derived from innerloop.Task")
    return found


def named_as(task: Task) -> str:
    """Return the name by which a recipe or a saved run finds a task's class again."""
    cls = type(task)
    return cls.name if TASKS.get(cls.name) is cls else f"{cls.__module__}.{cls.__qualname__}"
