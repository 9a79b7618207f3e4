"""The network side: HTTP, gRPC, metrics and the dashboard; stateless, one process per listener."""
