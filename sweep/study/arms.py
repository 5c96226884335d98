"""Arms: the settings of the scientific hyperparameters that a study compares."""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import product

FULL = "full"
ALL_LINEAR = "all-linear"
RankPattern = tuple[
    tuple[str, int], ...
]  # (module name, its ending or a regular expression; rank), the first that fits
AlphaPattern = tuple[tuple[str, float], ...]  # the same with lora_alpha


@dataclass(frozen=True)
class Arm:
    """One setting of the scientific hyperparameters.

    For full fine-tuning `method` is "full", `r` and `alpha_ratio` are 0 and `target_modules` is empty.
    """

    name: str
    method: str
    r: int  # of the layers that no rank_pattern names
    alpha_ratio: float
    target_modules: tuple[str, ...]  # module-name endings, or ("all-linear",)
    rank_pattern: RankPattern = ()
    alpha_pattern: AlphaPattern = ()

    @property
    def is_full(self) -> bool:
        return self.method == FULL

    @property
    def lora_alpha(self) -> float:
        return self.alpha_ratio * self.r

    @property
    def scaling(self) -> float:
        """The factor on B·A at the layers that no pattern names."""
        return 0.0 if self.is_full else self._scaling(self.lora_alpha, self.r)

    def rank_at(self, module: str) -> int:
        """The rank at a layer, by its full name."""
        key = pattern_key(self.rank_pattern, module)
        return self.r if key is None else dict(self.rank_pattern)[key]

    def scaling_at(self, module: str) -> float:
        """The factor on B·A at a layer. As in PEFT, a rank of its own leaves the layer the arm's lora_alpha."""
        key = pattern_key(self.alpha_pattern, module)
        alpha = self.lora_alpha if key is None else dict(self.alpha_pattern)[key]
        return self._scaling(alpha, self.rank_at(module))

    @property
    def group(self) -> str:
        """Arms of one group are alike enough to be pruned against one another; one of them goes to the confirm phase.

        Trials of different ranks are not: see the fairness rules in `sweep.driver.pruning`.
        """
        if self.is_full:
            return "full fine-tuning"
        return f"rank {self.r}" + (f" with {pattern_text(self.rank_pattern)}" if self.rank_pattern else "")

    @property
    def cost_key(self) -> str:
        """Arms with one key cost the same: alpha is a factor and changes neither parameters, memory nor time."""
        if self.is_full:
            return FULL
        key = f"r{self.r}-{self.method}-{'+'.join(self.target_modules)}"
        return key + (f"-{pattern_text(self.rank_pattern)}" if self.rank_pattern else "")

    def _scaling(self, alpha: float, r: int) -> float:
        """alpha / r (LoRA, arXiv 2106.09685 §4.1) or alpha / sqrt(r) (rsLoRA, arXiv 2312.03732)."""
        return alpha / (math.sqrt(r) if self.method == "rslora" else r)


def pattern_key(pattern: RankPattern | AlphaPattern, module: str) -> str | None:
    """The key of a pattern that a module falls under, by PEFT's rule (`get_pattern_key`); None where none fits.

    The first that is the module's whole name or its ending after a dot, read as a regular expression.
    """
    return next((key for key, _ in pattern if re.match(rf"(.*\.)?({key})$", module)), None)


def pattern_text(pattern: RankPattern | AlphaPattern) -> str:
    return "+".join(f"{key}={value:g}" for key, value in pattern)


def full_arm() -> Arm:
    return Arm(name=FULL, method=FULL, r=0, alpha_ratio=0.0, target_modules=())


def lora_arms(
    ranks: list[int],
    alpha_ratios: list[float],
    methods: list[str],
    target_modules: list[tuple[str, ...]],
    rank_patterns: Sequence[RankPattern] = ((),),
    alpha_patterns: Sequence[AlphaPattern] = ((),),
) -> tuple[Arm, ...]:
    """Every combination, smallest rank first. Names tell of method, modules and patterns where the study varies them;
    an empty pattern is not named.
    """
    arms = []
    for r, modules, rank_pattern, alpha_pattern, method, ratio in product(
        sorted(ranks), target_modules, rank_patterns, alpha_patterns, methods, sorted(alpha_ratios)
    ):
        name = f"r{r}-ratio{ratio:g}"
        if len(methods) > 1:
            name += f"-{method}"
        if len(target_modules) > 1:
            name += f"-{'+'.join(modules)}"
        if len(rank_patterns) > 1 and rank_pattern:
            name += f"-{pattern_text(rank_pattern)}"
        if len(alpha_patterns) > 1 and alpha_pattern:
            name += f"-alpha:{pattern_text(alpha_pattern)}"
        arms.append(Arm(name, method, r, float(ratio), modules, rank_pattern, alpha_pattern))
    return tuple(arms)


def arms_of_ranks(arms: Sequence[Arm]) -> list[Arm]:
    """The arms that a rank stands for when ranks are compared: those of one rank throughout, where there are any."""
    lora = [arm for arm in arms if not arm.is_full]
    return [arm for arm in lora if not arm.rank_pattern] or lora
