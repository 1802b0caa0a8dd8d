"""Why parity failed: the verdict with the node that departs, or with a note that it was not found."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from tldist.export.judge import departing_images
from tldist.export.profile import Profile
from tldist.export.verdict import Verdict
from tldist.progress import say
from tldist.runtime.reference import Reference
from tldist.runtime.session import Session

if TYPE_CHECKING:
    from tldist.export.graph import ExportGraph


def explain(
    verdict: Verdict,
    graph: ExportGraph,
    model: Path,
    session: Session,
    reference: Reference,
    profile: Profile,
) -> Verdict:
    """The same verdict with the first node that departs; where it cannot be found, a note says why.

    Args:
        verdict: that failed.
        graph: the ``ExportGraph`` of the bundle.
        model: the ``.onnx`` file.
        session: it, as it is deployed.
        reference: that it was compared with.
        profile: that it was exported for.
    """
    from tldist.export.bisect import NODE_TOLERANCE, bisect

    say("parity failed: looking for the first node that departs (this exports the bundle once more)")
    try:
        images = departing_images(session, reference)
        widest = NODE_TOLERANCE if profile.precision == "fp32" else profile.tolerances.max_relative
        departure = bisect(graph, model, images, tolerance=widest, session=session)
    except Exception as error:  # whatever goes wrong here, the verdict stands
        reason = " ".join(f"{type(error).__name__}: {error}".split())[:300]
        return replace(verdict, notes=(*verdict.notes, f"the node that departs was not found: {reason}"))
    if departure is None:
        note = "no node was found that departs on the image that is farthest off"
        return replace(verdict, notes=(*verdict.notes, note))
    return replace(verdict, departure=departure)
