"""The worker, for any host: answers, isolation of bad items, telemetry and the probe."""
