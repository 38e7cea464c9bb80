"""The response cache: answers equal questions, and questions with the same meaning, without calling a model.

Its entry point is ``response_cache.open_cache``, on a store from ``response_cache.open_store``; beside it,
``coalescing`` lets equal calls under way share one.

The cache never fails a call, never delays one by more than its time limits, never returns one tenant's answer
to another, and never stores questions: they are present as hashes and vectors only.
"""

from service.utils.deferred_packages import defer_packages

defer_packages("qdrant_client")
