"""The code that runs inside TorchServe; it defines the formats of backbone, head, plan, record and configuration."""
