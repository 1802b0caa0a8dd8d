"""This job: how many processes the launcher started, and on which hosts."""

from __future__ import annotations

import importlib.util
import os
import platform
from collections import Counter

from tldist.doctor.finding import Check, Finding
from tldist.errors import MachineError

_LAUNCHED = ("WORLD_SIZE", "ACCELERATE_MIXED_PRECISION")


def check_job() -> Check:
    """Form the job that the launcher promised, and count it. Called by all its processes together."""
    if not any(name in os.environ for name in _LAUNCHED):
        return Check({"launched": False, "ranks": 1, "hosts": [platform.node()]})
    if importlib.util.find_spec("torch") is None or importlib.util.find_spec("accelerate") is None:
        what = "started by a launcher, but torch or accelerate is missing: the processes cannot meet"
        return Check({"launched": True}, (), (Finding("broken", what, "pip install 'tldist[train]'"),))
    from tldist import distributed

    try:
        team = distributed.start()
    except MachineError as error:
        what, _, command = str(error).partition(" Start it with: ")
        facts = {"launched": True, "ranks": 1, "hosts": [platform.node()]}
        todo = f"start it with: {command}" if command else "see launch/README.md"
        return Check(facts, (), (Finding("broken", what, todo),))
    hosts = Counter(team.gather(platform.node()))
    line = f"job: {team.size} ranks on " + ", ".join(f"{host} ({count})" for host, count in hosts.items())
    return Check({"launched": True, "ranks": team.size, "hosts": sorted(hosts)}, (line,))
