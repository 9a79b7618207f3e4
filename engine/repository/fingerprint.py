"""What a model's files look like from outside: by it the server knows that nothing, or what, has changed."""

from __future__ import annotations

import hashlib
import os

import msgspec

from forebay.engine.repository.beneath import Beneath, Entry, Refused
from forebay.engine.repository.versions import FoundVersions

#: Files that count for one model's fingerprint at most, and how deep they may lie.
MAX_FINGERPRINT_FILES = 100_000
MAX_FINGERPRINT_DEPTH = 16


class Fingerprint(msgspec.Struct, frozen=True):
    """What changes when a model's files do: names, sizes, modification times and inodes (spec R-089, R-091)."""

    config: str
    """Digest of the configuration file, or of the override."""
    shared: str
    """Digest of what lies beside the versions: labels, warm-up data, libraries."""
    versions: dict[int, str]
    """Digest of each version directory."""

    def changed_versions(self, older: Fingerprint) -> frozenset[int]:
        """Return the versions that are new or whose files differ from ``older``'s."""
        return frozenset(number for number, digest in self.versions.items() if older.versions.get(number) != digest)


def fingerprint_of(
    root: Beneath,
    path: tuple[str, ...],
    entries: list[Entry],
    override: str,
    config_file: str,
    versions: FoundVersions,
) -> Fingerprint:
    budget = [MAX_FINGERPRINT_FILES]
    numbers = {str(number) for number in versions.numbers}
    digests: dict[int, str] = {}
    shared = hashlib.blake2b(digest_size=16)
    config = hashlib.blake2b(override.encode(), digest_size=16)
    for item in entries:
        if item.is_directory and item.name in numbers:
            digest = hashlib.blake2b(digest_size=16)
            _add_tree(digest, root, (*path, item.name), budget, 0)
            digests[int(item.name)] = digest.hexdigest()
        elif item.is_directory and item.name != "configs":
            _add_entry(shared, item)
            _add_tree(shared, root, (*path, item.name), budget, 0)
        elif not item.is_directory:
            _add_entry(config if item.name == config_file else shared, item)
    if "/" in config_file:
        found = root.entry((*path, *config_file.split("/")))
        if found is not None:
            _add_entry(config, found)
    return Fingerprint(config.hexdigest(), shared.hexdigest(), digests)


def _add_tree(digest: hashlib.blake2b, root: Beneath, path: tuple[str, ...], budget: list[int], depth: int) -> None:
    """Add every file below a directory.

    Raises:
        Refused: too many files, or too deep.
    """
    if depth > MAX_FINGERPRINT_DEPTH:
        raise Refused(f"'{'/'.join(path)}' lies deeper than {MAX_FINGERPRINT_DEPTH} directories")
    for item in root.entries(path):
        budget[0] -= 1
        if budget[0] < 0:
            raise Refused(f"model '{path[0]}' has more than {MAX_FINGERPRINT_FILES} files")
        _add_entry(digest, item)
        if item.is_directory and item.name != "__pycache__":
            _add_tree(digest, root, (*path, item.name), budget, depth + 1)


def _add_entry(digest: hashlib.blake2b, item: Entry) -> None:
    """Add one entry. A directory counts by name only: its time changes when Python writes ``__pycache__`` into it."""
    if item.is_directory:
        if item.name != "__pycache__":
            digest.update(os.fsencode(item.name) + b"\0d")
        return
    digest.update(os.fsencode(item.name) + f"\0{item.mtime_ns} {item.size_bytes} {item.inode}\0".encode())
