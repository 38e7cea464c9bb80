"""Configuration: the settings, their validation, logging, and the lifespan that opens everything.

Entry points: ``env_validator.read_settings`` and ``lifespan.lifespan_of``. Outside ``settings`` no module
reads the environment.
"""
