"""Figures that others published, which a study's own are set beside in its report."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field, model_validator

from sweep.study.values import Count, Positive

Value = Annotated[float, Field(allow_inf_nan=False)]


class Published(BaseModel):
    """What one source reports: a value for each rank or alpha ratio, a best rate's multiple, or a statement."""

    model_config = ConfigDict(strict=True, extra="forbid", frozen=True)

    source: str = Field(min_length=1)  # paper and table; model, data and measure
    says: str = ""  # in a sentence
    rank: Annotated[dict[Count, Value], Field(min_length=2)] | None = None
    alpha_ratio: Annotated[dict[Positive, Value], Field(min_length=2)] | None = None
    better: Literal["lower", "higher"] = "lower"  # which of the values is the better one
    best_rate_over_full: Positive | None = None  # LoRA's best learning rate over that of full fine-tuning

    @model_validator(mode="after")
    def _says_something(self) -> Published:
        if not (self.says or self.rank or self.alpha_ratio or self.best_rate_over_full):
            raise ValueError("says nothing: give rank, alpha_ratio, best_rate_over_full or says")
        return self
