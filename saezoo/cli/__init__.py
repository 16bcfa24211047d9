"""The command line: each command parses, calls one library function, prints. Nothing heavy is
imported at the top.
"""

import sys

import click

from saezoo import __version__
from saezoo.cli._print import HELP
from saezoo.cli.cache import cache
from saezoo.cli.cache_activations import cache_activations
from saezoo.cli.check import check
from saezoo.cli.cite import cite
from saezoo.cli.convert import convert
from saezoo.cli.demo import demo
from saezoo.cli.download import download
from saezoo.cli.eval import eval_
from saezoo.cli.features import features
from saezoo.cli.info import info
from saezoo.cli.listing import list_
from saezoo.cli.plot_run import plot_run
from saezoo.cli.publish import publish
from saezoo.cli.registry import registry
from saezoo.cli.steer import steer
from saezoo.cli.top import top
from saezoo.cli.train import train
from saezoo.cli.zoo import zoo
from saezoo.errors import SaezooError


@click.group(context_settings=HELP)
@click.version_option(__version__, "--version", prog_name="saezoo", message="%(prog)s %(version)s")
@click.option(
    "--debug",
    is_flag=True,
    help="Show the traceback of an error. Works after a command's name too.",
)
def cli(debug: bool) -> None:  # noqa: ARG001 read in `main`, wherever it stands
    """The model zoo of interpretability: any published sparse autoencoder, by name.

    \b
    Example: saezoo demo
             saezoo list
             saezoo info smollm2-135m-instruct/layer_15_resid_post
    """


for command in (
    *(list_, info, download, convert, check, demo),
    *(eval_, features, top, steer, cache_activations),
    *(train, plot_run, publish, zoo, cache, cite, registry),
):
    cli.add_command(command)


def main(args: list[str] | None = None) -> None:
    """The `saezoo` program. Errors are one line on stderr and exit code 1; a traceback only with
    --debug.
    """
    words = list(sys.argv[1:] if args is None else args)
    debug = "--debug" in words
    words = [word for word in words if word != "--debug"]
    try:
        status = cli.main(words, prog_name="saezoo", standalone_mode=False)
    except SaezooError as error:
        _fail(error, debug)
    except click.exceptions.NoArgsIsHelpError as error:
        click.echo(error.format_message())
        sys.exit(0)
    except click.ClickException as error:
        context = error.ctx if isinstance(error, click.UsageError) else None
        hint = f"; see {context.command_path} -h" if context else ""
        _fail(click.ClickException(f"{error.format_message().rstrip('.')}{hint}"), debug)
    except (KeyboardInterrupt, click.exceptions.Abort) as error:
        # click makes its own of it; what was half done may have said how far it was
        said = str(error.__cause__ or error)
        usual = "what is whole stays in the cache; running this again goes on"
        click.echo(f"interrupted: {said or usual}", err=True)
        sys.exit(130)
    except BrokenPipeError:
        # whoever read our output has seen enough; pointing stdout away keeps the interpreter from
        # complaining at exit
        sys.stdout = None
        sys.exit(141)
    except OSError as error:
        _fail(error, debug)
    sys.exit(status if isinstance(status, int) else 0)


def _fail(error: Exception, debug: bool) -> None:
    if debug:
        raise error
    # one line, whatever the message holds
    click.echo(f"saezoo: {' '.join(str(error).split())}", err=True)
    sys.exit(1)
