"""`saezoo zoo …`: collections that their authors keep, pinned on this machine."""

import click

from saezoo.cli._print import (
    HELP,
    cache_option,
    json_option,
    offline_option,
    print_json,
    print_table,
)


@click.group(context_settings=HELP)
def zoo() -> None:
    """Collections by their authors: a repo's saezoo.yaml, pinned on this machine as zoo/RELEASE.

    \b
    Example: saezoo zoo add hf://org/repo
             saezoo zoo list
    """


@zoo.command(context_settings=HELP)
@click.argument("source")
@cache_option
@offline_option
@json_option
def add(source: str, cache_dir: str | None, offline: bool, as_json: bool) -> None:
    """Read the saezoo.yaml at SOURCE (hf://org/repo[@revision], an https URL, or a folder) and pin
    it.

    \b
    Example: saezoo zoo add hf://org/repo
    """
    from saezoo.zoo import Terms, add_zoo

    pin = add_zoo(source, Terms(cache_dir=cache_dir, local_files_only=offline))
    release = pin.parse()
    count = _count(release)
    if as_json:
        print_json(_facts(pin))
        return
    click.echo(f"zoo/{pin.release}: {count} from {pin.source}{_at(pin.commit)}")
    click.echo(f"  {release.about}")
    click.echo(f"see them: saezoo list zoo/{pin.release}")


@zoo.command(name="list", context_settings=HELP)
@cache_option
@json_option
def list_(cache_dir: str | None, as_json: bool) -> None:
    """List the zoos that are pinned on this machine.

    \b
    Example: saezoo zoo list
    """
    from saezoo.errors import RegistryError
    from saezoo.zoo import list_zoos

    pins = list_zoos(cache_dir)
    if as_json:
        print_json([_facts(pin) for pin in pins])
        return
    if not pins:
        click.echo("no zoo is pinned; `saezoo zoo add hf://org/repo` pins one")
        return
    rows = []
    for pin in pins:
        try:
            count = _count(pin.parse())
        except RegistryError as error:
            count = f"broken: {error}"
        rows.append((f"zoo/{pin.release}", count, pin.source, (pin.commit or "")[:8], pin.read))
    print_table(["name", "holds", "from", "commit", "read"], rows)


@zoo.command(context_settings=HELP)
@click.argument("releases", nargs=-1, metavar="[RELEASE…]")
@cache_option
@json_option
def update(releases: tuple[str, ...], cache_dir: str | None, as_json: bool) -> None:
    """Read pinned zoos again; one that cannot be read, or is broken now, stays as it was.

    \b
    Example: saezoo zoo update
    """
    import sys

    from saezoo.zoo import Terms, update_zoos

    changes = update_zoos([_bare(name) for name in releases], Terms(cache_dir=cache_dir))
    if as_json:
        print_json(
            [
                _facts(row.pin) | {"added": row.added, "removed": row.removed, "error": row.error}
                for row in changes
            ]
        )
    else:
        for row in changes:
            said = row.error and f"kept as it was: {row.error}"
            said = said or f"{len(row.added)} new, {len(row.removed)} gone{_at(row.pin.commit)}"
            click.echo(f"zoo/{row.pin.release}: {said}")
    if any(row.error for row in changes):
        sys.exit(1)


@zoo.command(context_settings=HELP)
@click.argument("release")
@cache_option
def remove(release: str, cache_dir: str | None) -> None:
    """Forget the zoo called RELEASE. Files that were fetched stay in the cache.

    \b
    Example: saezoo zoo remove my-saes
    """
    from saezoo.zoo import remove_zoo

    pin = remove_zoo(_bare(release), cache_dir)
    click.echo(f"zoo/{pin.release} is forgotten; it came from {pin.source}")


def _bare(name: str) -> str:
    return name.removeprefix("zoo/")


def _at(commit: str | None) -> str:
    return f" at {commit[:8]}…" if commit else ""


def _count(release: object) -> str:
    from saezoo.registry import Release, count_of

    assert isinstance(release, Release)
    return count_of(release)


def _facts(pin: object) -> dict[str, object]:
    """A pin without the manifest's text."""
    facts = {key: value for key, value in vars(pin).items() if key != "text"}
    return facts | {"name": f"zoo/{facts['release']}"}
