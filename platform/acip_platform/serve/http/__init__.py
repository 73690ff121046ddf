"""The HTTP server: routes, request schemas, API keys and responses."""
