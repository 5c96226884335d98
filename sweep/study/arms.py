"""Arms: the settings of the scientific hyperparameters that a study compares."""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import product

FULL, PREFIX, LORA_PREFIX = "full", "prefix", "lora+prefix"
ALL_LINEAR = "all-linear"
RankPattern = tuple[
    tuple[str, int], ...
]  # (module name, its ending or a regular expression; rank), the first that fits
AlphaPattern = tuple[tuple[str, float], ...]  # the same with lora_alpha


@dataclass(frozen=True)
class Arm:
    """One setting of the scientific hyperparameters.

    For full fine-tuning `method` is "full", for prefix tuning alone "prefix"; there `r` and `alpha_ratio` are 0 and
    `target_modules` is empty.
    """

    name: str
    method: str
    r: int  # of the layers that no rank_pattern names
    alpha_ratio: float
    target_modules: tuple[str, ...]  # module-name endings, or ("all-linear",)
    rank_pattern: RankPattern = ()
    alpha_pattern: AlphaPattern = ()
    prefix_length: int = 0  # trained embeddings before the input

    @property
    def is_full(self) -> bool:
        return self.method == FULL

    @property
    def lora_alpha(self) -> float:
        return self.alpha_ratio * self.r

    @property
    def scaling(self) -> float:
        """The factor on B·A at the layers that no pattern names."""
        return self._scaling(self.lora_alpha, self.r) if self.r else 0.0

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
        parts = [f"rank {self.r}"] if self.r else []
        if self.rank_pattern:
            parts[0] += f" with {pattern_text(self.rank_pattern)}"
        return " and ".join([*parts, f"prefix {self.prefix_length}"] if self.prefix_length else parts)

    @property
    def cost_key(self) -> str:
        """Arms with one key cost the same: alpha is a factor and changes neither parameters, memory nor time."""
        if self.is_full:
            return FULL
        parts = [f"r{self.r}"] if self.r else []
        parts += [self.method, "+".join(self.target_modules), pattern_text(self.rank_pattern)]
        return "-".join(filter(None, [*parts, f"p{self.prefix_length}" if self.prefix_length else ""]))

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
    prefix_lengths: Sequence[int] = (),
) -> tuple[Arm, ...]:
    """Every combination, smallest rank first, and the lengths of method `prefix`, which has no rank, last.

    Names tell of method, modules, patterns and lengths where the study varies them; an empty pattern is not named.
    """
    arms, kinds = [], []
    for method in methods:
        kinds += [(method, p) for p in (sorted(prefix_lengths) if method == LORA_PREFIX else (0,)) if method != PREFIX]
    for r, modules, rank_pattern, alpha_pattern, (method, p), ratio in product(
        sorted(ranks), target_modules, rank_patterns, alpha_patterns, kinds, sorted(alpha_ratios)
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
        if len(prefix_lengths) > 1 and p:
            name += f"-p{p}"
        arms.append(Arm(name, method, r, float(ratio), modules, rank_pattern, alpha_pattern, p))
    for p in sorted(prefix_lengths) if PREFIX in methods else ():
        arms.append(Arm(f"{PREFIX}-p{p}" if len(prefix_lengths) > 1 else PREFIX, PREFIX, 0, 0.0, (), prefix_length=p))
    return tuple(arms)


def arms_of_ranks(arms: Sequence[Arm]) -> list[Arm]:
    """The arms that stand for their rank when ranks are compared: LoRA alone, of one rank throughout, where there are
    such arms.
    """
    lora = [arm for arm in arms if arm.r]
    alone = [arm for arm in lora if not arm.prefix_length] or lora
    return [arm for arm in alone if not arm.rank_pattern] or alone
