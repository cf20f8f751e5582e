"""What generation needs besides the model: key/value cache, sampling, checks, a compiled token."""
