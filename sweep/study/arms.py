"""Arms: the settings of the scientific hyperparameters that a study compares."""

from __future__ import annotations

import math
from dataclasses import dataclass

FULL = "full"
ALL_LINEAR = "all-linear"


@dataclass(frozen=True)
class Arm:
    """One setting of the scientific hyperparameters.

    For full fine-tuning `method` is "full", `r` and `alpha_ratio` are 0 and `target_modules` is empty.
    """

    name: str
    method: str
    r: int
    alpha_ratio: float
    target_modules: tuple[str, ...]  # module-name endings, or ("all-linear",)

    @property
    def is_full(self) -> bool:
        return self.method == FULL

    @property
    def lora_alpha(self) -> float:
        return self.alpha_ratio * self.r

    @property
    def scaling(self) -> float:
        """The factor on B·A: alpha / r (LoRA, arXiv 2106.09685 §4.1) or alpha / sqrt(r) (rsLoRA, arXiv 2312.03732)."""
        if self.is_full:
            return 0.0
        return self.lora_alpha / (math.sqrt(self.r) if self.method == "rslora" else self.r)

    @property
    def cost_key(self) -> str:
        """Arms with one key cost the same: alpha is a factor and changes neither parameters, memory nor time."""
        return FULL if self.is_full else f"r{self.r}-{self.method}-{'+'.join(self.target_modules)}"


def full_arm() -> Arm:
    return Arm(name=FULL, method=FULL, r=0, alpha_ratio=0.0, target_modules=())


def lora_arms(
    ranks: list[int], alpha_ratios: list[float], methods: list[str], target_modules: list[tuple[str, ...]]
) -> tuple[Arm, ...]:
    """Every combination, smallest rank first. Names say method and modules only where the study varies them."""
    arms = []
    for r in sorted(ranks):
        for modules in target_modules:
            for method in methods:
                for ratio in sorted(alpha_ratios):
                    name = f"r{r}-ratio{ratio:g}"
                    if len(methods) > 1:
                        name += f"-{method}"
                    if len(target_modules) > 1:
                        name += f"-{'+'.join(modules)}"
                    arms.append(Arm(name, method, r, float(ratio), modules))
    return tuple(arms)
