"""Similarity of two texts in any script: the words that ROUGE-L compares, and chrF.

chrF: Popović, "chrF: character n-gram F-score for automatic MT evaluation", 2015; here chrF2, with n up to 6, β = 2 and without
white space.
"""

from __future__ import annotations

from collections import Counter
from unicodedata import category, normalize

_ORDER, _BETA2 = 6, 4.0

# Scripts without spaces between words: Thai, Lao, Burmese, Khmer, kana, and Chinese characters.
_UNSPACED = (
    (0x0E00, 0x0EFF), (0x1000, 0x109F), (0x1780, 0x17FF), (0x3040, 0x30FF), (0x31F0, 0x31FF), (0x3400, 0x4DBF), (0x4E00, 0x9FFF),
    (0xF900, 0xFAFF), (0x20000, 0x3FFFF),
)  # fmt: skip


def words(text: str) -> list[str]:
    """Runs of letters and digits in lower case, combining marks with their letter; single letters in scripts without spaces.

    A text without letters and digits gives its other characters one by one, so that equal texts compare as equal. For ASCII the
    result is ROUGE's words.
    """
    found: list[str] = []
    open = False  # whether the next letter continues the last word
    for sign in normalize("NFKC", text).lower():
        kind = category(sign)
        if kind[0] in "LN":
            alone = _is_unspaced(sign)
            if open and not alone:
                found[-1] += sign
            else:
                found.append(sign)
            open = not alone
        elif kind[0] == "M" and found:
            found[-1] += sign
        elif kind != "Cf":  # joiners and direction marks do not end a word
            open = False
    return found or [sign for sign in text if not sign.isspace()]


def chrf(given: str, reference: str) -> float:
    """F2 of character n-grams, from 0 to 1. Orders longer than one of the two texts are left out."""
    one, other = ("".join(text.split()) for text in (given, reference))
    precisions, recalls = [], []
    for n in range(1, min(_ORDER, len(one), len(other)) + 1):
        ours, theirs = (Counter(text[i : i + n] for i in range(len(text) - n + 1)) for text in (one, other))
        shared = (ours & theirs).total()
        precisions.append(shared / ours.total())
        recalls.append(shared / theirs.total())
    precision, recall = (sum(values) / max(len(values), 1) for values in (precisions, recalls))
    both = _BETA2 * precision + recall
    return (1 + _BETA2) * precision * recall / both if both else 0.0


def _is_unspaced(sign: str) -> bool:
    return any(first <= ord(sign) <= last for first, last in _UNSPACED)
