"""What the services say of themselves: the contract of spans and metrics, their export, logs and redaction."""
