"""The arguments under test, one file each: its name is the argument's id, `CLAIM` in it says all that is fixed.

Nothing here imports torch: verdicts are computed from numbers on disk.
"""

from __future__ import annotations

import importlib
from pathlib import Path

from normlab.claims.base import Claim
from normlab.config import InputError, require_choice

__all__ = ["available_claims", "load_claim", "select_claims"]

_INFRASTRUCTURE = {"__init__", "base", "families", "figure_tables", "figures", "measurements", "rows", "rules"}


def available_claims() -> tuple[str, ...]:
    """Ids of all arguments: one file each in this folder."""
    files = Path(__file__).parent.glob("*.py")
    # d2 before d10: by section, then by number.
    return tuple(sorted((file.stem for file in files if file.stem not in _INFRASTRUCTURE), key=_order))


def load_claim(claim_id: str) -> Claim:
    """The argument of that id.

    Raises:
        InputError: there is none, or its file calls it otherwise.
    """
    require_choice("argument", claim_id, available_claims())
    claim: Claim = importlib.import_module(f"normlab.claims.{claim_id}").CLAIM
    if claim.id != claim_id:
        raise InputError(f"claims/{claim_id}.py calls its argument {claim.id!r}; the file's name is its id")
    return claim


def select_claims(wanted: str) -> list[Claim]:
    """The arguments meant by an id, a prefix that one id alone has, the letter of a section, or "all".

    Raises:
        InputError: no or several ids begin so.
    """
    ids, asked = available_claims(), wanted.lower()
    if asked == "all" or (len(asked) == 1 and asked.isalpha()):
        found = [name for name in ids if asked == "all" or name.startswith(asked)]
        if not found:
            raise InputError(f"no argument in section {wanted!r}; there are: {', '.join(ids)}")
        return [load_claim(name) for name in found]
    found = (
        [name for name in ids if name == asked]
        or [name for name in ids if name.startswith(f"{asked}_")]
        or [name for name in ids if name.startswith(asked)]
    )
    if len(found) > 1:
        raise InputError(f"{wanted!r} may be any of: {', '.join(found)}; give more of the id")
    if not found:
        require_choice("argument", wanted, (*ids, "all"))
    return [load_claim(found[0])]


def _order(claim_id: str) -> tuple[str, int, str]:
    head, _, rest = claim_id.partition("_")
    return head[0], int(head[1:]), rest
