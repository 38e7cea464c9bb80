"""What the replicas of the service count together, in a Valkey server, so that they act as one.

``counts.open_counts`` is the entry point. A count never fails a request and never delays one beyond
``VALKEY_TIMEOUT_S``: without the server each process goes on by its own counts. It never stores a name: keys
are hashes.
"""
