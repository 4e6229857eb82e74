"""One line of the doctor's report."""

from email.utils import parsedate_to_datetime
from typing import Literal

from qlora_core.artifacts import Record

SKEW_WARN_S, SKEW_FAIL_S = 5.0, 60.0
"""Schedules and leases are off by this much; far above it, S3 signatures and tokens are refused."""


class Check(Record):
    """What was looked at, what was found, and what to do about it."""

    what: str
    status: Literal["ok", "warn", "fail"]
    found: str
    do: str = ""
    """Empty when there is nothing to do."""


def ok(what: str, found: str) -> Check:
    """Nothing to do."""
    return Check(what=what, status="ok", found=found)


def warned(what: str, found: str, do: str) -> Check:
    """Retraining works, but not as well as it could."""
    return Check(what=what, status="warn", found=found, do=do)


def failed(what: str, found: str, do: str) -> Check:
    """Retraining does not work."""
    return Check(what=what, status="fail", found=found, do=do)


def clock(what: str, date: str, now_s: float) -> Check:
    """This machine's clock against the `Date` that a server has put on its answer.

    Args:
        what: name of the check.
        date: as HTTP writes it, in whole seconds.
        now_s: seconds since 1970 here, when the answer came.
    """
    ahead_s = now_s - parsedate_to_datetime(date).timestamp()
    skew_s = max(0.0, abs(ahead_s) - 1.0)  # the header has cut off up to a second
    if skew_s <= SKEW_WARN_S:
        return ok(what, f"within {SKEW_WARN_S:.0f} s of this machine's")
    found = f"this machine is {abs(ahead_s):,.0f} s {'ahead' if ahead_s > 0 else 'behind'}"
    do = "let both machines keep time by NTP (`timedatectl set-ntp true`)"
    return (failed if skew_s > SKEW_FAIL_S else warned)(what, found, do)
