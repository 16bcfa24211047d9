"""README.md and saezoo.yaml of a repo that has some already: only what stands between our markers,
and only the rows of our SAEs, are ours to write.
"""

import re
from collections.abc import Sequence
from typing import Any

from saezoo.errors import PublishError, RegistryError
from saezoo.fill import load_plain
from saezoo.publishing.staged import CARD, MANIFEST
from saezoo.stanza import Facts, put_rows, write_release

BEGIN = (
    "<!-- saezoo:begin. `saezoo publish` writes what stands between these marks; "
    "words of your own go above or below. -->"
)
END = "<!-- saezoo:end -->"
FRONT_BEGIN = "# saezoo:begin (keys of your own go above or below)"
FRONT_END = "# saezoo:end"

BODY = re.compile(r"<!-- saezoo:begin\b.*?-->.*?<!-- saezoo:end -->", re.DOTALL)
FRONT = re.compile(r"^# saezoo:begin\b.*?^# saezoo:end *$", re.DOTALL | re.MULTILINE)
MARK = re.compile(r"<!-- saezoo:(?:begin|end)\b")
FRONT_MARK = re.compile(r"^# saezoo:(?:begin|end)\b", re.MULTILINE)
BLOCK = re.compile(r"\A(\s*---[ \t]*\r?\n)(.*?)((?:^|(?<=\n))---[ \t]*(?:\r?\n|\Z))", re.DOTALL)
"""Front matter: opening line, text, closing line."""


def merge_card(existing: str | None, front: dict[str, Any], body: str) -> str:
    """README.md with our front matter and text between our markers; all else as it was.

    A key of the front matter that stands outside our markers is the author's, and ours is left out.
    Raises PublishError where the markers do not pair, or the front matter is none.
    """
    existing = existing or ""
    eol = "\r\n" if "\r\n" in existing else "\n"
    block = BLOCK.match(existing)
    head, text = (block[2], existing[block.end() :]) if block else ("", existing)
    head = _front(head.replace("\r\n", "\n"), front).replace("\n", eol)
    opening, closing = (block[1], block[3]) if block else (f"---{eol}", f"---{eol}")
    made = f"{BEGIN}\n\n{body.strip()}\n\n{END}".replace("\n", eol)
    text = _put(text, made, BODY, MARK, eol)
    merged = f"{opening}{head}{closing}{text}"
    _refuse_bad_card(merged)
    return merged


def has_our_text(readme: str) -> bool:
    """Whether a README is one that saezoo wrote into."""
    return BODY.search(readme) is not None


def _front(head: str, front: dict[str, Any]) -> str:
    if (
        len(FRONT_MARK.findall(head)) != 2 * len(FRONT.findall(head))
        or len(FRONT.findall(head)) > 1
    ):
        raise PublishError(f"{CARD}: its marks `# saezoo:begin` and `# saezoo:end` do not pair")
    theirs = _yaml(FRONT.sub("", head))
    from huggingface_hub import ModelCardData

    ours = ModelCardData(**{key: value for key, value in front.items() if key not in theirs})
    words = ours.to_yaml() if ours.to_dict() else ""
    made = f"{FRONT_BEGIN}\n{words}\n{FRONT_END}" if words else f"{FRONT_BEGIN}\n{FRONT_END}"
    if FRONT.search(head):
        return FRONT.sub(lambda _: made, head)
    start = head if head.endswith("\n") or not head else f"{head}\n"
    return f"{start}{made}\n"


def _put(text: str, made: str, where: re.Pattern[str], mark: re.Pattern[str], eol: str) -> str:
    found = where.findall(text)
    if len(mark.findall(text)) != 2 * len(found) or len(found) > 1:
        raise PublishError(
            f"{CARD}: its marks `<!-- saezoo:begin … -->` and `{END}` do not pair: mend them, or "
            "take them out with what stands between"
        )
    if found:
        return where.sub(lambda _: made, text)
    kept = text.rstrip()
    return f"{text[: len(kept)]}{eol * 2}{made}{eol}" if kept else f"{eol}{made}{eol}"


def _yaml(text: str) -> dict[str, object]:
    import yaml

    try:
        found = yaml.safe_load(text)
    except yaml.YAMLError as error:
        problem = " ".join(str(getattr(error, "problem", error)).split())
        raise PublishError(f"{CARD}: its front matter is not YAML ({problem})") from None
    if found is not None and not isinstance(found, dict):
        raise PublishError(f"{CARD}: its front matter is no mapping")
    return found or {}


def _refuse_bad_card(text: str) -> None:
    """What huggingface_hub makes of it: raises PublishError where that is nothing."""
    import yaml
    from huggingface_hub import ModelCard

    try:
        ModelCard(text)
    except (yaml.YAMLError, ValueError, TypeError) as error:
        raise PublishError(f"{CARD}: no model card ({' '.join(str(error).split())})") from None


def merge_manifest(existing: str | None, release: str, about: str, rows: Sequence[Facts]) -> str:
    """saezoo.yaml with our rows; the name, the prose and the rows of others as they were.

    Raises PublishError where an id of ours is that of an SAE at another path, or the file is not
    one that rows can be put into.
    """
    if existing is None:
        return write_release(release, about, rows)
    try:
        listed = load_plain(existing, MANIFEST).get("saes") or []
        if not isinstance(listed, list) or not all(isinstance(row, dict) for row in listed):
            raise RegistryError(f"{MANIFEST}: its `saes` is no list of rows")
        paths = {row.get("id"): row.get("path", "") for row in listed}
        for row in rows:
            if row["id"] in paths and paths[row["id"]] != row.get("path", ""):
                raise PublishError(
                    f"{MANIFEST}: the id {row['id']!r} is that of {paths[row['id']]!r} there: "
                    "choose another with --path"
                )
        return put_rows(existing, rows, MANIFEST)
    except RegistryError as error:
        raise PublishError(f"the {MANIFEST} that is there: {error}") from None
