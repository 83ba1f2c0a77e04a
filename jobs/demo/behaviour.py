"""How the visitors of the synthetic shop behave, and how fast its trends and pairs change."""

from dataclasses import dataclass, replace


@dataclass(frozen=True)
class Behaviour:
    """The numbers of the simulation; probabilities unless a unit is named."""

    session_events: float = 6.0  # mean length of a session
    visitors_inside: int = 24  # how many sessions go on at the same time
    follow_pair: float = 0.65  # of the new items that are not on trend
    partner_weights: tuple[float, ...] = (0.5, 0.3, 0.2)
    choose_trend: float = 0.2
    cart_after_view: float = 0.10
    purchase_after_cart: float = 0.45
    dislike: float = 0.04  # of the items met while browsing
    category_spread: float = 1.5  # standard deviation of the liking for a category
    style_spread: float = 1.0
    drift: float = 0.03  # the part of a taste that is renewed in a day
    change_hours: int = 12  # simulated hours between new trends, and between shifts
    trend_items: int = 4
    trend_half_life_hours: float = 24.0
    shifts: int = 1  # popular items with a new best partner at each change
    live_shifts: int = 30  # what it is after the history, as the three below
    live_choose_trend: float = 0.4
    live_trend_items: int = 2
    live_trend_half_life_hours: float = 12.0
    click_ease: float = -3.5  # log odds of a click on an item of neutral appeal that is looked at
    leave_after_items: int = 120  # a visitor who has met so many items leaves; a newcomer takes the place

    def live(self) -> "Behaviour":
        """Return how they behave after the history."""
        return replace(
            self,
            shifts=self.live_shifts,
            choose_trend=self.live_choose_trend,
            trend_items=self.live_trend_items,
            trend_half_life_hours=self.live_trend_half_life_hours,
        )
