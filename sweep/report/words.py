"""Numbers and arms as a reader wants them: units, signs, and no more digits than are known."""

from __future__ import annotations

import math
import re
from collections.abc import Sequence

from sweep.study.arms import Arm, pattern_text
from sweep.study.credentials import without_credentials

MINUS = "\N{MINUS SIGN}"
NOTHING = "–"
# An absolute path: two or more parts, not within a URL, a `package:` address or a word.
LOCAL_PATH = re.compile(r"(?<![\w:/.…~])~?(?:/[\w.+@~-]+)+/([\w.+@~-]+)/?")


MOST_NAMED = 12
BITS = {"4bit": "4 bits (NF4, double quantisation)", "8bit": "8 bits"}


def loss_decimals(epsilon: float) -> int:
    """Enough decimals to tell a tenth of ε, and at least three."""
    return max(3, math.ceil(-math.log10(epsilon)) + 1)


def number(value: float | None, decimals: int) -> str:
    if value is None or math.isnan(value):
        return NOTHING
    return f"{value:.{decimals}f}".replace("-", MINUS)


def signed(value: float | None, decimals: int) -> str:
    if value is None or math.isnan(value):
        return NOTHING
    text = f"{value:+.{decimals}f}"
    return text[1:] if float(text) == 0 else text.replace("-", MINUS)


def span(low: float | None, high: float | None, decimals: int, plus: bool = False) -> str:
    """An interval's two ends, "0.21 to 0.25"; empty without one."""
    if low is None or high is None:
        return ""
    write = signed if plus else number
    return f"{write(low, decimals)} to {write(high, decimals)}"


def metric(name: str, value: float | None) -> str:
    """Accuracy in per cent, perplexity as it is."""
    if value is None or math.isnan(value):
        return NOTHING
    return f"{100 * value:.1f} %" if name == "accuracy" else f"{value:.2f}"


def metric_span(name: str, low: float | None, high: float | None) -> str:
    if low is None or high is None:
        return ""
    return f"{metric(name, low)} to {metric(name, high)}"


def rate(value: float) -> str:
    return f"{value:.4g}"


def count(value: float | None) -> str:
    """Three digits and k, M or B."""
    if value is None:
        return NOTHING
    for limit, unit in ((1e9, " B"), (1e6, " M"), (1e3, " k")):
        if value >= limit:
            return _three(value / limit) + unit
    return f"{value:.0f}"


def size(value: float | None) -> str:
    """Bytes in binary units."""
    if value is None:
        return NOTHING
    for limit, unit in ((2**30, "GiB"), (2**20, "MiB"), (2**10, "KiB")):
        if value >= limit:
            return f"{_three(value / limit)} {unit}"
    return f"{value:.0f} B"


def duration(seconds: float | None) -> str:
    if seconds is None:
        return NOTHING
    if seconds < 1:
        return f"{_three(1000 * seconds)} ms"
    if seconds < 120:
        return f"{_three(seconds)} s"
    if seconds < 7200:
        return f"{_three(seconds / 60)} min"
    return f"{_three(seconds / 3600)} h"


def share(ours: float, theirs: float) -> str:
    """Ours as a percentage of theirs."""
    percent = 100 * ours / theirs
    return f"{percent:.0f} %" if percent >= 10 else f"{percent:#.2g} %"


def join(parts: list[str]) -> str:
    """ "a, b and c"; of more than a sentence bears, the first and how many more there are."""
    if len(parts) > MOST_NAMED:
        return some(parts)
    return parts[0] if len(parts) == 1 else f"{', '.join(parts[:-1])} and {parts[-1]}"


def some(parts: Sequence[str], separator: str = ", ") -> str:
    """ "a, b, c"; of more than a sentence bears, the first and how many more there are."""
    left_out = len(parts) - MOST_NAMED
    return separator.join(parts) if left_out <= 0 else f"{separator.join(parts[:MOST_NAMED])} and {left_out} more"


def plural(n: int, word: str) -> str:
    return f"{n} {word}" if n == 1 else f"{n} {word}s"


def arm_title(arm: Arm, arms: Sequence[Arm]) -> str:
    """ "rank 4, alpha ratio 2", "prefix 4", "full fine-tuning"; more where it takes more to tell it from the others."""
    return f"rank {arm.r}, {apart(arm, arms)}" if arm.r else arm.group


def apart(arm: Arm, arms: Sequence[Arm]) -> str:
    """What tells a LoRA arm from the others of its rank: its alpha ratio, and what else the study varies."""
    return ", ".join([f"alpha ratio {arm.alpha_ratio:g}", *_varied(arm, arms)])


def cost_title(arm: Arm, arms: Sequence[Arm]) -> str:
    """The arms that cost the same, whatever their alpha."""
    if not arm.r:
        return arm.group
    parts = [part for part in _varied(arm, arms) if not part.startswith("alpha_pattern")]
    return ", ".join([f"rank {arm.r}", *parts])


def without_paths(text: str) -> str:
    """The text with absolute paths of this machine cut to their last part, and without anybody's credentials."""
    return LOCAL_PATH.sub(r"…/\1", without_credentials(text))


def _varied(arm: Arm, arms: Sequence[Arm]) -> list[str]:
    lora = [a for a in arms if a.r]
    parts = [arm.method] if arm.method != "lora" or len({a.method for a in lora}) > 1 else []
    if arm.prefix_length:
        parts = [f"with prefix {arm.prefix_length}"]
    if len({a.target_modules for a in lora}) > 1:
        parts.append("+".join(arm.target_modules))
    for name in ("rank_pattern", "alpha_pattern"):
        pattern = getattr(arm, name)
        if pattern and len({getattr(a, name) for a in lora}) > 1:
            parts.append(f"{name} {pattern_text(pattern)}")
    return parts


def _three(value: float) -> str:
    """Three significant digits, without an exponent."""
    return f"{value:.{max(0, 2 - math.floor(math.log10(value)))}f}" if value >= 0.01 else f"{value:.3g}"
