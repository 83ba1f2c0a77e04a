"""What an experiment has found so far, as the status shows it."""

from pydantic import BaseModel, Field

Interval = tuple[float, float] | None


class Rate(BaseModel):
    """The share of an arm's answers that were rewarded."""

    rate: float
    interval: Interval = Field(description="confidence interval; null while nothing is known")
    unknown: str | None = Field(description="why there is no interval yet; null where there is one")


class ArmSummary(BaseModel):
    """The users of one model of two."""

    users: int
    answers: int
    rewards: dict[str, int] = Field(description="answers with such an event, by its kind")
    click_through: Rate = Field(description="answers with a positive event")
    conversion: Rate = Field(description="answers with a purchase")


class Difference(BaseModel):
    """The challenger's rate less that of the live model."""

    value: float
    interval: Interval = Field(description="confidence interval; null while nothing is known")
    unknown: str | None = Field(description="why there is no interval yet; null where there is one")
    evidence: float = Field(description="of a difference; 1 / alpha decides")


class Comparison(BaseModel):
    """Two models side by side, each for its users."""

    arms: dict[str, ArmSummary] = Field(description="live and challenger")
    difference: dict[str, Difference] = Field(description="by reward")


class ShadowArmSummary(BaseModel):
    """How well one model's answers held what people chose."""

    found: float = Field(description="share of the choices that its answer held")
    mrr: float = Field(description="mean reciprocal rank of the choices")


class ShadowComparison(BaseModel):
    """A challenger that is asked and compared, and never shown."""

    compared: int = Field(description="answers of both models to the same question")
    overlap: float = Field(description="mean share of the live answer that the challenger's holds, too")
    choices: int = Field(description="reactions to answers that were compared")
    arms: dict[str, ShadowArmSummary] = Field(description="live and challenger")
