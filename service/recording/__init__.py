"""Keeps a record of every model call in MLflow, also when MLflow, the disk or this process fails.

``recorder.open_recorder`` is the entry point of the service and ``recorder.replay`` that of the ``replay``
command. One thread appends a record to a file of the spool before the answer to its call ends, and another
one sends it to MLflow afterwards. Files of a process that was killed stay in the folder as an orphaned spool,
and any other process sends them. A call never waits for MLflow, waits for a disk that hangs once and briefly,
and never fails because of either; records are lost only beyond the configured limits, and lost ones are
counted.
"""

from service.utils.deferred_packages import defer_packages

defer_packages("mlflow")
