"""Our own layers: quantized projections, LoRA over them, and how they enter a model."""
