"""The saved view "Trials" of MLflow's UI: the columns that matter first, and charts of rank, alpha ratio and rate.

MLflow's UI keeps a saved view as a tag of the experiment; its address names the tag. The words are those of its
ExperimentPageUIState (MLflow 3.17); keys that another version does not know are ignored there.
"""

from __future__ import annotations

import json
from typing import Any

from sweep.study.schema import Study

KEY = "trials"  # in the address, as viewStateShareKey
TAG = f"mlflow.sharedViewState.{KEY}"
AXES = ("r", "alpha_ratio", "learning_rate")
WIDTHS = {  # in pixels, in the columns' order
    "attributes.`Run Name`": 330,
    "runDateAndNestInfo": 130,
    "params.`arm`": 120,
    "params.`phase`": 80,
    "params.`seed`": 60,
    "params.`r`": 60,
    "params.`alpha_ratio`": 100,
    "params.`learning_rate`": 115,
    "metrics.`test_loss`": 100,
    "metrics.`test_{metric}`": 120,
    "metrics.`eval_loss`": 100,
}


def saved_view(study: Study, started_ms: int) -> str:
    """The tag's value: the study's trials, those with the lowest test loss first; the parent run is left out."""
    metric = "perplexity" if study.task == "causal-lm" else "accuracy"
    widths = {column.format(metric=metric): width for column, width in WIDTHS.items()}
    charts = {"Every trial: validation loss": "eval_loss", "Confirm trials: test loss": "test_loss"}
    state = {
        "searchFilter": "tags.`sweep.trial` != ''",
        "orderByKey": "metrics.`test_loss`",
        "orderByAsc": True,
        "selectedColumns": [column for column in widths if column.startswith(("params", "metrics"))],
        "columnOrder": list(widths),
        "columnWidths": widths,
        "runsHiddenMode": "SHOW_ALL",
        "compareRunCharts": [_parallel_coordinates(loss) for loss in charts.values()],
        "compareRunSections": [_section(loss, title) for title, loss in charts.items()],
        "isAccordionReordered": True,  # ours stay above those that the UI makes of every metric
    }
    return json.dumps({"name": "Trials", "createdAt": started_ms, "updatedAt": started_ms, "state": json.dumps(state)})


def _parallel_coordinates(loss: str) -> dict[str, Any]:
    return {
        "uuid": f"parallel-{loss}",
        "type": "PARALLEL",
        "metricSectionId": f"section-{loss}",
        "selectedParams": list(AXES),
        "selectedMetrics": [loss],
        "showAllRuns": True,
        "deleted": False,
        "isGenerated": False,
    }


def _section(loss: str, title: str) -> dict[str, Any]:
    return {
        "uuid": f"section-{loss}",
        "name": title,
        "display": True,
        "isReordered": True,
        "deleted": False,
        "isGenerated": False,
    }
