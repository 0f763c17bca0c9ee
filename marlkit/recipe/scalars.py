"""The words of a recipe as values: numbers, true and false, null and text, as in YAML 1.1 with OmegaConf's ``1e-4``.

YAML 1.1 reads ``010`` as 8 and ``1:30`` as 90. Numbers that a human reads as others are refused, and so is what no option holds.
"""

from __future__ import annotations

import re
from typing import Any

import yaml
from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException

TAG = "tag:yaml.org,2002:"
AMBIGUOUS = TAG + "ambiguous"
MERGE = TAG + "merge"
LONGEST_INTERPOLATION = 1000
"""Characters of a text with interpolations; OmegaConf's parser is slow."""

_DIGITS = r"[0-9]+(?:_[0-9]+)*"
_INT = r"[-+]?(?:0|[1-9][0-9]*(?:_[0-9]+)*|0x[0-9a-fA-F]+(?:_[0-9a-fA-F]+)*|0b[01]+(?:_[01]+)*)"
_FLOAT = rf"[-+]?(?:{_DIGITS}(?:\.(?:{_DIGITS})?)?|\.{_DIGITS})(?:[eE][-+]?[0-9]+)?|[-+]?\.(?:inf|Inf|INF)|\.(?:nan|NaN|NAN)"
_LEADING_ZERO = r"[-+]?0[0-9_]+"
_SIXTIES = r"[-+]?[0-9][0-9_]*(?::[0-5]?[0-9])+(?:\.[0-9_]*)?"
_OTHER = r"[-+]?(?:0o[0-7_]+|0[xX][0-9a-fA-F_]+|0[bB][01_]+|[0-9][0-9_]*(?:\.[0-9_]*)?|\.[0-9_]*[0-9][0-9_]*)"
_BOOLS = {word: value for value, words in ((True, "yes true on"), (False, "no false off")) for word in words.split()}
NOT_A_NUMBER = ("must be finite, got nan.", "Write `null` for none.")


class Loader(yaml.SafeLoader):
    """A safe loader with the words of a recipe. The dumper resolves alike, so that text which looks like a value is quoted."""


Loader.yaml_implicit_resolvers = {}
for _tag, _pattern, _first in (
    ("merge", "<<", "<"),
    ("null", "~|null|Null|NULL|", ["~", "n", "N", ""]),
    ("bool", "|".join(form for word in _BOOLS for form in (word, word.title(), word.upper())), "yYnNtTfFoO"),
    ("int", _INT, "-+0123456789"),
    ("ambiguous", f"{_LEADING_ZERO}|{_SIXTIES}", "-+0123456789"),
    ("float", _FLOAT, "-+.0123456789"),
    ("ambiguous", _OTHER, "-+.0123456789"),
):
    Loader.add_implicit_resolver(TAG + _tag, re.compile(rf"(?:{_pattern})\Z"), list(_first))


def scalar_node(text: str, at: yaml.Node | None = None) -> yaml.ScalarNode:
    """A node of text that is not quoted, in the place of another node."""
    tag = Loader("").resolve(yaml.ScalarNode, text, (True, False))
    return yaml.ScalarNode(tag, text, *((at.start_mark, at.end_mark) if at is not None else ()))


def value_of(node: yaml.ScalarNode) -> Any:
    """The value of a scalar.

    Raises:
        ValueError: it has none; its arguments are why, and what to write instead.
    """
    kind, text = node.tag.removeprefix(TAG), str(node.value)
    if kind == "ambiguous":
        raise ValueError(*_ambiguous(text))
    if kind == "null" and text.lower() in ("", "~", "null"):
        return None
    if kind == "bool" and text.lower() in _BOOLS:
        return _BOOLS[text.lower()]
    if kind == "int" and re.fullmatch(_INT, text):
        return _whole_number(text)
    if kind == "float" and re.fullmatch(f"{_FLOAT}|{_INT}", text):
        return _number(text)
    if kind in ("str", "merge"):
        _refuse_unfit(text)
        return text
    words = {"null": "null", "bool": "true or false", "int": "a whole number", "float": "a number"}.get(kind)
    if words:
        raise ValueError(f"`!!{kind} {shown(text)}` is not {words}.", "Write the value without a tag.")
    raise ValueError(*unknown_tag(node))


def unknown_tag(node: yaml.Node) -> tuple[str, str]:
    """What is wrong with the tag of a node, and the remedy."""
    return f"has the tag `{shown(str(node.tag).replace(TAG, '!!'))}`, which no recipe needs.", "Write the value without it."


def shown(text: str, length: int = 60) -> str:
    """Text for a message: cut where it is long, escaped where it cannot be seen."""
    cut = text if len(text) <= length else f"{text[:length]}…"
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in cut)


def _whole_number(text: str) -> int:
    if len(text) > 80:
        raise ValueError(f"is a number of {len(text)} digits.", "A whole number has at most 64 bits.")
    found = int(text.replace("_", ""), 0)
    if problem := too_large(found):
        raise ValueError(problem, "It may have at most 64.")
    return found


def too_large(number: int) -> str | None:
    """Why a whole number cannot be an option, or ``None``."""
    if -(2**63) <= number < 2**63:
        return None
    return f"is a whole number of {number.bit_length()} bits."


def _number(text: str) -> float:
    plain = text.lower().replace("_", "")
    if plain == ".nan":
        raise ValueError(*NOT_A_NUMBER)
    if plain.endswith(".inf"):
        return float(plain.replace(".", ""))
    found = float(int(plain, 0)) if re.fullmatch(r"[-+]?0[xb].*", plain) else float(plain)
    if found in (float("inf"), float("-inf")):
        message = f"`{shown(text)}` is larger than any number of 64 bits."
        raise ValueError(message, f"Write `{'-' if found < 0 else ''}.inf` for infinity.")
    return found


def _ambiguous(text: str) -> tuple[str, str]:
    """What a number such as ``010`` may be taken for, and how to write either."""
    quoted = f'`"{shown(text)}"` for the word'
    if ":" in text:
        return f"`{shown(text)}` may be a number to the base of 60.", f"Write {quoted}, or the number in decimals."
    decimal = re.sub(r"^([-+]?)0+(?=[0-9])", r"\1", text.replace("_", ""))
    number = f"`{shown(decimal)}` for the number" if re.fullmatch(_INT, decimal) else "the number in decimals"
    return f"`{shown(text)}` may be read as more than one number.", f"Write {number}, or {quoted}."


def refuse_unfit(value: Any) -> None:
    """Check a value that an interpolation gave, which no scalar of a file may be otherwise.

    Raises:
        ValueError: a recipe cannot hold it; the arguments are why, and a remedy.
    """
    if isinstance(value, str):
        _refuse_unfit(value)
    elif not isinstance(value, (int, float, type(None))):
        raise ValueError(f"is a {type(value).__name__}, which a recipe cannot hold.", "")
    elif isinstance(value, int) and (problem := too_large(value)):
        raise ValueError(problem, "It may have at most 64.")
    elif value != value:
        raise ValueError(*NOT_A_NUMBER)


_UNFIT = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\ud800-\udfff\ufeff]")


def _refuse_unfit(text: str) -> None:
    found = _UNFIT.search(text)
    if found:
        raise ValueError(f"holds the control character U+{ord(found[0]):04X}.", "Remove it.")
    if "${" in text:
        _refuse_bad_interpolation(text)


def _refuse_bad_interpolation(text: str) -> None:
    escape = r"Write `${section.option}`, or `\${` for the characters themselves."
    if len(text) > LONGEST_INTERPOLATION:
        message = f"is a text of {len(text)} characters with `${{`; at most {LONGEST_INTERPOLATION} are looked through."
        raise ValueError(message, escape)
    try:
        OmegaConf.create({"text": text})
    except (OmegaConfBaseException, RecursionError) as error:
        message = f"holds an interpolation that cannot be read: {str(error).splitlines()[0]}."
        raise ValueError(message, escape) from error
