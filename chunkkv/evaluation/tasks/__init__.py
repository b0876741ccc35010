"""What a compressed context is asked: generated documents, and published data sets."""

from collections.abc import Mapping
from typing import Any, Final

from chunkkv.evaluation.tasks.base import Question, Sample, Task
from chunkkv.evaluation.tasks.gsm8k import GSM8KTask
from chunkkv.evaluation.tasks.jailbreakv import JailbreakVTask
from chunkkv.evaluation.tasks.keys import MultiKeyTask, MultiValueTask
from chunkkv.evaluation.tasks.longbench import LongBenchTask
from chunkkv.evaluation.tasks.mixed import MixedQuestionsTask
from chunkkv.evaluation.tasks.needle import NeedleGridTask, NeedleTask
from chunkkv.evaluation.tasks.variables import VariableTrackingTask

# What each is called on a command line. Settings are the fields of the class; those of the first
# six all have defaults.
TASKS: Final[Mapping[str, type[Any]]] = {
    "needle": NeedleTask,
    "needle-grid": NeedleGridTask,
    "multi-key": MultiKeyTask,
    "multi-value": MultiValueTask,
    "variables": VariableTrackingTask,
    "mixed": MixedQuestionsTask,
    "longbench": LongBenchTask,
    "gsm8k": GSM8KTask,
    "jailbreakv": JailbreakVTask,
}

__all__ = [
    "TASKS",
    "GSM8KTask",
    "JailbreakVTask",
    "LongBenchTask",
    "MixedQuestionsTask",
    "MultiKeyTask",
    "MultiValueTask",
    "NeedleGridTask",
    "NeedleTask",
    "Question",
    "Sample",
    "Task",
    "VariableTrackingTask",
]
