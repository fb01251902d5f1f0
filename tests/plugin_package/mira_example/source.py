"""A data source: sums, in the words of each client."""

from dataclasses import dataclass

from mira import Client, Example

_WORDS = {"plus": "{} plus {}", "and": "{} and {}", "sign": "{}+{}", "list": "add {}, {}"}


@dataclass(frozen=True)
class Sums:
    """Clients that add numbers, each in words of its own."""

    source: str = "sums"
    examples: int = 12
    """Examples of each client."""

    def load(self, seed: int) -> list[Client]:
        return [Client(name, self._examples(words, seed), description="Add.") for name, words in _WORDS.items()]

    def _examples(self, words: str, seed: int) -> tuple[Example, ...]:
        pairs = [(seed % 7 + n, n + 1) for n in range(self.examples)]
        return tuple(Example("Add.", words.format(a, b), str(a + b)) for a, b in pairs)
