"""Windows, episodes and ring buffers against numbers computed by hand."""

from __future__ import annotations

import pytest
import torch

from marlkit.functional.history import in_episode_of_last, ring_slot, windows


def marks(*rows: str) -> torch.Tensor:
    """One environment per word, one step per letter: ``[time, B]``, true where the letter is x."""
    return torch.tensor([[letter == "x" for letter in row] for row in rows]).transpose(0, 1)


def shown(valid: torch.Tensor, env: int) -> list[str]:
    """The windows of one environment, a word for each step: x where the window's step counts."""
    return ["".join(".x"[int(flag)] for flag in window) for window in valid[:, env].tolist()]


def test_windows_by_hand() -> None:
    steps = torch.tensor([[10, 20], [11, 21], [12, 22], [13, 23], [14, 24]])
    expected = [[[10, 11, 12], [20, 21, 22]], [[11, 12, 13], [21, 22, 23]], [[12, 13, 14], [22, 23, 24]]]
    assert windows(steps, 2).tolist() == expected


def test_windows_keep_the_dimensions_after_time_and_environment() -> None:
    steps = torch.arange(4 * 2 * 3).view(4, 2, 3)
    found = windows(steps, 1)
    assert found.shape == (3, 2, 2, 3)
    assert found[1, 0].tolist() == [[6, 7, 8], [12, 13, 14]]


def test_windows_of_no_past_are_the_steps_and_a_copy_of_them() -> None:
    steps = torch.arange(6).view(3, 2)
    found = windows(steps, 0)
    assert found.squeeze(-1).tolist() == [[0, 1], [2, 3], [4, 5]]
    steps.zero_()
    assert found.sum() == 15


def test_steps_before_the_beginning_of_an_episode_do_not_count() -> None:
    valid = in_episode_of_last(marks(".......", "...x...", "x.xx..x"), 0, 3)
    assert shown(valid, 0) == ["xxxx", "xxxx", "xxxx", "xxxx"]
    assert shown(valid, 1) == ["...x", "..xx", ".xxx", "xxxx"]
    assert shown(valid, 2) == ["...x", "..xx", ".xxx", "...x"]


def test_steps_that_do_not_exist_do_not_count() -> None:
    is_first = marks("......", "...x..")
    valid = in_episode_of_last(is_first, 2, 3)
    assert shown(valid, 0) == ["..xx", ".xxx", "xxxx"]
    assert shown(valid, 1) == ["...x", "..xx", ".xxx"]


def test_each_environment_may_lack_another_number_of_steps() -> None:
    valid = in_episode_of_last(marks(".....", "....."), torch.tensor([0, 3]), 3)
    assert shown(valid, 0) == ["xxxx", "xxxx"]
    assert shown(valid, 1) == ["...x", "..xx"]


def test_an_episode_start_in_a_step_that_does_not_exist_is_ignored() -> None:
    """Slots that were never written may hold any value."""
    missing = torch.tensor([2])
    assert torch.equal(
        in_episode_of_last(marks("xx..."), missing, 2),
        in_episode_of_last(marks("....."), missing, 2),
    )


def test_without_a_past_only_the_step_itself_counts() -> None:
    assert in_episode_of_last(marks("x.x"), 0, 0).squeeze(-1).tolist() == [[True], [True], [True]]


@pytest.mark.parametrize(
    ("position", "filled", "slots"),
    [
        (3, 3, [0, 1, 2]),  # not full: in order from the first slot
        (0, 5, [0, 1, 2, 3, 4]),  # just full
        (2, 5, [2, 3, 4, 0, 1]),  # written over twice
        (4, 5, [4, 0, 1, 2, 3]),
    ],
)
def test_ring_by_hand(position: int, filled: int, slots: list[int]) -> None:
    order = torch.arange(filled)
    assert ring_slot(order, position=position, filled=filled, capacity=5).tolist() == slots


def test_a_ring_gives_some_slot_for_overwritten_steps() -> None:
    found = ring_slot(torch.arange(-9, 0), position=1, filled=1, capacity=4)
    assert ((found >= 0) & (found < 4)).all()
