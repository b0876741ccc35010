"""What a compressed context is asked: generated documents, and published data sets."""

from chunkkv.evaluation.tasks.base import Question, Sample, Task

__all__ = ["Question", "Sample", "Task"]
