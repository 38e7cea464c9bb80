"""Pure ASGI middleware, one class per module; ``service.app`` defines the order.

Middleware sees every request, including those without a route. It never reads a body and never knows a route.
"""
