"""Write the W&B workspaces and the report of all arguments to runs/dashboard/, and save them if there is an account.

    make dashboard ENTITY=my-team PROJECT=normlab

Without an API key nothing is sent: the files hold what would be.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from normlab.claims import available_claims, load_claim
from normlab.config import InputError, OutputConfig


def main() -> int:
    """Exit code: 0, 1 if there is an account and saving failed, 2 for wrong input."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--entity", default="", help="W&B entity; empty takes the account's default")
    parser.add_argument("--project", default=OutputConfig.project, help="W&B project of the runs")
    parser.add_argument("--results", type=Path, default=Path("results"), help="folder of the tables, for the verdicts")
    parser.add_argument("--output", type=Path, default=Path("runs/dashboard"), help="where the files go")
    options = parser.parse_args()
    claims = [load_claim(name) for name in available_claims()]
    try:
        from normlab.dashboard.command import dashboard
    except ModuleNotFoundError as error:
        print(f"normlab: error: the dashboard needs {error.name}: pip install wandb-workspaces", file=sys.stderr)
        return 2
    try:
        return dashboard(claims, options.results, options.output, options.entity, options.project)
    except InputError as error:
        print(f"normlab: error: {error}", file=sys.stderr)
        return 2


if __name__ == "__main__":
    sys.exit(main())
