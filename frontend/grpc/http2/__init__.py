"""The server side of HTTP/2 as gRPC uses it (RFC 9113, RFC 7541); knows nothing of gRPC and does no I/O of its own."""
