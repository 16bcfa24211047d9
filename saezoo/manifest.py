"""A stranger's `saezoo.yaml`, read as data and nothing else: what it may say, and what is taken out
of it.

A manifest has the schema of registry/README.md. Beside that: at most 1 MB, no anchors, tags or
documents inside documents, nesting of at most 16; sources only its own repo or folder, a Hub repo
at a commit, or https with a sha256 for every SAE.
"""

import ipaddress
import re
import unicodedata
from typing import Any
from urllib.parse import urlsplit

from saezoo.entry import Entry
from saezoo.errors import RegistryError
from saezoo.places import compose_yaml, lines_of_ids, located, place_of
from saezoo.registry import Release, expand, parse_release

FILE = "saezoo.yaml"
MAX_BYTES = 2**20
MAX_DEPTH = 16
PROSE = ("about", "licence", "author", "notes")
"""Keys whose texts are for people: markup and control characters are taken out of them."""

MARKUP = re.compile(r"<[^<>]*>|\[/?[a-z#@!][^\[\]]*\]", re.IGNORECASE)
"""HTML tags, and what a terminal library would read as style."""

COMMIT = re.compile(r"[0-9a-f]{40}")


def read_manifest(data: bytes, where: str, home: str, commit: str | None = None) -> Release:
    """A manifest's release, its sources written out and found lawful, its prose cleaned.

    where: how errors call the file. home: the source that entries without one have (hf://org/repo,
    the URL's folder, or a local folder); commit: the revision of home that the manifest is from.
    Raises RegistryError in one line with file and line.
    """
    text = _decoded(data, where)
    _refuse_structure(text, where)
    release = parse_release(text, where)
    tree = compose_yaml(text)
    _refuse_signs(tree, where)
    lines = lines_of_ids(tree)
    release = _clean(_at_home(release, home, commit))
    try:
        entries = expand(release, where)
    except RegistryError as error:
        raise RegistryError(located(str(error), where, lines)) from None
    for entry in entries.values():
        _refuse_source(entry, home, f"{place_of(where, entry.id or '', lines)}: {entry.id}")
    for pattern in release.open:
        # a pattern is as bound as a row: tried with one entry
        facts = release.shared | pattern.facts
        shown = {
            key: facts[key] for key in ("source", "revision", "sha256", "path") if key in facts
        }
        at = f"{place_of(where, pattern.id, lines)}: {pattern.id}"
        _refuse_source(Entry.model_validate({"id": pattern.id} | shown), home, at)
    return release


def _decoded(data: bytes, where: str) -> str:
    if len(data) > MAX_BYTES:
        raise RegistryError(f"{where}: {len(data):,} bytes; a manifest has at most {MAX_BYTES:,}")
    try:
        return data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = data[: error.start].count(b"\n") + 1
        raise RegistryError(f"{where}, line {line}: not UTF-8") from None


def _refuse_structure(text: str, where: str) -> None:
    """Look at the tokens alone, before anything is built from them."""
    import yaml

    opening = (
        yaml.BlockMappingStartToken,
        yaml.BlockSequenceStartToken,
        yaml.FlowMappingStartToken,
        yaml.FlowSequenceStartToken,
    )
    closing = (yaml.BlockEndToken, yaml.FlowMappingEndToken, yaml.FlowSequenceEndToken)
    banned = {
        yaml.AnchorToken: "anchors",
        yaml.AliasToken: "aliases",
        yaml.TagToken: "tags",
        yaml.DirectiveToken: "directives",
    }
    depth = 0
    try:
        for token in yaml.scan(text, getattr(yaml, "CSafeLoader", yaml.SafeLoader)):
            line = token.start_mark.line + 1
            if type(token) in banned:
                raise RegistryError(
                    f"{where}, line {line}: {banned[type(token)]} are not allowed in a manifest"
                )
            depth += isinstance(token, opening) - isinstance(token, closing)
            if depth > MAX_DEPTH:
                raise RegistryError(f"{where}, line {line}: nested more than {MAX_DEPTH} deep")
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        line = f", line {mark.line + 1}" if mark else ""
        problem = " ".join(str(getattr(error, "problem", error)).split())
        raise RegistryError(f"{where}{line}: not YAML ({problem})") from None


def _refuse_signs(node: Any, where: str, key: str = "") -> None:
    """Refuse control and direction signs in whatever is a name, a path or a number."""
    if isinstance(node.value, str):
        if _visible(node.value) != node.value:
            raise RegistryError(
                f"{where}, line {node.start_mark.line + 1}: {key} {_visible(node.value)[:60]!r} "
                "holds control characters"
            )
        return
    for item in node.value:
        name, below = item if isinstance(item, tuple) else (None, item)
        if name is not None:
            _refuse_signs(name, where, "the key")
        if name is None or name.value not in PROSE:
            _refuse_signs(below, where, key if name is None else str(name.value))


def _visible(value: str) -> str:
    """A string without control, direction and other signs that nobody sees."""
    return "".join(sign for sign in value if unicodedata.category(sign) not in ("Cc", "Cf", "Cs"))


def _clean(release: Release) -> Release:
    """The release with prose that neither a terminal nor a page can be led astray by."""

    def cleaned(value: Any, prose: bool) -> Any:
        if isinstance(value, dict):
            return {name: cleaned(item, prose or name in PROSE) for name, item in value.items()}
        if isinstance(value, list):
            return [cleaned(item, prose) for item in value]
        if prose and isinstance(value, str):
            return MARKUP.sub("", _visible(value.replace("\n", " "))).strip()
        return value

    return Release.model_validate(cleaned(release.model_dump(), False))


def _at_home(release: Release, home: str, commit: str | None) -> Release:
    """The release with every source written out: its own repo at the manifest's commit where none
    is given, and the commit of another apart from its name.
    """

    def placed(facts: dict[str, Any]) -> dict[str, Any]:
        if "source" not in facts:
            # in the manifest's own repo nothing leaves the commit that the manifest is from
            own = release.shared.get("source", home) == home
            return {key: facts[key] for key in facts if not (own and key == "revision")}
        source, pinned = _split_commit(str(facts["source"]))
        # a row's own source never takes the commit of the repo that the others are in
        revision = commit if source == home else pinned or facts.get("revision")
        on_hub = source.startswith("hf://")
        return facts | {"source": source, "revision": (revision or "main") if on_hub else None}

    return Release.model_validate(
        release.model_dump()
        | {
            "shared": placed({"source": home} | release.shared),
            "saes": [placed(row) for row in release.saes],
            "families": [
                family.model_dump() | {"facts": placed(family.facts)} for family in release.families
            ],
            "open": [
                pattern.model_dump() | {"facts": placed(pattern.facts)} for pattern in release.open
            ],
            # else a branch here would win over the commit that the manifest is pinned at
            "files": {
                id: facts.model_dump(exclude={"revision"}) for id, facts in release.files.items()
            },
        }
    )


def _split_commit(source: str) -> tuple[str, str | None]:
    """(hf://org/repo, commit) of hf://org/repo@commit."""
    found = re.fullmatch(r"(hf://[\w.-]+/[\w.-]+)@([0-9a-f]{40})", source)
    return (found[1], found[2]) if found else (source, None)


def _refuse_source(entry: Entry, home: str, at: str) -> None:
    """Raise RegistryError unless the files of `entry` come from where a manifest may send us."""
    source = entry.source
    if ".." in entry.path.split("/") or entry.path.startswith("/"):
        raise RegistryError(f"{at}: the path {entry.path!r} leaves its source")
    if source.startswith("https://"):
        refuse_private(source, at)
        if entry.sha256 is None:
            raise RegistryError(f"{at}: an https source needs a sha256")
    elif source.startswith("hf://"):
        if source != home and not COMMIT.fullmatch(entry.revision or ""):
            raise RegistryError(f"{at}: another repo than {home} needs a commit: hf://…@<40 hex>")
    elif source != home or "://" in source:
        raise RegistryError(
            f"{at}: the source {source!r} is not allowed; there are the manifest's own repo, "
            "hf://org/repo@commit, and https:// with sha256"
        )


def refuse_private(url: str, at: str) -> None:
    """Raise RegistryError for a host that is this machine's or its network's own by its name."""
    host = (urlsplit(url).hostname or "").rstrip(".").lower()
    private = host == "localhost" or host.endswith((".localhost", ".local", ".internal", ".lan"))
    try:
        private = not ipaddress.ip_address(host).is_global
    except ValueError:
        # a bare word or a number in another spelling is no public name either
        private = private or "." not in host or re.fullmatch(r"[0-9a-fx.]+", host) is not None
    if private or urlsplit(url).username:
        raise RegistryError(f"{at}: {host or url!r} is no public host")
