"""What replicas share in a Valkey server, so that they act as one: counts, leases on calls, news.

``state.open_shared`` and ``news.open_news`` are the entry points. Nothing here fails a request, or delays one
beyond ``VALKEY_TIMEOUT_S`` for each question: without the server each process goes on by itself. Keys are
hashes: no name is stored. An answer is left for some seconds, for other processes whose callers wait for it.
"""
