"""What generation needs besides the model: key/value cache, sampling, checks, sharing of work, a compiled token."""
