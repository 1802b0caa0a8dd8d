"""Report: read each run, draw it, write one page."""

from __future__ import annotations

import time

from tldist.errors import RecipeError
from tldist.files import write_text
from tldist.report.collect import collect
from tldist.report.page import render
from tldist.report.recipe import ReportRecipe
from tldist.runs import Outcome


def run(recipe: ReportRecipe) -> Outcome:
    """Write the page.

    Raises:
        RecipeError: a path is nothing to report on, or is damaged; or ``out`` is a folder.
    """
    if recipe.out.is_dir():
        raise RecipeError(f"{recipe.out} is a folder; out= takes the file to write, such as report.html.")
    sections = [collect(path) for path in recipe.runs]
    text = render(recipe.title, sections, time.strftime("%Y-%m-%d %H:%M"))
    write_text(recipe.out, text)
    values = {"sections": len(sections), "bytes": len(text.encode())}
    words = f"{len(sections)} sections, {values['bytes'] / 1e3:,.0f} kB"
    return Outcome("report", recipe.out, values, words, f"python -m webbrowser {recipe.out}")
