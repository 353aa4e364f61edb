"""A self-contained HTML page of plots and a table."""

from __future__ import annotations

import base64
import html
from collections.abc import Mapping, Sequence

STYLE = """
body { font: 15px/1.5 system-ui, sans-serif; max-width: 60rem; margin: 2rem auto; padding: 0 1rem; color: #222; }
h1 { font-size: 1.5rem; } h2 { font-size: 1.15rem; margin-top: 2rem; } code { font-size: .9em; }
img { max-width: 100%; } figure { margin: 1rem 0; } figcaption { color: #555; font-size: .9rem; }
table { border-collapse: collapse; font-size: .85rem; font-variant-numeric: tabular-nums; }
th, td { padding: .15rem .6rem; text-align: right; } th:first-child, td:first-child { text-align: left; }
thead th { border-bottom: 1px solid #999; position: sticky; top: 0; background: #fff; }
tbody tr:nth-child(even) { background: #f5f5f5; } dt { font-weight: 600; } dd { margin: 0 0 .4rem 1rem; }
"""


def page(
    title: str,
    about: str,
    pictures: Mapping[str, tuple[bytes, str]],
    head: Sequence[str],
    rows: Sequence[Sequence[str]],
    terms: Mapping[str, str],
) -> str:
    """Return the page as HTML.

    Args:
        title: Heading.
        about: Line below the heading.
        pictures: PNG and caption of each plot.
        head: Heading of each column of the table.
        rows: Cells of the table, row by row.
        terms: What each column means.
    """
    figures = "".join(
        f'<figure><img alt="{html.escape(name)}" src="data:image/png;base64,{base64.b64encode(png).decode()}">'
        f"<figcaption>{html.escape(caption)}</figcaption></figure>"
        for name, (png, caption) in pictures.items()
    )
    header = "".join(f"<th>{html.escape(each)}</th>" for each in head)
    body = "".join("<tr>" + "".join(f"<td>{html.escape(cell)}</td>" for cell in row) + "</tr>" for row in rows)
    meanings = "".join(f"<dt>{html.escape(name)}</dt><dd>{html.escape(text)}</dd>" for name, text in terms.items())
    return (
        f'<!doctype html><html lang="en"><head><meta charset="utf-8"><title>{html.escape(title)}</title>'
        f"<style>{STYLE}</style></head><body><h1>{html.escape(title)}</h1><p>{html.escape(about)}</p>{figures}"
        f"<h2>All values</h2><dl>{meanings}</dl>"
        f"<table><thead><tr>{header}</tr></thead><tbody>{body}</tbody></table></body></html>\n"
    )
