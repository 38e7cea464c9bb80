"""Building blocks of a call that know nothing of models: deadline, retry, rate, cancellation on disconnect.

Entry points: ``deadline.Deadline``, ``retry.retrying``, ``rates.Rate`` and
``disconnect.cancel_on_disconnect``. Nothing here performs I/O of its own.
"""
