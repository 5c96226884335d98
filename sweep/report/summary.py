"""The recommendation and the confirmed arms in short, as Markdown: what MLflow's page of the study shows."""

from __future__ import annotations

from sweep.report.results import ArmResult, Findings
from sweep.report.words import arm_title, count, loss_decimals, metric, number, span
from sweep.study.schema import Study

MOST_ARMS = 20  # a note in MLflow holds 8,000 characters


def summary(study: Study, findings: Findings) -> str:
    """The sentences, the first in bold, and a row for each confirmed arm."""
    first, *rest = [escaped(sentence) for sentence in findings.sentences if sentence]
    parts = [" ".join([f"**{first}**", *rest])]
    if findings.arms:
        reference = f"Against {findings.reference_title(study)}, ε = {study.confirm.epsilon:g}"
        name = findings.arms[0].metric_name.capitalize()
        heads = ["Arm", "Test loss", "95 % interval", name, reference, "Trainable parameters"]
        rows = [_row(study, r) for r in findings.arms[:MOST_ARMS]]
        # MLflow shows tables without any space between columns.
        lines = [f"| {' &emsp;| '.join(row)} |" for row in (heads, *rows)]
        parts.append("\n".join([lines[0], "| --- " * len(heads) + "|", *lines[1:]]))
    if len(findings.arms) > MOST_ARMS:
        parts.append(f"{len(findings.arms) - MOST_ARMS} more are in the report.")
    return "\n\n".join(parts)


def escaped(text: str) -> str:
    """Text that Markdown and its tables take as it stands."""
    for sign in "\\|*_<`[":
        text = text.replace(sign, "\\" + sign)
    return text


def _row(study: Study, result: ArmResult) -> list[str]:
    decimals = loss_decimals(study.confirm.epsilon)
    return [
        escaped(arm_title(result.arm, study.list_arms())),
        number(result.loss_mean, decimals),
        span(result.loss_low, result.loss_high, decimals) or "–",
        metric(result.metric_name, result.metric_mean),
        result.verdict or "–",
        count(result.trainable_params),
    ]
