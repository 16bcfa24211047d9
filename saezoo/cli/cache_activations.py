"""`saezoo cache-activations MODEL`"""

from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from saezoo.cli._print import HELP, console, human_bytes, json_option, print_json

if TYPE_CHECKING:
    from saezoo.config import SAEConfig, Site, TokenRule
    from saezoo.shards import ShardIndex


@click.command("cache-activations", context_settings=HELP)
@click.argument("model")
@click.option("--sae", "name", help="The site and token rule of this SAE.")
@click.option("--layer", type=click.IntRange(min=0), help="A layer, counted from 0.")
@click.option(
    "--site",
    help="A point such as resid_post (with --layer), a module such as model.layers.15 or "
    "model.layers.15.mlp.input, or a hook name. [default: resid_post]",
)
@click.option(
    "--dataset",
    required=True,
    help="A .jsonl, .txt or .parquet file, a folder of them, or a dataset of the Hub.",
)
@click.option("--column", default="text", show_default=True, help="Where the dataset has its text.")
@click.option("--split", default="train", show_default=True, help="Of a dataset of the Hub.")
@click.option("--subset", help="Of a dataset of the Hub.")
@click.option("--tokens", type=click.IntRange(min=1), required=True, help="How many to keep.")
@click.option(
    "--out",
    required=True,
    type=click.Path(file_okay=False, path_type=Path),
    help="The folder to write: a new one, or where the same command was interrupted.",
)
@click.option("--context", type=click.IntRange(min=1), help="Tokens a context. [default: 256]")
@click.option("--batch", default=8, show_default=True, type=click.IntRange(min=1), help="Contexts.")
@click.option("--bos/--no-bos", default=None, help="Whether BOS begins each context.")
@click.option(
    "--skip-first",
    type=click.IntRange(min=0),
    help="Positions left out at the start of each context. [default: 1]",
)
@click.option(
    "--dtype",
    type=click.Choice(["float16", "bfloat16", "float32"]),
    default="float16",
    show_default=True,
    help="Of the file.",
)
@click.option("--shard", default=131_072, show_default=True, help="Tokens a shard.")
@json_option
def cache_activations(
    model: str, dataset: str, tokens: int, out: Path, as_json: bool, **told: Any
) -> None:
    """Keep the activations of a language model at one site as shards on disk, for training. The
    disk it needs is shown first. Interrupted, the same command goes on where it was.

    \b
    Example: saezoo cache-activations HuggingFaceTB/SmolLM2-135M-Instruct --layer 15 \\
                 --dataset ./texts --tokens 1000000 --out ./acts
             saezoo cache-activations google/gemma-2-2b --sae gemma-scope-2b-pt-res/… \\
                 --dataset monology/pile-uncopyrighted --tokens 10000000 --out ./acts
    """
    from rich.progress import (
        BarColumn,
        MofNCompleteColumn,
        Progress,
        TextColumn,
        TimeRemainingColumn,
    )

    from saezoo.cache_activations import plan_cache, write_cache
    from saezoo.documents import read_documents
    from saezoo.guard import check_host
    from saezoo.host import load_host

    site, rule, cfg = _what(model, told)
    screen = console(err=True)
    with screen.status("loading the language model"):
        host = load_host(model)
    screen.print(f"model: {host.took}", style="dim", markup=False)
    source = {key: told[key] for key in ("column", "split", "subset") if told[key] is not None}
    if cfg is not None:
        check_host(host.model, cfg, tokenizer=host.tokenizer)
    plan = plan_cache(
        host.model,
        site,
        rule,
        out,
        tokens,
        context=told["context"],
        batch_size=told["batch"],
        shard_tokens=told["shard"],
        dtype=told["dtype"],
        facts={"model": host.took, "dataset": dataset, **source},
    )
    there = f", {plan.index.tokens:,} of them there already" if plan.index.tokens else ""
    to_do = (
        "nothing is left to do"
        if plan.index.complete
        else f"{human_bytes(plan.needed)} to be written to {out}, where "
        f"{human_bytes(plan.free)} are free"
    )
    screen.print(f"{tokens:,} tokens of {plan.index.d} numbers{there}: {to_do}", markup=False)
    columns = (TextColumn("tokens"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*columns, console=screen, transient=True, disable=not screen.is_terminal) as bar:
        task = bar.add_task("", total=tokens, completed=plan.index.tokens)
        index = write_cache(
            host.model,
            host.tokenizer,
            read_documents(dataset, **source),
            out,
            plan,
            progress=lambda done: bar.update(task, completed=done),
        )
    _print(index, out, tokens, as_json)


def _what(model: str, told: dict[str, Any]) -> "tuple[Site, TokenRule, SAEConfig | None]":
    """The site and rule that the options name, and the SAE's spec if they name one."""
    from saezoo.capture import DEFAULT_RULE
    from saezoo.load import load_sae, need_sae

    name, layer, where = told["name"], told["layer"], told["site"]
    if (name is None) == (layer is None and where is None):
        raise click.UsageError("give --sae, or --layer and --site")
    if name is not None:
        cfg: SAEConfig | None = need_sae(load_sae(name), name, "saezoo cache-activations").cfg
        assert cfg is not None
        if cfg.site is None:
            raise click.UsageError(f"{name} does not say which site it reads: give --layer, --site")
        site, rule = cfg.site, cfg.tokens or DEFAULT_RULE
    else:
        cfg, site, rule = None, _site(model, layer, where or "resid_post"), DEFAULT_RULE
    options = {
        "prepend_bos": told["bos"],
        "skip_first": told["skip_first"],
        "context": told["context"],
    }
    kept = {key: value for key, value in options.items() if value is not None}
    return site, rule.model_copy(update=kept), cfg


def _site(model: str, layer: int | None, where: str) -> "Site":
    """A point with its layer, a hook of TransformerLens, or a module."""
    from typing import get_args

    from saezoo.config import Point, Site
    from saezoo.formats._hooks import module_and_side, site_of_hook

    if where in get_args(Point):
        if layer is None and where != "embed":
            raise click.UsageError(f"--site {where} needs --layer")
        return Site.model_validate({"model": model, "layer": layer, "point": where})
    if layer is not None:
        raise click.UsageError(
            f"--layer goes with --site of {', '.join(get_args(Point))}; {where} has its own"
        )
    if "hook_" in where:
        return site_of_hook(where, model)
    module, side = module_and_side(where)
    return Site(model=model, module=module, side=side)


def _print(index: "ShardIndex", out: Path, tokens: int, as_json: bool) -> None:
    from saezoo.capture import Dropped

    dropped = Dropped(**index.dropped)
    if as_json:
        facts = index.model_dump(mode="json", exclude={"shards"}, exclude_none=True)
        print_json(
            {"folder": str(out), "tokens": index.tokens, "shards": len(index.shards)} | facts
        )
        return
    shards = f"{len(index.shards)} shard{'s' if len(index.shards) > 1 else ''}"
    click.echo(
        f"{out}: {index.tokens:,} tokens of {index.d} numbers, {index.dtype}, in {shards}, from "
        f"{index.documents:,} documents"
    )
    beyond = dropped.kept - index.tokens
    click.echo(f"{dropped}" + (f"; the last {beyond:,} were not needed" if beyond > 0 else ""))
    if index.tokens < tokens:
        click.echo(f"the dataset ended before {tokens:,} tokens were kept")
