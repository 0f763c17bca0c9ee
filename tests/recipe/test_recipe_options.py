"""The valid values of options, and their descriptions."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Annotated, Any, Literal

import pytest

from marlkit.options import Discount, Hidden, PositiveFloat, PositiveInt, Range, Share, describe_type, problem_with


@pytest.mark.parametrize(
    ("value", "annotation"),
    [
        (1, int), (1, float), (1.5, float), (True, bool), ("x", str), (None, int | None), (0, Discount), (1, Discount),
        ([], Hidden), ([1, 2], Hidden), ("all", Share), ([[0, 1], [2]], Share), ({"a": [1]}, dict[str, Any]), ({}, dict),
        ({}, Mapping[str, int]), ([1], Sequence[int]), ((1, 2), list[int]), ([1, 2.5], tuple[int, float]),
        ([1, 2, 3], tuple[int, ...]), ([], tuple[int, ...]), (object(), Any), (2, Literal[1, 2]), (0.1, PositiveFloat | None),
    ],
)  # fmt: skip
def test_values_that_fit(value: Any, annotation: Any) -> None:
    assert problem_with(value, annotation) is None


@pytest.mark.parametrize(
    ("value", "annotation", "message"),
    [
        (1.0, int, "must be a whole number, got 1.0"),
        (True, int, "must be a whole number, got True"),
        (True, float, "must be a number, got True"),
        ("3", int, "must be a whole number, got '3'"),
        (1, str, "must be a word, got 1"),
        (1, bool, "must be true or false, got 1"),
        (0, PositiveInt, "must be at least 1, got 0"),
        (0.0, PositiveFloat, "must be above 0, got 0.0"),
        (1.0000001, Discount, "must be at most 1, got 1.0000001"),
        (3, Annotated[int, Range(below=3)], "must be below 3, got 3"),
        (float("inf"), PositiveFloat, "must be finite, got inf"),
        (0, PositiveInt | None, "must be at least 1, got 0"),
        ("x", PositiveInt | None, "must be a whole number of at least 1 or null, got 'x'"),
        ([64, 0], Hidden, "entry 1: must be at least 1, got 0"),
        ([[0], [-1]], Share, "entry 1: entry 0: must be at least 0, got -1"),
        ("al", Share, "must be all or none or a list of lists of whole numbers of at least 0, got 'al'"),
        (True, Literal[1, 2], "must be 1 or 2, got True"),
        ([1], tuple[int, float], "must be a list [a whole number, a number], got [1]"),
        ([1, "x"], tuple[int, float], "entry 1: must be a number, got 'x'"),
        ([1], dict[str, Any], "must be a mapping, got [1]"),
        ([1], Mapping[str, Any], "must be a mapping, got [1]"),
        ("ab", list[str], "must be a list of words, got 'ab'"),
        ("ab", Sequence[str], "must be a list of words, got 'ab'"),
    ],
)
def test_values_that_do_not(value: Any, annotation: Any, message: str) -> None:
    assert problem_with(value, annotation) == message


@pytest.mark.parametrize(
    ("annotation", "words"),
    [
        (Discount, "a number from 0 to 1"),
        (Annotated[float, Range(above=0, below=1)], "a number above 0 and below 1"),
        (list[bool], "a list of true or false"),
        (list[dict[str, int]], "a list of mappings"),
        (Literal[True, None, 0.5, "own"], "true or null or 0.5 or own"),
        (tuple[int, ...], "a list [a whole number, …]"),
        (Any, "anything"),
        (list[complex], "a list of complex"),
    ],
)
def test_descriptions(annotation: Any, words: str) -> None:
    assert describe_type(annotation) == words
