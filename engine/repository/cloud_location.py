"""Where a cloud repository is and with which credentials, in fsspec's words (spec R-121..R-124).

    s3://bucket/path    s3://https://host:port/bucket/path    gs://bucket/path    as://account/container/path

Nothing here talks to a cloud.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
from collections.abc import Mapping
from typing import Any

import msgspec

from forebay.ipc.errors import InvalidArgument

#: JSON file with credentials by prefix of the address; the longest prefix wins.
CREDENTIALS_VARIABLE = "TRITON_CLOUD_CREDENTIAL_PATH"

_ADDRESS = re.compile(r"(s3|gs|as)://(.*)", re.DOTALL)
_S3_SERVER = re.compile(r"(https?)://([^/]+)/(.*)", re.DOTALL)


class CloudLocation(msgspec.Struct, frozen=True, kw_only=True):
    """What fsspec needs to open a repository."""

    url: str
    """As it was given."""
    protocol: str
    """fsspec's name: ``s3``, ``gs`` or ``abfs``."""
    root: str
    """Bucket or container and path below it, without slashes at the ends."""
    options: dict[str, Any]
    """Arguments of the file system; secrets among them: never printed."""
    package: str
    """The PyPI package that implements it."""


def is_cloud(path: str) -> bool:
    """Whether a repository path is an address in a cloud."""
    return _ADDRESS.match(path) is not None


def parse_location(url: str, environ: Mapping[str, str] | None = None) -> CloudLocation:
    """Return where a repository is.

    Args:
        environ: the environment; default: this process's.

    Raises:
        InvalidArgument: the address or the file of credentials cannot be used.
    """
    environment = os.environ if environ is None else environ
    match = _ADDRESS.fullmatch(url)
    if match is None:
        raise InvalidArgument(f"model repository '{url}' is no address of a cloud repository")
    kind, rest = match.groups()
    credentials = _credentials(kind, url, environment)
    match kind:
        case "s3":
            return _s3(url, rest, credentials, environment)
        case "gs":
            options = {"token": credentials} if isinstance(credentials, str) and credentials else {}
            return CloudLocation(url=url, protocol="gs", root=_root(url, rest), options=options, package="gcsfs")
        case _:
            return _azure(url, rest, credentials, environment)


def _s3(url: str, rest: str, credentials: object, environ: Mapping[str, str]) -> CloudLocation:
    options: dict[str, Any] = {}
    client: dict[str, str] = {}
    server = _S3_SERVER.fullmatch(rest)
    if server is not None:
        scheme, host, rest = server.groups()
        client["endpoint_url"] = f"{scheme}://{host}"
    given = _texts(credentials)
    for ours, theirs in (
        ("key", "key_id"),
        ("secret", "secret_key"),
        ("token", "session_token"),
        ("profile", "profile"),
    ):
        if given.get(theirs):
            options[ours] = given[theirs]
    # Keys in the environment are found by the library itself.
    region = given.get("region") or environ.get("AWS_DEFAULT_REGION")
    if region:
        client["region_name"] = region
    if client:
        options["client_kwargs"] = client
    return CloudLocation(url=url, protocol="s3", root=_root(url, rest), options=options, package="s3fs")


def _azure(url: str, rest: str, credentials: object, environ: Mapping[str, str]) -> CloudLocation:
    account, _, path = rest.partition("/")
    given = _texts(credentials)
    options: dict[str, Any] = {
        "account_name": given.get("account_str") or account or environ.get("AZURE_STORAGE_ACCOUNT", "")
    }
    key = given.get("account_key") or environ.get("AZURE_STORAGE_KEY")
    if key:
        options["account_key"] = key
    else:
        options["anon"] = False  # managed identity and its like
    return CloudLocation(url=url, protocol="abfs", root=_root(url, path), options=options, package="adlfs")


def _root(url: str, path: str) -> str:
    root = re.sub(r"/+", "/", path).strip("/")
    if not root:
        raise InvalidArgument(f"model repository '{url}' names no bucket")
    return root


def _credentials(kind: str, url: str, environ: Mapping[str, str]) -> object:
    """Return the credentials of the longest prefix of an address, None without any (spec R-124)."""
    path = environ.get(CREDENTIALS_VARIABLE)
    if not path:
        return None
    try:
        with open(path, "rb") as file:
            by_kind = msgspec.json.decode(file.read(), type=dict[str, dict[str, Any]])
    except OSError as error:
        raise InvalidArgument(f"{CREDENTIALS_VARIABLE} names a file that cannot be read: {error.strerror}") from None
    except msgspec.DecodeError as error:
        raise InvalidArgument(f"{CREDENTIALS_VARIABLE} names a file that is not understood: {error}") from None
    matching = [prefix for prefix in by_kind.get(kind, {}) if url.startswith(prefix)]
    return by_kind[kind][max(matching, key=len)] if matching else None


def _texts(credentials: object) -> dict[str, str]:
    try:
        return msgspec.convert(credentials if credentials is not None else {}, dict[str, str])
    except msgspec.ValidationError:
        raise InvalidArgument(f"{CREDENTIALS_VARIABLE}: credentials must be an object of strings") from None


def cache_name(location: CloudLocation) -> str:
    """Return a file name for a location, the same for the same one."""
    endpoint = json.dumps(location.options.get("client_kwargs", {}).get("endpoint_url", ""))
    readable = re.sub(r"[^A-Za-z0-9._-]+", "-", location.root)[-60:]
    digest = hashlib.blake2b(f"{location.protocol} {endpoint} {location.root}".encode(), digest_size=8).hexdigest()
    return f"{location.protocol}-{readable}-{digest}"
