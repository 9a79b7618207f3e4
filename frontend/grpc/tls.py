"""TLS of the gRPC port (spec G-081)."""

from __future__ import annotations

import ssl

from forebay.frontend.grpc.settings import GrpcView
from forebay.ipc.errors import InvalidArgument


def server_context(settings: GrpcView) -> ssl.SSLContext | None:
    """Return the context to listen with, None without TLS.

    Raises:
        InvalidArgument: a file is missing or not what it should be; for the operator, at start-up.
    """
    if not (settings.use_ssl or settings.use_ssl_mutual):
        return None
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    # RFC 9113, 9.2.
    context.minimum_version = ssl.TLSVersion.TLSv1_2
    context.options |= ssl.OP_NO_COMPRESSION | ssl.OP_NO_RENEGOTIATION
    context.set_alpn_protocols(["h2"])
    if not settings.server_cert or not settings.server_key:
        raise InvalidArgument("--grpc-use-ssl needs --grpc-server-cert and --grpc-server-key")
    try:
        # With a password, or OpenSSL would ask the terminal for that of an encrypted key.
        context.load_cert_chain(settings.server_cert, settings.server_key, password="")
    except (OSError, ssl.SSLError) as error:
        raise InvalidArgument(f"cannot use the gRPC server certificate: {error}") from None
    if settings.use_ssl_mutual:
        if not settings.root_cert:
            raise InvalidArgument("--grpc-use-ssl-mutual needs --grpc-root-cert")
        context.verify_mode = ssl.CERT_REQUIRED
        try:
            context.load_verify_locations(settings.root_cert)
        except (OSError, ssl.SSLError) as error:
            raise InvalidArgument(f"cannot use the gRPC root certificate: {error}") from None
    return context
