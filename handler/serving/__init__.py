"""What a worker does for any host: answers, isolation of bad items, telemetry, the probe."""
