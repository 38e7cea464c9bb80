"""The models' side: everything between this service and the LiteLLM proxy.

The entry point is ``client.open_llm``, which opens the one pooled client; ``LlmClient`` makes one attempt for
each call and raises this service's errors only.

=============  ======================================================================
``client``     opens and closes the client; whole answers, streams, models, pings
``messages``   requests, and what is read from answers
``stream``     the events of a streamed answer, and the limits of its time
``spans``      the GenAI span and metrics of each attempt
``errors``     from the SDK's exceptions to this service's errors
``transport``  HTTP over aiohttp, below the SDK
=============  ======================================================================

This package never retries, never reads or fills a cache and never decides whether an upstream may be asked:
retry, breaker and cache stand above it. It is the only importer of ``openai``, ``httpx2`` and ``aiohttp``.
"""

from service.utils.deferred_packages import defer_packages

defer_packages("openai.types")
