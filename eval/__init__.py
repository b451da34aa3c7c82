"""steep.eval: reproducible scores of a model - perplexity, multiple choice, generated answers - and their uncertainty.

`evaluate` runs tasks (small YAML files) on a model folder and publishes one JSON file; beneath it, `Encoder` turns text
into tokens and `Scorer` tokens into log-probabilities over a prefix tree. Knows engine and data.
"""

from .encoding import Encoder, Request
from .evaluate import evaluate
from .generation import Answer, generate_until
from .model import load_model
from .multiple_choice import Item, multiple_choice
from .objective import TaskObjective, task_objective
from .perplexity import perplexity, rolling_loglikelihood
from .scorer import Score, Scorer
from .task import BoundTask, Task, load_tasks

__all__ = [
    "Answer",
    "BoundTask",
    "Encoder",
    "Item",
    "Request",
    "Score",
    "Scorer",
    "Task",
    "TaskObjective",
    "evaluate",
    "generate_until",
    "load_model",
    "load_tasks",
    "multiple_choice",
    "perplexity",
    "rolling_loglikelihood",
    "task_objective",
]
