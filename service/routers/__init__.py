"""The HTTP routes: each parses a request, calls one use case, and builds the response.

Entry point: ``service.app`` includes the routers. A route never calls an SDK and never handles an SDK's
errors.
"""
