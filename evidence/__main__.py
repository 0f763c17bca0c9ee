"""Put a claim to the test, and write what was found into ``docs/evidence.md`` and the README's table of systems.

    python -m evidence                              # list the claims
    python -m evidence perla-foraging --jobs 2      # train what is missing, then summarise
    python -m evidence perla-foraging --seeds 1     # fewer seeds first; later calls add what is missing
    python -m evidence --document                   # write docs/evidence.md anew from what is there

Interrupted, the command goes on with what is missing.
"""

from __future__ import annotations

import argparse
import importlib
import sys
from collections.abc import Sequence

from evidence import experiment
from evidence.register import DOCUMENT, README, Claim, document, load_claims, with_evidence
from marlkit.errors import MarlkitError


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the command line."""
    parser = argparse.ArgumentParser(
        prog="python -m evidence", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("claim", nargs="?", help="its name; without one, the claims are listed")
    parser.add_argument("--seeds", type=int, help="train only the first seeds; as many as the experiment says")
    parser.add_argument("--jobs", type=int, default=1, help="trainings side by side, one thread each")
    parser.add_argument("--document", action="store_true", help="only write docs/evidence.md")
    options = parser.parse_args(arguments)
    try:
        claims = load_claims()
        if options.claim is not None:
            _run(claims, options)
        elif not options.document:
            for claim in claims.values():
                print(f"{claim.name:28} {claim.verdict}")
            return
        DOCUMENT.write_text(document(claims.values()), encoding="utf-8")
        README.write_text(with_evidence(README.read_text(encoding="utf-8"), claims.values()), encoding="utf-8")
    except MarlkitError as error:
        sys.exit(str(error))


def _run(claims: dict[str, Claim], options: argparse.Namespace) -> None:
    claim = claims.get(options.claim)
    if claim is None:
        raise MarlkitError(f"there is no claim `{options.claim}`; there are {', '.join(claims)}")
    if not claim.experiments and not claim.scripts:
        raise MarlkitError(f"`{claim.name}` has no experiment: {claim.finding}")
    for name in claim.experiments:
        experiment.run(experiment.load(name), seeds=options.seeds, jobs=options.jobs)
    for script in claim.scripts:
        importlib.import_module(f"evidence.{script}").main()


if __name__ == "__main__":
    main()
