"""The page of a comparison: one file of HTML that holds its figures, and the same as Markdown."""

from __future__ import annotations

import base64
from collections.abc import Mapping, Sequence
from html import escape

from marlkit.comparison.results import Scores, TaskResult
from marlkit.comparison.tables import improvement_rows, markdown_table, runs_rows, shown, summary_rows

STYLE = """
body { font: 16px/1.5 system-ui, sans-serif; color: #1a1a1a; background: #fff; max-width: 62rem; margin: auto; padding: 2rem }
h1, h2 { line-height: 1.2 }
h2 { margin-top: 2.5rem; border-bottom: 1px solid #ccc }
table { border-collapse: collapse; margin: 1rem 0; font-size: 0.92rem }
th, td { text-align: left; padding: 0.25rem 0.9rem 0.25rem 0 }
th { border-bottom: 1px solid #999 }
td { border-bottom: 1px solid #e5e5e5; vertical-align: top }
figure { margin: 1.5rem 0 }
figure img { width: 100%; max-width: 46rem }
figcaption { color: #444; font-size: 0.92rem; max-width: 46rem }
.notes { background: #fff6e0; border-left: 4px solid #e69f00; padding: 0.6rem 1rem }
.wide { overflow-x: auto }
"""
CAPTIONS = {
    "curves": "Sample efficiency. Line: interquartile mean over the runs of a group at each evaluation. Band: 95 % bootstrap "
    "interval at each point, not of the whole curve.",
    "scores": "Bar: interquartile mean. Shade: its 95 % bootstrap interval. Each mark: one run.",
    "improvement": "Probability that a random run of the first group scores higher than one of the second, ties counted half, "
    "with its 95 % bootstrap interval. At the dotted line, one half, neither is better. It says how often, not by how much.",
    "profile": "Performance profile: the share of runs that score above each threshold, with its 95 % bootstrap interval at each "
    "point. A curve that is higher everywhere belongs to a better group; where curves cross, one group has better "
    "runs and worse ones.",
}
"""How to read each figure."""
NORMALISED = (
    "Each score is scaled so that 0 is the lowest and 1 the highest evaluation of any run that is compared on its task. The "
    "scale depends on what is compared, so these numbers do not carry over to other comparisons. Runs are drawn anew within each "
    "task."
)

Figures = Mapping[str, Mapping[str, bytes]]
"""Drawings of a task, or of all tasks, by kind; see :data:`CAPTIONS`."""


def html_page(results: Sequence[TaskResult], overall: Scores | None, figures: Figures, metric: str, notes: Sequence[str]) -> str:
    """A page that opens without a server and without a network."""
    parts = [f"<h1>Comparison of {escape(metric)}</h1>", *(f"<p>{escape(line)}</p>" for line in _what(results, metric))]
    if notes:
        parts.append(f'<div class="notes"><ul>{"".join(f"<li>{escape(note)}</li>" for note in notes)}</ul></div>')
    for result in results:
        name = result.task.name
        parts += [f"<h2>{escape(name)}</h2>", f"<p>{escape(_about(result))}</p>", _table(*summary_rows(result))]
        parts += [_figure(kind, drawing, f"{kind} on {name}") for kind, drawing in figures[name].items()]
    if overall is not None:
        parts += ["<h2>All tasks</h2>", f"<p>{escape(NORMALISED)}</p>"]
        parts += [_figure(kind, drawing, f"{kind} over all tasks") for kind, drawing in figures[""].items()]
    heads, rows = runs_rows(results, metric)
    parts += ["<h2>Runs</h2>", f'<div class="wide">{_table(heads, rows)}</div>']
    head = f"<title>Comparison of {escape(metric)}</title><style>{STYLE}</style>"
    meta = '<meta charset="utf-8"><meta name="viewport" content="width=device-width">'
    body = "\n".join(parts)
    return f'<!doctype html>\n<html lang="en">\n<head>{meta}{head}</head>\n<body>\n{body}\n</body>\n</html>\n'


def markdown_page(results: Sequence[TaskResult], overall: Scores | None, metric: str, notes: Sequence[str]) -> str:
    """The tables for a paper's appendix."""
    parts = [f"# Comparison of {metric}\n", *(f"{line}\n" for line in _what(results, metric))]
    if notes:
        parts.append("".join(f"- {note}\n" for note in notes))
    for result in results:
        parts += [f"## {result.task.name}\n", f"{_about(result)}\n", markdown_table(*summary_rows(result))]
        if result.best.improvements:
            parts.append(markdown_table(["pair", "probability of improvement"], improvement_rows(result.best)))
    if overall is not None:
        rows = [[label, *_numbers(overall, label)] for label in overall.means]
        parts += ["## All tasks\n", f"{NORMALISED}\n", markdown_table(["group", "normalised score", "95 % interval"], rows)]
        parts.append(markdown_table(["pair", "probability of improvement"], improvement_rows(overall)))
    heads, rows = runs_rows(results, metric)
    parts += ["## Runs\n", markdown_table(heads, rows)]
    return "\n".join(parts)


def _numbers(scores: Scores, label: str) -> list[str]:
    value, low, high = (float(part) for part in scores.means[label])
    return [shown(value), f"[{shown(low)}, {shown(high)}]"]


def _what(results: Sequence[TaskResult], metric: str) -> list[str]:
    """What was compared, and how."""
    played = all(result.absolute for result in results)
    lines = [
        "Interquartile means over runs with different seeds, and 95 % percentile intervals of the stratified bootstrap "
        "(Agarwal et al. 2021). Few runs give intervals that are too narrow: with five, one of 95 % holds the true value in some "
        "80 to 90 % of cases."
    ]
    if played:
        lines.append(
            "Scores, probabilities of improvement and profiles are of the absolute metric (Gorsane et al. 2022): the policy of "
            "the best evaluation of each run, played over ten times the episodes of an evaluation, which are none of those that "
            "it was chosen by."
        )
    else:
        lines.append("Scores, probabilities of improvement and profiles are of the last evaluation.")
    return lines


def _about(result: TaskResult) -> str:
    task = result.task
    return f"Environment {task.environment} ({task.options}); {task.budget:,} frames for every run."


def _table(heads: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    head = "".join(f"<th>{escape(cell)}</th>" for cell in heads)
    body = "".join("<tr>" + "".join(f"<td>{escape(cell)}</td>" for cell in row) + "</tr>" for row in rows)
    return f"<table><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table>"


def _figure(kind: str, drawing: bytes, words: str) -> str:
    data = base64.b64encode(drawing).decode()
    picture = f'<img src="data:image/svg+xml;base64,{data}" alt="{escape(words)}">'
    return f"<figure>{picture}<figcaption>{escape(CAPTIONS[kind])}</figcaption></figure>"
