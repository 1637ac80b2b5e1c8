"""The page of ``raydiv data check --html``: counts of a source, and examples of it with their tokens."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from raydiv.model.chat import chat_table
from raydiv.runs.report.html import render
from raydiv.utils.storage import atomic


def write_page(path: Path, facts: dict[str, Any]) -> None:
    """Write the page of a source's facts, which have ``shown``."""
    page = render(
        "commands/data_check/page.html",
        title=facts["source"],
        facts=chat_table(facts["chat"]),
        counts=[
            ("examples", facts["examples"]),
            ("distinct prompts", facts["prompts"]["different"]),
            ("complete pairs", facts["pairs"]["complete"]),
            ("invalid pairs", len(facts["pairs"]["broken"])),
            ("duplicate examples", facts["duplicates"]["examples"]),
            ("bad rows", facts["bad_rows"]["count"]),
        ],
        columns=[
            ("formats", ", ".join(facts["formats"])),
            ("labels", ", ".join(f"{name}: {spelling}" for name, spelling in facts["labels"].items()) or "true/false"),
            ("ignored", ", ".join(facts["ignored"]) or "none"),
        ],
        notes_on_rows=[
            f"{note['meaning']}: {note['count']} (first: {note['rows'][0]['file']}:{note['rows'][0]['line']})"
            for note in facts["notes"].values()
        ],
        shown=facts["shown"],
    )
    with atomic(path) as temporary:
        temporary.write_text(page)
