"""Turn what a person typed into a name of one of four kinds. No files are read here."""

import os
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Literal
from urllib.parse import urlsplit

from saezoo.errors import BadName

ZOO: Literal["zoo"] = "zoo"
"""What names of zoos pinned on this machine start with."""


@dataclass(frozen=True)
class Name:
    """A name that has been read: which kind it is, and its parts."""

    kind: Literal["registry", "hub", "https", "local", "zoo", "manifest"]
    release: str = ""
    id: str | None = None
    repo: str = ""
    revision: str | None = None
    path: str = ""
    url: str = ""
    source: str = ""
    """Of a manifest: what stands before the #."""

    def __str__(self) -> str:
        if self.kind == "manifest":
            return f"{self.source}#{self.id}"
        if self.kind == "zoo":
            return f"zoo/{self.release}" if self.id is None else f"zoo/{self.release}/{self.id}"
        if self.kind == "registry":
            return self.release if self.id is None else f"{self.release}/{self.id}"
        if self.kind == "hub":
            at = f"@{self.revision}" if self.revision else ""
            return f"hf://{self.repo}{at}" + (f"/{self.path}" if self.path else "")
        return self.url if self.kind == "https" else self.path


def parse_name(
    name: str | os.PathLike[str],
    id: str | None = None,  # noqa: A002 the name that SAELens' users know
    *,
    revision: str | None = None,
) -> Name:
    """Read a name: `release/id` (or release and id apart), `zoo/release/id` of a pinned zoo,
    `hf://org/repo[@rev]/path`, `https://…`, a local folder or file (`./…`, absolute, `~`, or a path
    object), or `source#id`, an id of the saezoo.yaml that lies at a source.

    Raises BadName, saying how to write it instead.
    """
    if isinstance(name, os.PathLike):
        _refuse_id(name, id)
        return Name("local", path=str(Path(name)))
    _refuse_bad_characters(name)
    if id is not None:
        _refuse_bad_characters(id)
    if "#" in name:
        _refuse_id(name, id)
        return _parse_manifest(name, revision)
    if name.startswith(("./", "/", "~", ".\\")) or name == "." or re.match(r"[A-Za-z]:[\\/]", name):
        _refuse_id(name, id)
        if ".." in re.split(r"[\\/]", name):
            raise BadName(f"{name!r} has '..' in it: give the absolute path")
        return Name("local", path=str(Path(name).expanduser()))
    for text in (name, id or ""):
        if ".." in re.split(r"[\\/]", text):
            raise BadName(f"{text!r} has '..' in it: for a local folder give the absolute path")
        if "\\" in text:
            raise BadName(f"{text!r} has a backslash in it: write / (and ./… for a local folder)")
    scheme, colons, _ = name.partition("://")
    if colons:
        _refuse_id(name, id)
        return _parse_url(name, scheme.lower(), revision)
    return _parse_registry(name, id, revision)


def _parse_manifest(name: str, revision: str | None) -> Name:
    """`hf://org/repo[@rev]#id`, `https://…#id` or `./folder#id`."""
    source, _, chosen = name.rpartition("#")
    if not source or not chosen or ".." in re.split(r"[\\/]", chosen):
        raise BadName(f"{name!r}: write source#id, such as hf://org/repo#layer_3")
    base = parse_name(source, revision=revision)
    if base.kind == "hub":
        if base.path:
            raise BadName(f"{name!r}: a saezoo.yaml lies at a repo's root: hf://org/repo#{chosen}")
        at = f"@{base.revision}" if base.revision else ""
        return Name("manifest", id=chosen, source=f"hf://{base.repo}{at}")
    if base.kind not in ("https", "local"):
        raise BadName(f"{name!r}: only hf://…, https://… and folders have ids after a #")
    return Name("manifest", id=chosen, source=str(base))


def _parse_url(name: str, scheme: str, revision: str | None) -> Name:
    parts = urlsplit(name)
    if scheme == "hf" or (parts.hostname or "").removeprefix("www.") in ("huggingface.co", "hf.co"):
        return _parse_hub(name, revision)
    if scheme == "https" or (scheme == "http" and parts.hostname in ("127.0.0.1", "localhost")):
        if revision is not None:
            raise BadName(f"{name}: only Hub repos have revisions, not {revision!r}")
        return Name("https", url=name)
    if scheme == "http":
        raise BadName(f"{name}: plain http can be changed on its way: use https")
    raise BadName(f"{name}: unknown scheme {scheme!r}. Write hf://org/repo/path, https://… or ./…")


def _parse_hub(name: str, revision: str | None) -> Name:
    from huggingface_hub.errors import HfUriError
    from huggingface_hub.utils import parse_hf_uri

    try:
        uri = parse_hf_uri(name)
    except HfUriError as error:
        reason = " ".join(str(error).split())
        raise BadName(f"{name}: not hf://org/repo[@revision]/path ({reason})") from None
    if uri.type != "model":
        raise BadName(f"{name}: SAEs are in model repos, this is a {uri.type}")
    if revision is not None and uri.revision not in (None, revision):
        raise BadName(f"{name}: names revision {uri.revision}, but revision={revision!r} is given")
    return Name(
        "hub", repo=uri.id, revision=uri.revision or revision, path=uri.path_in_repo.strip("/")
    )


def _parse_registry(name: str, id: str | None, revision: str | None) -> Name:  # noqa: A002
    release, slash, rest = name.partition("/")
    if id is not None and slash:
        raise BadName(f"{name!r} and {id!r}: a release has no slash; give release and id, or one")
    chosen = id if id is not None else (rest if slash else None)
    if not release or chosen == "" or (chosen or "").startswith("/"):
        raise BadName(f"{name!r}: write release/id (`saezoo list` shows both)")
    if release == ZOO:
        inner, slash, rest = (chosen or "").partition("/")
        if not inner or (slash and not rest):
            raise BadName(f"{name!r}: write zoo/release/id (`saezoo zoo list` shows the releases)")
        if revision is not None:
            raise BadName(f"{name!r}: a zoo is pinned at its commit; `saezoo zoo update` moves it")
        return Name(ZOO, release=inner, id=rest or None)
    return Name("registry", release=release, id=chosen, revision=revision)


def _refuse_bad_characters(text: str) -> None:
    if not isinstance(text, str):
        raise BadName(f"a name is a string or a path, not {type(text).__name__}")
    if not text or text != text.strip():
        raise BadName(f"{text!r} is empty or has spaces around it: write release/id")
    if any(ord(letter) < 32 or ord(letter) == 127 for letter in text):
        raise BadName(f"{text!r} has control characters in it")


def _refuse_id(name: object, id: str | None) -> None:  # noqa: A002
    if id is not None:
        raise BadName(f"{name} is a whole name by itself, so no id ({id!r}) goes with it")
