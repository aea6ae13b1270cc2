"""Runs inside TorchServe and owns the formats: backbone, head, plan, record, configuration."""
