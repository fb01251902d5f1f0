"""The primitives of charts. All text is escaped: no string is ever pasted into markup."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import pairwise
from math import ceil, floor, log10
from unicodedata import east_asian_width

from markupsafe import Markup

from mira.core.escape import visible

# Nine colours of cividis (Nuñez, Anderton and Renslow 2018), designed for all kinds of colour vision.
_CIVIDIS = (
    (0, 34, 78), (26, 56, 111), (66, 78, 108), (95, 101, 110), (125, 124, 120), (157, 149, 119), (190, 175, 109),
    (223, 204, 89), (254, 232, 56),
)  # fmt: skip


def tag(name: str, *children: object, **attributes: object) -> Markup:
    """An element; ``_`` in an attribute name stands for ``-``, a trailing one is dropped (``class_``)."""
    given = Markup("").join(
        Markup(' {}="{}"').format(key.rstrip("_").replace("_", "-"), text(value))
        for key, value in attributes.items()
        if value is not None
    )
    return Markup("<{0}{1}>{2}</{0}>").format(name, given, Markup("").join(text(child) for child in children))


def text(value: object) -> str | Markup:
    """``value`` as text: floats with two decimals, control characters escaped."""
    if isinstance(value, Markup):
        return value
    return f"{value:.2f}".rstrip("0").rstrip(".") if isinstance(value, float) else visible(str(value))


def fit(words: str, width: float, size: float = 13) -> str:
    """``words``, truncated to ``width`` px at a font size of ``size`` px."""
    words = " ".join(visible(words).split())
    if extent(words, size) <= width:
        return words
    while words and extent(words + "…", size) > width:
        words = words[:-1]
    return words.rstrip() + "…"


def extent(words: str, size: float = 13) -> float:
    """Approximate width of ``words`` in px, for a wide typeface: the reader's is unknown."""
    return size * sum(_em(character) for character in words)


def _em(character: str) -> float:
    if east_asian_width(character) in "WF" or character in "mwMW@%—":
        return 1.0
    if character in "iIjl.,:;!|'’()[] ":
        return 0.42
    return 0.78 if character.isupper() or character in "<>=+×→" or ord(character) > 0x2FF else 0.64


def chart(width: float, height: float, label: str, *children: object) -> Markup:
    """A drawing of its own size in px; ``label`` is its description for screen readers."""
    return tag(
        "svg", *children, viewBox=f"0 0 {width:g} {height:g}", width=width, height=height, role="img", aria_label=label
    )


def cividis(share: float) -> str:
    """The colour at ``share``, from dark blue at 0 to yellow at 1."""
    place = min(max(share, 0.0), 1.0) * (len(_CIVIDIS) - 1)
    low = min(int(place), len(_CIVIDIS) - 2)
    mixed = (a + (b - a) * (place - low) for a, b in zip(_CIVIDIS[low], _CIVIDIS[low + 1], strict=True))
    return "#" + "".join(f"{round(part):02x}" for part in mixed)


@dataclass(frozen=True)
class Scale:
    """A map from the numbers ``low`` … ``high`` to the pixels ``begin`` … ``end``; values outside are put on the edge."""

    low: float
    high: float
    begin: float
    end: float
    log: bool = False

    def __call__(self, value: float) -> float:
        if self.log:
            share = log10(max(value, self.low) / self.low) / log10(self.high / self.low)
        else:
            share = (value - self.low) / (self.high - self.low)
        return self.begin + min(max(share, 0.0), 1.0) * (self.end - self.begin)

    def ticks(self, about: int = 5) -> list[float]:
        if self.log:
            powers = range(floor(log10(self.low)), ceil(log10(self.high)) + 1)
            for steps in ((1, 2, 5), (1,)):
                found = [
                    s * 10.0**p for p in powers for s in steps if self.low <= s * 10.0**p * 1.0001 <= self.high * 1.001
                ]
                if len(found) <= 1.6 * about:
                    break
            return found
        rough = (self.high - self.low) / about
        power = 10.0 ** floor(log10(rough))
        step = next(s * power for s in (1, 2, 2.5, 5, 10) if s * power >= rough * 0.9999)
        first = ceil(self.low / step - 1e-9)
        return [n * step for n in range(first, floor(self.high / step + 1e-9) + 1)]


def scale(values: Iterable[float], begin: float, end: float, zero: bool = True) -> Scale:
    """A scale for ``values``: logarithmic where positive values span more than a factor of 20, else linear, from 0 if
    ``zero``."""
    numbers = list(values) or [0.0, 1.0]
    low, high = min(numbers), max(numbers)
    if low > 0 and high > 20 * low:
        return Scale(low / 1.15, high * 1.1, begin, end, log=True)
    low = min(low, 0.0) if zero else low
    if not high > low:
        low, high = low - 0.5, high + 0.5
    return Scale(low, high + 0.04 * (high - low), begin, end)


def spread(places: Sequence[float], gap: float, low: float, high: float) -> list[float]:
    """``places`` moved apart as little as possible, to leave ``gap`` between neighbours, within low … high."""
    order = sorted(range(len(places)), key=places.__getitem__)
    moved = list(places)
    for before, here in pairwise(order):
        moved[here] = max(moved[here], moved[before] + gap)
    ceiling = high
    for here in reversed(order):
        moved[here] = max(min(moved[here], ceiling), low)
        ceiling = moved[here] - gap
    return moved


def axes(
    x: Scale, y: Scale, x_title: str, y_title: str, x_ticks: Sequence[float] | None = None, about: int = 5
) -> Markup:
    """Axes: hairlines at the ticks of y, numbers at the ticks of both, titles at the ends."""
    lines = [tag("line", x1=x.begin, x2=x.end, y1=y(t), y2=y(t), class_="grid") for t in y.ticks(about)]
    left = [tag("text", plain(t), x=x.begin - 8, y=y(t) + 4, class_="tick end") for t in y.ticks(about)]
    marks = x.ticks(6) if x_ticks is None else x_ticks
    below = [tag("text", plain(t), x=x(t), y=y.begin + 18, class_="tick middle") for t in marks]
    titles = [
        tag("text", x_title, x=x.end, y=y.begin + 36, class_="axis end"),
        tag("text", y_title, x=max(x.begin - 40, 4), y=y.end - 12, class_="axis"),
    ]
    return tag("g", *lines, *left, *below, *titles, aria_hidden="true")


def plain(value: float) -> str:
    return f"{value:.4g}" if abs(value) < 10_000 else f"{value:,.0f}"
