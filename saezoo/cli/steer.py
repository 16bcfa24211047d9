"""`saezoo steer NAME`"""

import math
from contextlib import nullcontext

import click

from saezoo.cli._print import HELP, console, json_option, print_json


def _feature(_context: click.Context, _option: click.Parameter, texts: tuple[str, ...]) -> dict:
    """FEATURE=AMOUNT, or FEATURE alone, as {feature: amount or None}."""
    found: dict[int, float | None] = {}
    for text in texts:
        name, equals, amount = text.partition("=")
        try:
            found[int(name)] = _finite(amount) if equals else None
        except ValueError:
            raise click.BadParameter(f"{text!r} is not FEATURE=AMOUNT, such as 123=4") from None
    return found


def _finite(text: str) -> float:
    value = float(text)
    if not math.isfinite(value):
        raise ValueError
    return value


@click.command(context_settings=HELP)
@click.argument("name")
@click.option(
    "--feature",
    "features",
    multiple=True,
    required=True,
    callback=_feature,
    metavar="FEATURE=AMOUNT",
    help="Which feature, and how much; several times for several. To ablate, FEATURE alone.",
)
@click.option("--prompt", required=True, help="What the model goes on from.")
@click.option(
    "--how",
    type=click.Choice(["add", "clamp", "scale", "ablate"]),
    default="add",
    show_default=True,
    help="Add the amount, set to it, multiply by it, or set to nothing.",
)
@click.option(
    "--unit",
    type=click.Choice(["max_activation", "raw"]),
    default="max_activation",
    show_default=True,
    help="What --feature counts in, to add and to clamp.",
)
@click.option(
    "--tokens",
    default=40,
    show_default=True,
    type=click.IntRange(min=1),
    help="How many to write, at most.",
)
@click.option(
    "--temperature",
    default=0.0,
    show_default=True,
    type=click.FloatRange(min=0),
    help="0: the likeliest token each time.",
)
@click.option("--seed", default=0, show_default=True, help="Of the sampling; both get the same.")
@click.option("--model", help="Another language model than the SAE's own.")
@json_option
def steer(
    name: str,
    features: dict[int, float | None],
    prompt: str,
    how: str,
    unit: str,
    tokens: int,
    temperature: float,
    seed: int,
    model: str | None,
    as_json: bool,
) -> None:
    """Let the language model of an SAE go on from a prompt, as it is and with features changed.

    \b
    Example: saezoo steer smollm2-135m-instruct/layer_15_resid_post \\
                 --feature 4045=1 --prompt "When I was young, my family and I"
    """
    from rich.text import Text

    from saezoo.host import SMOLLM2, load_host
    from saezoo.load import load_sae, need_sae
    from saezoo.steering import continuation
    from saezoo.steering import steer as steering

    lacking = [feature for feature, amount in features.items() if amount is None]
    if lacking and how != "ablate":
        raise click.UsageError(f"how much? --feature {lacking[0]}=AMOUNT")
    amounts = {feature: amount or 0.0 for feature, amount in features.items()}
    screen = console(err=True)
    with screen.status("loading the SAE and its language model"):
        sae = need_sae(load_sae(name), name, "saezoo steer")
        host = load_host(model or sae.cfg.model_name or SMOLLM2)
    screen.print(f"model: {host.took}", style="dim", markup=False)
    bos = sae.cfg.tokens.prepend_bos if sae.cfg.tokens else None
    written = {}
    with screen.status("writing"):
        for which in ("plain", "steered"):
            with (
                steering(host.model, sae, amounts, how, unit, tokenizer=host.tokenizer)  # type: ignore[arg-type]
                if which == "steered"
                else nullcontext()
            ):
                written[which] = continuation(
                    host.model,
                    host.tokenizer,
                    prompt,
                    tokens,
                    bos=bos,
                    temperature=temperature,
                    seed=seed,
                )
    if as_json:
        facts = {"how": how, "unit": unit, "temperature": temperature, "seed": seed}
        print_json({"name": name, "features": amounts, **facts, "prompt": prompt, **written})
        return
    out = console()
    titles = {"plain": "as it is", "steered": _said(amounts, how, unit)}
    for which, text in written.items():
        out.print(f"\n[bold]{titles[which]}[/bold]")
        out.print(Text.assemble((prompt, "dim"), text))


def _said(amounts: dict[int, float], how: str, unit: str) -> str:
    """What was done, in words."""
    counts = " times its largest activation" if unit == "max_activation" else ""
    said = {
        "add": f"plus {{:g}}{counts}",
        "clamp": f"set to {{:g}}{counts}",
        "scale": "times {:g}",
        "ablate": "set to nothing",
    }[how]
    return ", ".join(f"feature {key} {said.format(amount)}" for key, amount in amounts.items())
