"""Our own layers: quantized projections, adapters over them, and how they enter a model."""
