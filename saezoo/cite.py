"""BibTeX for an SAE: the paper it is from, where that is known, and the weights themselves."""

import os
import re
from dataclasses import dataclass
from urllib.parse import quote, urlsplit, urlunsplit

from saezoo import __version__
from saezoo.entry import Entry
from saezoo.find import find_sae
from saezoo.formats import match_file
from saezoo.names import Name, parse_name
from saezoo.registry import read_release

ARXIV = re.compile(
    r"https?://(?:www\.)?arxiv\.org/(?:abs|pdf)/"
    r"(\d{4}\.\d{4,5}|[a-z-]+(?:\.[A-Z]{2})?/\d{7})(?:v\d+)?(?:\.pdf)?/?"
)
"""An arXiv URL and, as its group, the id without a version."""

LATEX = {
    "\\": r"\textbackslash{}",
    "~": r"\textasciitilde{}",
    "^": r"\textasciicircum{}",
    **{sign: f"\\{sign}" for sign in "&%$#_{}"},
}


URL_SIGNS = "/:?#[]@!$&'()*+,;=%~"
"""Signs that stay in a URL; braces and backslashes would end the field."""


@dataclass(frozen=True)
class Paper:
    """What a bibliography says of a paper."""

    key: str
    title: str
    authors: tuple[str, ...]
    """Last name, first name."""
    year: int


PAPERS: dict[str, Paper] = {
    "https://arxiv.org/abs/2406.04093": Paper(
        "gao2024scaling",
        "Scaling and evaluating sparse autoencoders",
        (
            "Gao, Leo",
            "Dupré la Tour, Tom",
            "Tillman, Henk",
            "Goh, Gabriel",
            "Troll, Rajan",
            "Radford, Alec",
            "Sutskever, Ilya",
            "Leike, Jan",
            "Wu, Jeffrey",
        ),
        2024,
    ),
    "https://arxiv.org/abs/2408.05147": Paper(
        "lieberum2024gemma",
        "Gemma Scope: Open Sparse Autoencoders Everywhere All At Once on Gemma 2",
        (
            "Lieberum, Tom",
            "Rajamanoharan, Senthooran",
            "Conmy, Arthur",
            "Smith, Lewis",
            "Sonnerat, Nicolas",
            "Varma, Vikrant",
            "Kramár, János",
            "Dragan, Anca",
            "Shah, Rohin",
            "Nanda, Neel",
        ),
        2024,
    ),
    "https://arxiv.org/abs/2410.20526": Paper(
        "he2024llama",
        "Llama Scope: Extracting Millions of Features from Llama-3.1-8B with Sparse Autoencoders",
        (
            "He, Zhengfu",
            "Shu, Wentao",
            "Ge, Xuyang",
            "Chen, Lingjie",
            "Wang, Junxuan",
            "Zhou, Yunhua",
            "Liu, Frances",
            "Guo, Qipeng",
            "Huang, Xuanjing",
            "Wu, Zuxuan",
            "Jiang, Yu-Gang",
            "Qiu, Xipeng",
        ),
        2024,
    ),
    "https://www.lesswrong.com/posts/FSTRedtjuHa4Gfdbr/attention-saes-scale-to-gpt-2-small": Paper(
        "kissane2024attention",
        "Attention SAEs Scale to GPT-2 Small",
        ("Kissane, Connor", "Krzyzanowski, Robert", "Conmy, Arthur", "Nanda, Neel"),
        2024,
    ),
    "https://www.lesswrong.com/posts/f9EgfLSurAiqRJySD/"
    "open-source-sparse-autoencoders-for-all-residual-stream": Paper(
        "bloom2024open",
        "Open Source Sparse Autoencoders for all Residual Stream Layers of GPT2-Small",
        ("Bloom, Joseph",),
        2024,
    ),
}
"""The papers that the registry names, by URL. One that is not here is cited by its URL alone."""


@dataclass(frozen=True)
class Citation:
    """One BibTeX entry."""

    of: str
    """`paper` or `weights`."""
    key: str
    fields: dict[str, str]
    """As text, without LaTeX's escapes."""

    def to_bibtex(self) -> str:
        """The entry as BibTeX, in UTF-8."""
        lines = [f"  {name} = {{{_written(name, text)}}}," for name, text in self.fields.items()]
        return "\n".join([f"@misc{{{self.key},", *lines, "}"])

    def to_json(self) -> dict[str, object]:
        """As plain values, with the BibTeX."""
        facts: dict[str, object] = {"of": self.of, "key": self.key, "fields": self.fields}
        return facts | {"bibtex": self.to_bibtex()}


def cite_sae(
    name: str | os.PathLike[str], *, cache_dir: str | os.PathLike[str] | None = None
) -> list[Citation]:
    """What to cite for an SAE, by any kind of name: its paper if one is known, then its weights.
    Nothing is fetched, but for `source#id`. Raises what `find_sae` does.
    """
    parsed = parse_name(name)
    entry = find_sae(parsed, cache_dir=cache_dir)
    about = _about(parsed, entry, cache_dir)
    papers = [_cite_paper(entry.paper)] if entry.paper else []
    return [*papers, _cite_weights(entry, about)]


def _cite_paper(url: str) -> Citation:
    found = ARXIV.fullmatch(url)
    paper = PAPERS.get(f"https://arxiv.org/abs/{found[1]}" if found else url)
    fields: dict[str, str] = {}
    if paper:
        fields = {
            "title": paper.title,
            "author": " and ".join(paper.authors),
            "year": str(paper.year),
        }
    if found:
        fields |= {"eprint": found[1], "archivePrefix": "arXiv"}
    key = paper.key if paper else _key(f"arxiv {found[1]}" if found else url.rpartition("//")[2])
    place = "url" if url.startswith(("https://", "http://")) else "howpublished"
    return Citation("paper", key, fields | {place: url})


def _cite_weights(entry: Entry, about: str | None) -> Citation:
    fields = {"title": _without_query(entry.name)}
    if entry.author:
        fields["author"] = entry.author
    fields["howpublished"] = _published(entry)
    said = [about, f"Licence: {entry.licence}" if entry.licence else None]
    if notes := [text.rstrip(".") for text in said if text]:
        fields["note"] = ". ".join(notes)
    return Citation("weights", _key(_without_query(entry.name)), fields)


def _published(entry: Entry) -> str:
    """The URL where the weights are, at their revision if one is stated; else where, in words."""
    path = entry.path.strip("/")
    if entry.source.startswith("hf://"):
        page = f"https://huggingface.co/{entry.source.removeprefix('hf://').strip('/')}"
        if not (path or entry.revision):
            return page
        kind = "blob" if match_file(path) else "tree"
        place = f"{page}/{kind}/{quote(entry.revision or 'main', safe='')}"
        return f"{place}/{quote(path)}" if path else place
    if entry.source.startswith(("https://", "http://")):
        url = _without_query(entry.source).rstrip("/")
        return f"{url}/{quote(path)}" if path else url
    if entry.source.startswith("bundled:"):
        return f"in the Python package saezoo {__version__}"
    return "local files"


def _about(name: Name, entry: Entry, cache_dir: str | os.PathLike[str] | None) -> str | None:
    """What the release says of itself, where it is one that can be read here."""
    if name.kind == "registry":
        return read_release(str(entry.release)).about
    if name.kind == "zoo":
        from saezoo.zoo import list_zoos

        pins = [pin for pin in list_zoos(cache_dir) if pin.release == name.release]
        return pins[0].parse().about if pins else None
    return None


def _written(name: str, text: str) -> str:
    """A field as LaTeX reads it."""
    is_url = text.startswith(("https://", "http://"))
    if is_url and name in ("url", "howpublished"):
        url = quote(text, safe=URL_SIGNS)
        return url if name == "url" else rf"\url{{{url}}}"
    escaped = "".join(LATEX.get(sign, sign) for sign in " ".join(text.split()))
    if name == "author":
        return " and ".join(_person(person) for person in escaped.split(" and "))
    # braces keep a title's capitals
    return f"{{{escaped}}}" if name == "title" else escaped


def _person(name: str) -> str:
    """`Last, First` with its last name in one piece; any other name is no person's, and whole."""
    last, comma, first = name.partition(", ")
    if not comma:
        return f"{{{name}}}"
    return f"{{{last}}}, {first}" if " " in last else name


def _key(text: str) -> str:
    """A BibTeX key: letters, digits and hyphens of a name."""
    return re.sub(r"[^A-Za-z0-9.]+", "-", text).strip("-.").lower() or "sae"


def _without_query(url: str) -> str:
    """A URL without its query, which may hold a signature; any other text as it is."""
    if not url.startswith(("https://", "http://")):
        return url
    parts = urlsplit(url)
    return urlunsplit((parts.scheme, parts.netloc.rpartition("@")[2], parts.path, "", ""))
