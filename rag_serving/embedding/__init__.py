"""Behind the embedding service: models and their weights, batches, the wire format, and the service's client."""
