"""The result file of a job: every metric of every step, as CSV under OpenAI's column names."""

import csv
import io
from collections.abc import Iterable

from ..events import Event, metrics_by_step

COLUMNS = (
    "step",
    "train_loss",
    "train_accuracy",
    "valid_loss",
    "valid_mean_token_accuracy",
    "full_valid_loss",
    "full_valid_mean_token_accuracy",
    "learning_rate",
    "grad_norm",
    "epoch",
    "tokens",
    "tokens_per_second",
)
_SOURCES = {"train_accuracy": "train_mean_token_accuracy"}


def result_csv(events: Iterable[Event]) -> str:
    """One row a step, in order."""
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(COLUMNS)
    for metrics in metrics_by_step(events).values():
        writer.writerow([metrics.get(_SOURCES.get(column, column), "") for column in COLUMNS])
    return text.getvalue()
