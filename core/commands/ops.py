"""``portlm ops``: the table of fused operations."""

import json

import click


@click.command("ops")
@click.option("--json", "as_json", is_flag=True, help="Print JSON instead of a table.")
def command(as_json: bool) -> None:
    """Print every fused operation and which of its forms this build has.

    "yes" is there, "-" is missing from this build, blank is not needed, "?" needs a package that is not installed.
    """
    from portlm.ops.registry import COLUMNS, table

    rows = table()
    if as_json:
        click.echo(json.dumps(rows, indent=2))
        return
    widths = [max(len(column), *(len(row[column]) for row in rows)) for column in COLUMNS]
    for cells in [dict(zip(COLUMNS, COLUMNS, strict=True)), *rows]:
        click.echo(
            "  ".join(
                cells[column].ljust(width) for column, width in zip(COLUMNS, widths, strict=True)
            ).rstrip()
        )
