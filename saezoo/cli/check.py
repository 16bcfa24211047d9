"""`saezoo check NAME`"""

import sys

import click

from saezoo.cli._print import (
    HELP,
    cache_option,
    format_option,
    json_option,
    offline_option,
    print_json,
    print_table,
)


@click.command(context_settings=HELP)
@click.argument("name")
@format_option
@cache_option
@offline_option
@json_option
def check(
    name: str, format_: str | None, cache_dir: str | None, offline: bool, as_json: bool
) -> None:
    """Check an SAE: files, hash, shapes, finite weights, golden outputs. Exit code 1 if anything is
    wrong.

    \b
    Example: saezoo check smollm2-135m-instruct/layer_15_resid_post
             saezoo check ./my-sae
    """
    from dataclasses import asdict

    from saezoo.check import check_sae

    findings = check_sae(name, format=format_, cache_dir=cache_dir, local_files_only=offline)
    if as_json:
        print_json([asdict(finding) for finding in findings])
    else:
        words = {True: "ok", False: "WRONG", None: "-"}
        print_table(
            ["", "", "what was seen"], [(row.what, words[row.ok], row.detail) for row in findings]
        )
    if any(finding.ok is False for finding in findings):
        sys.exit(1)
