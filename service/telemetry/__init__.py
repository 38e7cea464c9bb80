"""OpenTelemetry: providers, instruments, events, and the names of all signals.

Entry point: ``providers.build_telemetry``. Telemetry never fails or delays a request, and never contains
prompts, tokens or passwords.
"""
