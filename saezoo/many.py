"""Fetch many SAEs at once: the bytes first, then a few at a time, and what failed at the end."""

import os
from collections.abc import Callable, Iterable
from concurrent.futures import Future, ThreadPoolExecutor, as_completed
from dataclasses import dataclass

from saezoo.entry import Entry
from saezoo.errors import SaezooError
from saezoo.fetched import Fetched
from saezoo.hub import fetch

AT_ONCE = 4
"""SAEs that are fetched at the same time: more would make a host wait out its limits."""


@dataclass(frozen=True)
class Wanted:
    """One SAE, and what fetching it takes."""

    entry: Entry
    cached: bool
    size: int | None = None
    """Bytes to fetch; None where the host does not say."""


def plan(
    entries: Iterable[Entry],
    *,
    token: str | None = None,
    cache_dir: str | os.PathLike[str] | None = None,
    local_files_only: bool = False,
) -> list[Wanted]:
    """What is cached already, and how much the rest is: one request for each Hub repo, one for each
    file of another host; none with `local_files_only`.
    """
    from saezoo.metadata import Hosts

    wanted = []
    with Hosts(token) as hosts:
        for entry in entries:
            try:
                fetch(entry, cache_dir=cache_dir, local_files_only=True, extras=True)
                wanted.append(Wanted(entry, True, 0))
                continue
            except SaezooError:
                pass  # not cached, or what its fetch will say
            size = None
            if not local_files_only:
                try:
                    sizes = [file.size for file in hosts.look(entry).files.values()]
                    size = sum(filter(None, sizes)) if None not in sizes else None
                except SaezooError:
                    pass
            wanted.append(Wanted(entry, False, size))
    return wanted


def fetch_many(
    entries: list[Entry],
    *,
    token: str | None = None,
    cache_dir: str | os.PathLike[str] | None = None,
    local_files_only: bool = False,
    done: Callable[[Entry, Fetched | SaezooError], None] = lambda _entry, _result: None,
) -> list[Fetched | SaezooError]:
    """The files of every entry, in order, or the error of those that could not be had.

    done: called as each ends. An interrupt lets those under way end and begins no other.
    """

    def one(entry: Entry) -> Fetched | SaezooError:
        try:
            return fetch(
                entry,
                token=token,
                cache_dir=cache_dir,
                local_files_only=local_files_only,
                progress=False,
                extras=True,
            )
        except SaezooError as error:
            return error

    pool = ThreadPoolExecutor(AT_ONCE)
    try:
        futures: dict[Future[Fetched | SaezooError], Entry] = {
            pool.submit(one, entry): entry for entry in entries
        }
        for future in as_completed(futures):
            done(futures[future], future.result())
        return [future.result() for future in futures]
    finally:
        pool.shutdown(cancel_futures=True)
