"""`saezoo convert SRC DEST`"""

import click

from saezoo.cli._print import (
    HELP,
    cache_option,
    format_option,
    json_option,
    offline_option,
    print_json,
)
from saezoo.formats import writable_formats


@click.command(context_settings=HELP)
@click.argument("src")
@click.argument("dest", type=click.Path(file_okay=False))
@format_option
@click.option(
    "--to",
    default="native",
    show_default=True,
    metavar="FORMAT",
    help=f"What to write: {', '.join(writable_formats())}; or a format of an installed package.",
)
@cache_option
@offline_option
@json_option
def convert(
    src: str,
    dest: str,
    format_: str | None,
    to: str,
    cache_dir: str | None,
    offline: bool,
    as_json: bool,
) -> None:
    """Write the SAE called SRC into the folder DEST in another format, and prove that it computes
    the same.

    \b
    Example: saezoo convert sae-llama-3-8b-32x/layers.10 ./my-sae
             saezoo convert ./my-sae ./for-sparsify --to sparsify
    """
    from saezoo.convert import convert_sae

    proof = convert_sae(
        src, dest, to, format=format_, cache_dir=cache_dir, local_files_only=offline
    )
    if as_json:
        print_json(
            {key: str(value) if key == "folder" else value for key, value in vars(proof).items()}
        )
        return
    click.echo(f"wrote {proof.folder} ({proof.format})")
    click.echo(
        f"proof: largest difference {proof.difference:.1e} of the largest output "
        f"(tolerance {proof.tolerance:.0e}), through {proof.through}, on seeded inputs"
    )
