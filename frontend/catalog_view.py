"""The catalog as request handlers ask it: by name and version, in constant time, with Triton's error texts.

One view per pushed catalog; a view never changes. Behaviour: spec H-033, H-039..H-042, H-062 and `GetModel` of Triton's
model_repository_manager.cc.
"""

from __future__ import annotations

import re
from types import MappingProxyType

from forebay.ipc.catalog import Catalog, ModelEntry, no_ready_version
from forebay.ipc.errors import InvalidArgument, NotFound, NotReady

#: What std::stol reads of a version: its longest numeric prefix. More digits cannot be a 64-bit number.
_VERSION = re.compile(r"[ \t\n\v\f\r]*([+-]?)0*([0-9]+)", re.ASCII)
_VERSION_DIGITS = 19


class CatalogView:
    """An index over one :class:`Catalog`."""

    def __init__(self, catalog: Catalog) -> None:
        self.catalog = catalog
        by_name: dict[str, dict[int, ModelEntry]] = {}
        latest: dict[str, ModelEntry] = {}
        ambiguous: set[str] = set()
        for entry in catalog.models:
            if not entry.version:
                # Known by its directory alone, nobody can ask for it; Triton tells one without versions from that.
                if entry.has_no_version:
                    by_name.setdefault(entry.name, {})
                continue
            versions = by_name.setdefault(entry.name, {})
            known = next(iter(versions.values()), entry)
            if known.namespace != entry.namespace:
                ambiguous.add(entry.name)
            versions[entry.version] = entry
            if entry.is_ready and (entry.name not in latest or latest[entry.name].version < entry.version):
                latest[entry.name] = entry
        self._by_name = by_name
        self._latest = latest
        self._ambiguous = frozenset(ambiguous)
        #: Every READY version, sorted by name then version.
        self.ready_models = tuple(
            sorted((entry for entry in catalog.models if entry.is_ready), key=lambda entry: (entry.name, entry.version))
        )
        #: Name to its highest READY version.
        self.latest = MappingProxyType(latest)

    def find(self, name: str, version: int | None = None) -> ModelEntry:
        """Return a READY version: the one asked for, or the highest (spec H-062).

        Raises:
            NotFound: no such model or version, or no version of it is READY.
            NotReady: the version exists and is loading, unloading or failed, or the model's worker is being replaced.
            InvalidArgument: models of several namespaces have that name.
        """
        if version is None:
            entry = self._latest.get(name)
            if entry is not None and name not in self._ambiguous:
                return entry
        versions = self._by_name.get(name)
        if versions is None:
            raise NotFound(f"Request for unknown model: '{name}' is not found")
        if name in self._ambiguous:
            raise InvalidArgument(
                f"Request for model '{name}' is ambiguous: several namespaces have a model of that name"
            )
        if version is None:
            raise no_ready_version(name, versions.values())
        entry = versions.get(version)
        if entry is None:
            raise NotFound(f"Request for unknown model: '{name}' version {version} is not found")
        if not entry.is_ready:
            raise NotReady(f"Request for unknown model: '{name}' version {version} is not at ready state")
        return entry

    def is_ready(self, name: str, version: int | None = None) -> bool:
        """Return whether requests for that version, or for the model, would be taken."""
        if version is None:
            return name in self._latest
        entry = self._by_name.get(name, {}).get(version)
        return entry is not None and entry.is_ready

    def ready_versions(self, name: str) -> tuple[ModelEntry, ...]:
        """Return the READY versions of a model, lowest first; empty if there is no such model."""
        versions = self._by_name.get(name, {})
        return tuple(versions[number] for number in sorted(versions) if versions[number].is_ready)


def parse_version(text: str) -> int | None:
    """Return the version of a URL or message; None for the empty text, which means the highest one (spec G-047).

    Raises:
        InvalidArgument: no number, below 0, or beyond 64 bits (`GetModelVersionFromString` of Triton's common.cc).
    """
    if not text:
        return None
    match = _VERSION.match(text)
    if match is None or len(match[2]) > _VERSION_DIGITS or int(match[2]) > 2**63 - 1:
        raise InvalidArgument(
            f"failed to get model version from specified version string '{text[:64]}' (details: stol), version "
            "should be an integral value > 0"
        )
    if match[1] == "-" and int(match[2]):
        raise InvalidArgument(
            f"invalid model version specified '{text[:64]}' , version should be an integral value > 0"
        )
    return int(match[2])
