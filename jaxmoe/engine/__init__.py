"""The engine: batches, jitted steps, the pure scheduler and generation."""
