"""The HTTP side: routes, request schemas, keys, answers."""
