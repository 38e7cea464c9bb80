"""Says what became of a request, to whoever holds one of its ids.

``explainer.Explainer`` is the entry point of the service and ``command.run`` that of the ``explain`` command.
It looks into the memory of this process, the spools of this machine, and MLflow, in this order, and says
which of them could not be asked. It shows no prompt and no answer, and a user sees their own requests only.
"""
