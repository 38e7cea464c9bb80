"""Authentication of callers, and what belongs to whom: passwords, tokens, the owners of stored responses.

Entry points: ``tokens.Authenticator``, ``database.open_database``, ``response_owners.ResponseOwners``. It
never logs a password, a token, or the name of a failed sign-in.
"""
