"""Read and write model files: one module per format."""
