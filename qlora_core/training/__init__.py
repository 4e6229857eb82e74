"""One QLoRA adapter, trained in its own process."""
