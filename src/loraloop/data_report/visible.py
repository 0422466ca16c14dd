"""Text of recordings made fit to be shown: it may hold anything that a terminal or a browser acts on instead of showing it."""

from __future__ import annotations

import unicodedata


def visible(text: str) -> str:
    """`text` with control characters, marks that turn the direction of writing and halves of characters as signs.

    Line ends and tabs stay. What is visible already is left as it is.
    """
    return text if text.isascii() and text.isprintable() else "".join(map(_sign, text))


def one_line(text: str) -> str:
    """`text` visible and in one line, for a name among others."""
    return visible(" ".join(text.split()))


def _sign(character: str) -> str:
    code = ord(character)
    if character in "\n\t" or (code < 0x7F and code >= 0x20):
        return character
    if code < 0x20:
        return chr(0x2400 + code)
    if unicodedata.category(character) in {"Cc", "Cf", "Cs", "Co", "Cn", "Zl", "Zp"} and character not in "\u200d\ufe0f":
        return f"⟨U+{code:04X}⟩"
    return character
