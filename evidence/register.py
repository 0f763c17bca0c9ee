"""The register of claims, ``evidence/claims.yaml``, and the page that is written from it."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

import yaml

from evidence.experiment import RESULTS, commits, load
from marlkit.errors import MarlkitError

REGISTER = Path(__file__).parent / "claims.yaml"
DOCUMENT = Path(__file__).parent.parent / "docs" / "evidence.md"
README = Path(__file__).parent.parent / "README.md"
VERDICTS = ("reproduced", "partly", "not reproduced", "not tested")
SOURCES = {
    "PERLA": "Jafferjee et al. 2022, Semi-Centralised Multi-Agent Reinforcement Learning with Policy-Embedded Training",
    "F2A2": "Li et al. 2020, F2A2: Flexible Fully-decentralized Approximate Actor-critic",
    "lecture": "lecture slides on cooperative policy-based multi-agent learning",
}


@dataclass(frozen=True)
class Claim:
    """What a source claims, and what was found.

    Attributes:
        name: on the command line.
        source: a key of :data:`SOURCES`.
        where: in it.
        claim: in one sentence.
        verdict: one of :data:`VERDICTS`.
        finding: what was found, or why it was not tested.
        experiments: names of files in ``evidence/experiments``.
        scripts: names of modules in ``evidence`` with a function ``main``.
        tests: that put it to the test, as pytest names them.
        budget: of what was run, in words.
        recipes: that it is about, beside those of its experiments.
    """

    name: str
    source: str
    where: str
    claim: str
    verdict: str
    finding: str
    experiments: Sequence[str] = field(default_factory=tuple)
    scripts: Sequence[str] = field(default_factory=tuple)
    tests: Sequence[str] = field(default_factory=tuple)
    budget: str = ""
    recipes: Sequence[str] = field(default_factory=tuple)


def load_claims(path: Path = REGISTER) -> dict[str, Claim]:
    """All claims, by name.

    Raises:
        MarlkitError: an entry is not as it should be; names it.
    """
    found: dict[str, Claim] = {}
    for number, entry in enumerate(yaml.safe_load(path.read_text(encoding="utf-8"))):
        claim = _claim(f"{path.name}, entry {number + 1}", entry)
        if claim.name in found:
            raise MarlkitError(f"{path.name}: two claims are called `{claim.name}`")
        found[claim.name] = claim
    return found


def _claim(place: str, entry: dict[str, Any]) -> Claim:
    known = {part.name for part in fields(Claim)}
    unknown = entry.keys() - known
    if unknown:
        raise MarlkitError(f"{place}: has unknown entries {', '.join(sorted(unknown))}; known are {', '.join(sorted(known))}")
    try:
        claim = Claim(**entry)
    except TypeError as error:
        raise MarlkitError(f"{place}: {error}") from error
    if claim.verdict not in VERDICTS:
        raise MarlkitError(f"{place}: verdict {claim.verdict!r} is none of {', '.join(VERDICTS)}")
    if claim.source not in SOURCES:
        raise MarlkitError(f"{place}: source {claim.source!r} is none of {', '.join(SOURCES)}")
    tested = [*claim.experiments, *claim.scripts, *claim.tests]
    if claim.verdict != "not tested" and not tested:
        raise MarlkitError(f"{place}: `{claim.verdict}`, but names no experiment, script or test")
    return claim


def results_of(claim: Claim) -> list[Path]:
    """The folders of what was kept; of those that there are."""
    return [RESULTS / name for name in (*claim.experiments, *claim.scripts) if (RESULTS / name / "summary.md").exists()]


def claims_about(recipe: str, claims: Iterable[Claim]) -> list[Claim]:
    """Those whose experiments train a recipe, or that name it."""
    return [
        claim
        for claim in claims
        if recipe in claim.recipes or any(recipe == arm[0] for name in claim.experiments for arm in load(name).arms.values())
    ]


# --- the page ----------------------------------------------------------------------------------------------------------------


HEAD = """# Evidence

What the sources of marlkit's systems claim, and what was found when it was tried. `python -m evidence --document` writes this
page from [evidence/claims.yaml](../evidence/claims.yaml) and from the results beside it; a test fails when they differ.
`make evidence CLAIM=<name>` makes the results of a claim again, or goes on with them.

Nothing was tuned towards a published figure. Budgets are what two cores do in hours, far below those of the papers: where a claim
is not reproduced, this says what was seen within that budget, not that the claim is wrong. Values are interquartile means over
the seeds with 95 % bootstrap intervals ([how to read them](comparing.md)).

That single equations are right is shown elsewhere: by closed forms and enumeration in `tests/theory`, and by public code.
Advantages, value normalisation, the losses and gradients of PPO, HAPPO and COMA, HATRPO's whole step and MAT's networks equal it
to 1e-12 on fixed batches (`tests/theory/test_public_code.py`; `tests/golden/make_public_code.py` names the commits, and makes the
numbers again).
"""


def document(claims: Iterable[Claim]) -> str:
    """The page."""
    claims = list(claims)
    rows = [f"| [{claim.name}](#{claim.name}) | {claim.source} | {claim.claim} | {claim.verdict} |" for claim in claims]
    sources = [f"- {name}: {title}." for name, title in SOURCES.items()]
    head = [HEAD, "| name | source | claim | verdict |", "|---|---|---|---|", *rows, "", *sources, ""]
    shown: dict[str, str] = {}
    return "\n".join([*head, *(_section(claim, shown) for claim in claims)])


def _section(claim: Claim, shown: dict[str, str]) -> str:
    """What is said of a claim; ``shown`` notes by folder the claim under which its results stand."""
    lines = [f"## {claim.name}", "", f"{claim.claim} ({claim.source}, {claim.where})", ""]
    lines += [f"**{claim.verdict.capitalize()}.** {claim.finding.strip()}", ""]
    if claim.experiments or claim.scripts:
        lines += [f"`make evidence CLAIM={claim.name}`{'; ' + claim.budget if claim.budget else ''}.", ""]
    if claim.tests:
        lines += [f"Tests: {', '.join(f'`{test}`' for test in claim.tests)}.", ""]
    for folder in results_of(claim):
        under = shown.setdefault(folder.name, claim.name)
        if under != claim.name:
            lines += [f"The results stand under [{under}](#{under}).", ""]
            continue
        lines += [(folder / "summary.md").read_text(encoding="utf-8").strip(), ""]
        for picture in sorted(folder.glob("*.png")):
            words = f"{claim.name}: {picture.stem}"
            lines += [f'<img src="../evidence/results/{folder.name}/{picture.name}" width="420" alt="{words}">']
        if folder.name in claim.experiments:
            made = ", ".join(commits(load(folder.name)))
            lines += [
                "",
                f"Made with commit {made}; curves and versions stand in [{folder.name}](../evidence/results/{folder.name}).",
            ]
        lines += [""]
    return "\n".join(lines)


def with_evidence(text: str, claims: Iterable[Claim]) -> str:
    """The README with the last column of its table of systems written anew: the claims about each recipe and their verdicts."""
    claims = list(claims)
    before, head, rest = text.partition(TABLE_OF_SYSTEMS)
    lines, end, after = rest.partition("\n\n")
    return before + head + "\n".join(_with_cell(line, claims) for line in lines.split("\n")) + end + after


TABLE_OF_SYSTEMS = "| recipe | actor | critic | update | source | evidence |\n|---|---|---|---|---|---|\n"
"""How it begins."""


def _with_cell(line: str, claims: Sequence[Claim]) -> str:
    recipe = line.split("`")[1]
    found = [f"[{claim.name}](docs/evidence.md#{claim.name}): {claim.verdict}" for claim in claims_about(recipe, claims)]
    cell = "<br>".join(found) or "no claim of the sources"
    return "|".join([*line.split("|")[:6], f" {cell} |"])
