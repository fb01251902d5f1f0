"""MIRA: federated multi-task LoRA fine-tuning of large language models."""
