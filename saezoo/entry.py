"""What the registry knows of one published SAE: where its files lie, and the facts that are not in
them.
"""

from pydantic import Field, PositiveFloat, PositiveInt

from saezoo.config import Site, Spec


class Entry(Spec):
    """One SAE that can be fetched. An unknown fact is None."""

    release: str | None = None
    id: str | None = None
    format: str | None = None
    """A key of saezoo.formats.FORMATS; None: the files decide."""
    source: str
    """`hf://org/repo`, an `https://…` folder or file, `bundled:FOLDER` (inside this package), or a
    local path.
    """
    path: str = ""
    """The SAE's folder or file below the source; empty: the source itself."""
    revision: str | None = None
    """Branch, tag or commit of a Hub repo; None is its main branch."""
    sha256: str | dict[str, str] | None = None
    """Of the one file, or by file name."""
    size: int | None = Field(default=None, ge=0)
    """Bytes of all needed files."""
    site: Site | None = None
    out_site: Site | None = None
    d_in: PositiveInt | None = None
    d_sae: PositiveInt | None = None
    k: PositiveInt | None = None
    l0: float | None = None
    variance_explained: float | None = None
    norm_scaling_factor: float | None = None
    """saelens: the factor of expected_average_only_in, which the files do not hold."""
    source_scales: tuple[PositiveFloat, ...] | None = None
    """kissane_crosscoder: what each model's activations are multiplied by before encoding, which
    the files do not hold.
    """
    normalize_activations: str | None = None
    """saelens: what the file should say, where its authors' registry corrects it."""
    skip_identity: bool | None = None
    """prisma: whether the skip of a transcoder is x (1 + W_skip^T), which the files do not say."""
    neuronpedia: str | None = None
    licence: str | None = None
    use_restriction: str | None = None
    """What its authors do not allow, beside the licence, in a few words."""
    gated: bool | None = None
    """True: the Hub gives its files only to who accepted the licence and passes a token."""
    unverified: bool | None = None
    """True: where it lies was seen in other people's code, not in the repo itself."""
    paper: str | None = None
    author: str | None = None
    notes: dict[str, str] | None = None

    @property
    def name(self) -> str:
        """What `load_sae` takes: `release/id`, else the source and path."""
        if self.release and self.id:
            return f"{self.release}/{self.id}"
        at = f"@{self.revision}" if self.revision and self.source.startswith("hf://") else ""
        return f"{self.source}{at}/{self.path}" if self.path else f"{self.source}{at}"

    @property
    def model(self) -> str | None:
        """HuggingFace id of the host model."""
        return self.site.model if self.site else None

    @property
    def layer(self) -> int | None:
        """Layer of the input site."""
        return self.site.layer if self.site else None

    @property
    def width(self) -> int | None:
        """Number of features."""
        return self.d_sae
