"""Keeps a record of every model call in MLflow, also when MLflow, the disk or this process fails.

``recorder.open_recorder`` is the entry point of the service and ``recorder.replay`` that of the ``replay``
command. A record is appended to a file of the spool before its call is answered; a thread sends it to MLflow
afterwards. Files of a process that was killed stay in the folder as an orphaned spool, and any other process
sends them. A call never waits for MLflow and never fails because of it; records are lost only beyond the
configured limits, and lost ones are counted.
"""
