"""Who is calling, and what belongs to whom: passwords, tokens, API keys, OpenID Connect, stored responses.

Entry points: ``callers.Callers``, ``tokens.Authenticator``, ``oidc.open_oidc``, ``database.open_database``,
``response_owners.ResponseOwners``. It never logs a password, a token, or the name of a failed sign-in.
"""
