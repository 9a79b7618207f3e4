"""The gRPC protocol: HTTP/2 (``http2/``), calls and messages over it, and Triton's service. gRPC frontend process."""
