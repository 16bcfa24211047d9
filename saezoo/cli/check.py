"""`saezoo check NAME`"""

import sys
from typing import TYPE_CHECKING, Any

import click

from saezoo.cli._host import column_option, dataset_option, load_all, progress_bar, texts_of
from saezoo.cli._print import (
    HELP,
    cache_option,
    format_option,
    json_option,
    offline_option,
    print_json,
    print_table,
)

if TYPE_CHECKING:
    from saezoo.selfcheck import SelfCheck, Trial

SHOWN = 5
"""Suspects that a person is shown."""


@click.command(context_settings=HELP)
@click.argument("name")
@click.option(
    "--model",
    is_flag=False,
    flag_value="",
    help="Run it too: L0 and FVU in a language model against the declared ones, and on a miss what "
    "explains it. A HuggingFace id or a folder; alone, the model that the SAE names.",
)
@dataset_option
@column_option
@click.option(
    "--tokens",
    type=click.IntRange(2),
    default=4096,
    show_default=True,
    help="How many tokens to run.",
)
@format_option
@cache_option
@offline_option
@json_option
def check(
    name: str,
    model: str | None,
    dataset: str | None,
    column: str,
    tokens: int,
    format_: str | None,
    cache_dir: str | None,
    offline: bool,
    as_json: bool,
) -> None:
    """Check an SAE: files, hash, shapes, finite weights, golden outputs; with --model also that its
    numbers in the model are the declared ones. Exit code 1 if anything is wrong.

    \b
    Example: saezoo check smollm2-135m-instruct/layer_15_resid_post
             saezoo check ./my-sae
             saezoo check smollm2-135m-instruct/layer_15_resid_post --model
    """
    from dataclasses import asdict

    from saezoo.check import Finding, check_sae

    if model is None and dataset is not None:
        raise click.UsageError("--dataset is for a run in the model: give --model too")
    findings = check_sae(name, format=format_, cache_dir=cache_dir, local_files_only=offline)
    verdict = None
    if model is not None and not any(finding.ok is False for finding in findings):
        differences, verdict = _run(name, model or None, dataset, column, tokens, cache_dir)
        findings += [Finding("host", None, what) for what in differences]
        findings.append(Finding("in use", verdict.ok, verdict.sentence))
    if as_json:
        rows: list[dict[str, Any]] = [asdict(finding) for finding in findings]
        if verdict is not None:
            rows[-1]["self_check"] = verdict.to_json()
        print_json(rows)
    else:
        words = {True: "ok", False: "WRONG", None: "-"}
        print_table(
            ["", "", "what was seen"], [(row.what, words[row.ok], row.detail) for row in findings]
        )
        if verdict is not None:
            _print_trials(verdict)
    if any(finding.ok is False for finding in findings):
        sys.exit(1)


def _run(
    name: str,
    model: str | None,
    dataset: str | None,
    column: str,
    tokens: int,
    cache_dir: str | None,
) -> "tuple[list[str], SelfCheck]":
    """In what the host differs from the SAE's spec, and how its numbers are there."""
    from saezoo.find import find_sae
    from saezoo.guard import compare_host
    from saezoo.selfcheck import self_check

    texts, said = texts_of(dataset, column)
    saes, host = load_all([name], model, cache_dir)
    sae = saes[name]
    differences = compare_host(host.model, sae.cfg, tokenizer=host.tokenizer)
    with progress_bar("trying what may explain it") as progress:
        verdict = self_check(
            host.model,
            host.tokenizer,
            sae,
            texts,
            entry=find_sae(name, cache_dir=cache_dir),
            tokens=tokens,
            text=said,
            progress=progress,
        )
    return [item.what for item in differences], verdict


def _print_trials(verdict: "SelfCheck") -> None:
    """On a miss, the numbers of the nearest suspects."""
    click.echo(f"\non {verdict.tokens:,} tokens of {verdict.text}")
    if not verdict.trials:
        return

    def row(one: "Trial") -> tuple[str, str, str]:
        return one.what, f"{one.fvu:.3g}", f"{one.l0:.4g}"

    declared = verdict.declared
    stated = tuple("" if v is None else f"{v:.4g}" for v in (declared.fvu, declared.l0))
    rows = [("declared", *stated), row(verdict.measured)]
    rows += [row(one) for one in verdict.trials[:SHOWN]]
    print_table(["what was tried", "FVU", "L0"], rows, right=["FVU", "L0"])
    more = len(verdict.trials) - SHOWN
    if more > 0:
        click.echo(f"… and {more} more that are further off (--json has all)")
