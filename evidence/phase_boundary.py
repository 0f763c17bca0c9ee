"""Where exact policy gradients end in the matrix games of PERLA, by the probability with which agents begin with the good move.

All N agents get 8 if all choose the first of A moves, -12 if some but not all do, and 0 if none does. Each has a softmax policy
of its own and ascends the exact gradient of the expected payoff, which is what every unbiased critic, marginalised or not, leads
to on average. Where all begin with the probability p for the first move, its advantage over the others is

    20 p^(N-1) - 12 (1 - p)^(N-1),

whose sign changes at ``p / (1 - p) = (3 / 5)^(1 / (N-1))``, for every A. A policy that is nearly uniform at first begins at 1/A.
"""

from __future__ import annotations

import numpy as np
from matplotlib.figure import Figure
from numpy.typing import NDArray

from evidence.experiment import RESULTS
from marlkit.comparison.figures import png
from marlkit.comparison.tables import markdown_table
from marlkit.run.files import write_whole

AGENTS = (2, 3, 4, 5, 6, 10, 15, 20)
MOVES = (3, 6, 9, 12, 15)
TINY = 1e-300
Array = NDArray[np.float64]


def boundary(agents: int) -> float:
    """The probability at which the advantage of the good move changes its sign."""
    odds = (3 / 5) ** (1 / (agents - 1))
    return float(odds / (1 + odds))


def ascend(first: Array, moves: int, *, length: float = 0.1, steps: int = 400) -> Array:
    """Follow the exact gradient, in steps of one length: where it leads to does not depend on how fast.

    Args:
        first: probability of the first move at the beginning, of each of N agents, ``[N]``; the other moves are equally likely.
        moves: number of moves A.
        length: of a step in logits.
        steps: of the ascent.

    Returns:
        The probabilities at the end, ``[N]``.
    """
    logits = np.zeros((len(first), moves))
    logits[:, 0] = np.log(first) - np.log((1 - first) / (moves - 1))
    for _ in range(steps):
        policy = _softmax(logits)
        others = policy[:, :1]
        all_first = others.prod() / np.maximum(others, TINY)
        none_first = (1 - others).prod() / np.maximum(1 - others, TINY)
        values = np.concatenate([20 * all_first - 12, np.repeat(12 * none_first - 12, moves - 1, axis=-1)], axis=-1)
        gradient = policy * (values - (policy * values).sum(-1, keepdims=True))
        logits += length * gradient / max(float(np.abs(gradient).max()), TINY)
    return _softmax(logits)[:, 0]


def _softmax(logits: Array) -> Array:
    weights = np.exp(logits - logits.max(-1, keepdims=True))
    return np.asarray(weights / weights.sum(-1, keepdims=True))


def reached(agents: int, moves: int, first: float) -> float:
    """The payoff of the most likely joint move at the end."""
    end = ascend(np.full(agents, first), moves)
    chosen = end > 0.5
    return 8.0 if chosen.all() else -12.0 if chosen.any() else 0.0


def found_boundary(agents: int, moves: int) -> float:
    """The probability from which on 8 is reached, by bisection to 0.001."""
    low, high = 0.01, 0.99
    while high - low > 0.001:
        middle = (low + high) / 2
        low, high = (low, middle) if reached(agents, moves, middle) == 8 else (middle, high)
    return (low + high) / 2


def main() -> None:
    """Write the table and the figure."""
    folder = RESULTS / "phase_boundary"
    rows = [
        [str(n), f"{boundary(n):.4f}", *(f"{found_boundary(n, a):.3f}" for a in (MOVES[0], MOVES[-1])), *_at_uniform(n)]
        for n in AGENTS
    ]
    heads = ["agents", "boundary", *(f"found, {a} moves" for a in (MOVES[0], MOVES[-1])), "reached from uniform policies"]
    text = "Probability of the good move at the beginning, above which exact policy gradients reach 8 instead of 0:\n\n"
    write_whole(folder / "summary.md", (text + markdown_table(heads, rows)).encode())
    write_whole(folder / "phase_boundary.png", png(_figure()))


def _at_uniform(agents: int) -> list[str]:
    ends = {moves: reached(agents, moves, 1 / moves) for moves in MOVES}
    return [f"{', '.join(f'{value:.0f}' for value in dict.fromkeys(ends.values()))} ({MOVES[0]} to {MOVES[-1]} moves)"]


def _figure() -> Figure:
    figure = Figure(figsize=(6, 3.6), layout="constrained")
    axes = figure.subplots()
    agents = range(2, 21)
    axes.fill_between(agents, [boundary(n) for n in agents], 1, color="tab:blue", alpha=0.25, label="8 is reached")
    axes.fill_between(agents, 0, [boundary(n) for n in agents], color="tab:orange", alpha=0.25, label="0 is reached")
    axes.plot(AGENTS, [found_boundary(n, MOVES[0]) for n in AGENTS], "ko", label="found by ascent")
    for moves in (3, 6, 15):
        axes.axhline(1 / moves, color="0.4", linewidth=0.8, linestyle=":")
        axes.text(20.2, 1 / moves, f"uniform over {moves}", va="center", fontsize=7, color="0.3")
    axes.set(xlim=(2, 20), ylim=(0, 1), xlabel="agents", ylabel="probability of the good move at first")
    axes.legend(loc="upper left")
    return figure


if __name__ == "__main__":
    main()
