"""The use case of a model call, and what protects it: circuit breaker, rate limit, health checks, drain.

Entry point: ``generation.Generation``. Services return facts; they never build HTTP responses.
"""
