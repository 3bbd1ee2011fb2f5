"""All labelled runs."""

from evaluation import (
    healthy_more,
    healthy_plain,
    healthy_traps,
    healthy_varied,
    public,
    sick_depth,
    sick_more,
    sick_training,
)
from evaluation.training import RUNS

__all__ = [
    "RUNS",
    "healthy_more",
    "healthy_plain",
    "healthy_traps",
    "healthy_varied",
    "public",
    "sick_depth",
    "sick_more",
    "sick_training",
]
