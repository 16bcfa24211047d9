"""Every error that a person can meet, as one tree.

SaezooError
├── BadName (ValueError)             a name that cannot be read
├── UnknownSAE (LookupError)         a well-formed name that nothing answers to
│   └── AmbiguousName (BadName)      `org/repo`: a release, a repo or a folder?
├── RegistryError (ValueError)       a registry YAML that does not say what it must
├── ConfigError (ValueError)         a spec that contradicts itself or has unknown keys
├── FormatError (ValueError)         files that are not what their format says
│   ├── UnsafeFile                   a file that wants to run code or claims more than it holds
│   └── NotFinite                    weights with NaN or infinity
├── FetchError (OSError)             files that could not be had
│   ├── MissingFile (FileNotFoundError)  there is no such file, repo or revision
│   ├── NoAccess                     the host wants a token, or a licence accepted
│   ├── Offline                      not cached, and no network wanted or had
│   └── Corrupted                    what arrived is not what was promised
├── InputError (ValueError)          a tensor that this SAE cannot take
├── PartialSAE (RuntimeError)        an SAE that was loaded in part, asked for what needs the whole
├── CannotConvert (ValueError)       the target format cannot express this SAE
├── CaptureError (RuntimeError)      a site that a model does not have, or a hook that never fired
├── DataError (ValueError)           text or stored activations that are missing, broken or too few
├── TrainingError (RuntimeError)     training that cannot go on: not finite, no room, another recipe
│   └── Stopped                      somebody asked a run to stop; it can go on
├── PublishError (RuntimeError)      an upload that did not happen, or not whole; says which
│   ├── NotPublishable (ValueError)  a folder that is not fit to be published
│   └── RemoteChanged                somebody else has changed the repo meanwhile
└── MissingExtra (ImportError)       an optional dependency is not installed

Messages say what happened with the value, where, and what to do next. One line each: the CLI prints
them as they are, so what a stranger's file put into one (a tensor's name with a line end, or with
an escape sequence for the terminal) is spelt out.
"""

from collections.abc import Sequence


class SaezooError(Exception):
    """The parent of every error that saezoo raises on purpose."""

    def __str__(self) -> str:
        text = super().__str__()
        if text.isprintable():
            return text
        spelt = (c if c.isprintable() else ascii(c)[1:-1] for c in text)
        return "".join(spelt)


class BadName(SaezooError, ValueError):
    """A name that cannot be read."""


class UnknownSAE(SaezooError, LookupError):
    """A well-formed name that nothing answers to; the message lists the closest."""


class AmbiguousName(BadName, UnknownSAE):
    """A bare `org/repo`: the message gives the explicit spellings."""


class RegistryError(SaezooError, ValueError):
    """A registry YAML that does not say what it must."""


class ConfigError(SaezooError, ValueError):
    """A spec that contradicts itself, or has keys that nobody knows."""


class FormatError(SaezooError, ValueError):
    """Files that are not what their format says."""


class UnsafeFile(FormatError):
    """A file that wants to run code, or claims more than it holds."""


class NotFinite(FormatError):
    """Weights with NaN or infinity in them."""


class FetchError(SaezooError, OSError):
    """Files that could not be had."""


class MissingFile(FetchError, FileNotFoundError):
    """There is no such file, repo or revision."""


class NoAccess(FetchError):
    """The host wants a token, or its licence accepted."""


class Offline(FetchError):
    """Not in the cache, and no network is wanted or had."""


class Corrupted(FetchError):
    """What arrived is not what was promised."""


class InputError(SaezooError, ValueError):
    """A tensor that this SAE cannot take."""


class PartialSAE(SaezooError, RuntimeError):
    """An SAE that was loaded in part, asked for what needs the whole."""


class CannotConvert(SaezooError, ValueError):
    """The target format cannot express this SAE."""


class CaptureError(SaezooError, RuntimeError):
    """A site that a model does not have, or a hook that never fired."""


class DataError(SaezooError, ValueError):
    """Text or stored activations that are missing, broken, or too few."""


class TrainingError(SaezooError, RuntimeError):
    """Training that cannot go on: numbers that are not finite, a full disk, another run's files."""


class Stopped(TrainingError):
    """A run that was asked to stop, and saved where it was."""


class PublishError(SaezooError, RuntimeError):
    """What was to be published was not, or not whole; the message says which."""


class NotPublishable(PublishError, ValueError):
    """A folder that is not fit to be published: one line for each reason in `problems`."""

    def __init__(self, problems: Sequence[str]) -> None:
        super().__init__("; ".join(problems))
        self.problems = tuple(problems)


class RemoteChanged(PublishError):
    """Somebody else has changed the repo since it was read; nothing of theirs was overwritten."""


class MissingExtra(SaezooError, ImportError):
    """An optional dependency is not installed."""
