"""Text from outside, made safe for a terminal."""


def visible(text: str) -> str:
    """Text of a model or of a data file, with control characters escaped."""
    return "".join(c if c.isprintable() or c in "\n\t" else ascii(c)[1:-1] for c in text)
