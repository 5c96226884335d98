"""What a study found, as plain records."""

from __future__ import annotations

from dataclasses import dataclass

from sweep.report.intervals import Interval
from sweep.report.power import Power
from sweep.report.search import Edge, SearchRow
from sweep.report.words import arm_title
from sweep.study.arms import Arm
from sweep.study.records import Cost
from sweep.study.schema import Study


@dataclass(frozen=True)
class ArmResult:
    """A finalist's confirm trials. Losses are test losses at the last step; differences are paired by seed."""

    arm: Arm
    learning_rate: float
    seeds: tuple[int, ...]  # those that completed
    test_losses: tuple[float, ...]  # by seed
    metric_name: str  # accuracy or perplexity
    metrics: tuple[float, ...]  # by seed
    loss_mean: float  # NaN when no seed completed
    loss_low: float | None  # 95 % t-interval; None under two seeds
    loss_high: float | None
    metric_mean: float
    metric_low: float | None
    metric_high: float | None
    to_full: Interval | None  # arm − full fine-tuning; None without a common seed, and for full itself
    to_reference: Interval | None  # arm − reference; None without a common seed, and for the reference itself
    verdict: str | None  # non-inferior, inferior, inconclusive, reference; None for full, or without a reference
    in_sequence: bool  # tested in the fixed sequence, or the reference that heads it
    note: str  # why the verdict is what it is, where that is not plain
    full_verdict: str | None  # the same against full fine-tuning; None for full itself, or without it
    full_note: str
    diverged_seeds: tuple[int, ...]  # left out of the means
    failed_seeds: tuple[int, ...]  # left out of the means
    infeasible_seeds: tuple[int, ...]  # found no memory, and no failures; left out of the means
    trainable_params: int | None
    cost: Cost | None
    forgetting: Interval | None = None  # rise of the loss on source text at the last step; None where not measured


@dataclass(frozen=True)
class Findings:
    arms: tuple[ArmResult, ...]  # smallest rank first, full fine-tuning last
    search: tuple[SearchRow, ...]  # one an arm; search scores choose and are not results
    edges: tuple[Edge, ...]  # best learning rates on the edge of what was tried
    reference: str | None  # the arm that the others are held against, once it has a confirmed loss
    chance_loss: float | None  # of always answering by the training labels' frequencies; None where it is not known
    chance_accuracy: float | None
    unlearned: str | None  # the arm that is not shown to be better than that, for which nothing is recommended
    recommended: str | None  # arm name
    recommended_trial: int | None  # its confirm trial with the lowest validation loss
    power: Power | None  # what so many seeds could show against the reference; None where no two pairs are there
    power_to_full: Power | None  # and against full fine-tuning
    sentences: tuple[str, ...]  # the recommendation: what to use, what that saves and loses, what is not known
    warnings: tuple[str, ...]
    finished: bool
    ended: int  # trials that ended, of
    planned: int  # trials in all

    def reference_title(self, study: Study) -> str:
        """ "rank 64", or the whole name of the arm where several of that rank were confirmed."""
        reference = self.result(self.reference)
        if reference is None or sum(r.arm.r == reference.arm.r for r in self.arms) == 1:
            return f"rank {study.confirm.reference}"
        return arm_title(reference.arm, study.list_arms())

    def result(self, arm: str | None) -> ArmResult | None:
        return next((r for r in self.arms if r.arm.name == arm), None)
