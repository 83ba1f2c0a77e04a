"""What the synthetic shop sells: named items of 20 categories and 8 styles."""

import numpy as np
import pyarrow as pa

STYLES = ("Classic", "Nordic", "Vintage", "Compact", "Eco", "Bold", "Premium", "Everyday")
# category: typical price, the two categories that go with it, its products
CATEGORIES = {
    "Tents": (190, ("Sleeping Bags", "Camp Kitchen"), "Dome Tent,Family Tent,Tarp,Hammock,Bivy,Awning,Beach Shelter"),
    "Sleeping Bags": (90, ("Tents", "Backpacks"), "Down Bag,Summer Bag,Quilt,Sleeping Mat,Air Pillow,Liner,Bag Duo"),
    "Camp Kitchen": (45, ("Tents", "Coffee"), "Gas Stove,Camp Pot,Mess Kit,Cool Box,Spork Set,Water Filter,Fire Bowl"),
    "Backpacks": (85, ("Hiking Shoes", "Sleeping Bags"), "Daypack,Trekking Pack,Roll Top,Duffel,Sling,Dry Bag,Tote"),
    "Hiking Shoes": (120, ("Backpacks", "Jackets"), "Trail Shoe,Boot,Sandal,Approach Shoe,Gaiters,Wool Socks,Insoles"),
    "Jackets": (150, ("Hiking Shoes", "Running"), "Rain Jacket,Parka,Fleece,Down Vest,Windbreaker,Softshell,Poncho"),
    "Running": (70, ("Fitness", "Headphones"), "Road Shoe,Running Tee,Shorts,Running Belt,Headlamp,Cap,Arm Sleeves"),
    "Fitness": (40, ("Running", "Tea"), "Yoga Mat,Kettlebell,Foam Roller,Jump Rope,Resistance Band,Dumbbell,Gym Towel"),
    "Cycling": (110, ("Jackets", "Backpacks"), "Helmet,Pannier,Bike Light,Saddle,Floor Pump,Lock,Handlebar Bag"),
    "Coffee": (60, ("Tableware", "Tea"), "Grinder,Moka Pot,Pour-Over Set,French Press,Espresso Beans,Scale,Kettle"),
    "Tea": (25, ("Tableware", "Coffee"), "Green Tea,Black Tea,Teapot,Infuser,Matcha Set,Herbal Blend,Tea Caddy"),
    "Tableware": (30, ("Cookware", "Tea"), "Mug,Dinner Plate,Bowl,Carafe,Cutlery Set,Serving Board,Tumbler"),
    "Cookware": (75, ("Kitchen Tools", "Tableware"), "Skillet,Saucepan,Dutch Oven,Wok,Roasting Tin,Casserole,Griddle"),
    "Kitchen Tools": (28, ("Cookware", "Tableware"), "Chef Knife,Peeler,Whisk,Cutting Board,Grater,Mortar,Colander"),
    "Desks": (240, ("Lamps", "Keyboards"), "Standing Desk,Writing Desk,Office Chair,Stool,Monitor Arm,Footrest,Mat"),
    "Lamps": (65, ("Desks", "Shelves"), "Desk Lamp,Floor Lamp,Pendant,Reading Light,Lantern,Light Strip,Bedside Lamp"),
    "Shelves": (80, ("Lamps", "Plants"), "Bookcase,Wall Shelf,Storage Box,Coat Rack,Cube Shelf,Bookend,Wire Basket"),
    "Plants": (24, ("Shelves", "Lamps"), "Monstera,Fern,Cactus,Plant Pot,Watering Can,Hanging Planter,Plant Stand"),
    "Keyboards": (70, ("Headphones", "Desks"), "Keyboard,Mouse,Trackball,Wrist Rest,Keycap Set,Number Pad,USB Hub"),
    "Headphones": (110, ("Keyboards", "Running"), "Earbuds,Headset,Over-Ears,Sport Buds,Amplifier,Ear Pads,Stand"),
}
SAME_STYLE = 4.0  # times as likely as another one to go with an item


class Assortment:
    """The items; their rows are numbered from 0.

    `category`, `style` int and `popularity` float have one number an item (items,), `members` the rows of each
    category; `table` has what a customer sees.
    """

    def __init__(self, count: int, random: np.random.Generator):
        names = list(CATEGORIES)
        self.category = np.arange(count) % len(names)
        self.members = [np.flatnonzero(self.category == category) for category in range(len(names))]
        self._complements = [[names.index(other) for other in CATEGORIES[name][1]] for name in names]
        self.style, titles = self._name_items(count)
        price = self._draw_prices(random)
        self.popularity = 1.0 / (random.permutation(count) + 10.0)
        self.item_ids = [f"item-{row:04d}" for row in range(count)]
        self.row_of = {item_id: row for row, item_id in enumerate(self.item_ids)}
        self.table = pa.table(
            {
                "item_id": self.item_ids,
                "title": titles,
                "category": [names[category] for category in self.category],
                "price": pa.array(price, pa.float64()),
            }
        )

    def __len__(self) -> int:
        return len(self.item_ids)

    def draw_partner(self, row: int, random: np.random.Generator, similar: bool = False) -> int:
        """Draw an item that goes with another one: from a complementary category, or a similar one from its own."""
        category = int(self.category[row])
        categories = [category] if similar else self._complements[category]
        members = self.members[categories[int(random.integers(len(categories)))]]
        weights = self.popularity[members] * np.where(self.style[members] == self.style[row], SAME_STYLE, 1.0)
        return int(members[draw(weights * (members != row), random)])

    def _name_items(self, count: int) -> tuple[np.ndarray, list[str]]:
        """Return the style and the title of each item; no two titles are the same."""
        styles, titles = np.zeros(count, dtype=np.int64), [""] * count
        for name, members in zip(CATEGORIES, self.members, strict=True):
            products = CATEGORIES[name][2].split(",")
            for place, row in enumerate(members):
                series, kind = divmod(place, len(STYLES) * len(products))
                styles[row] = kind % len(STYLES)
                titles[row] = f"{STYLES[styles[row]]} {products[kind // len(STYLES)]}"
                if series:
                    titles[row] += f" Mk {series + 1}"
        return styles, titles

    def _draw_prices(self, random: np.random.Generator) -> np.ndarray:
        typical = np.array([price for price, _, _ in CATEGORIES.values()])[self.category]
        dearer = np.where(self.style == STYLES.index("Premium"), 1.6, 1.0)
        return np.floor(typical * dearer * np.exp(random.normal(0, 0.35, len(typical)))) + 0.99


def draw(weights: np.ndarray, random: np.random.Generator) -> int:
    """Draw a place with a probability in proportion to its weight."""
    cumulative = weights.cumsum()
    return int(cumulative.searchsorted(random.random() * cumulative[-1], side="right"))
