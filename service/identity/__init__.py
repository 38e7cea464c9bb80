"""Authentication of callers: passwords and tokens.

Entry point: ``tokens.Authenticator``. It never logs a password, a token, or the name of a failed sign-in.
"""
