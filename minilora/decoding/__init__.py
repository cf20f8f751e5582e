"""What generation needs besides the model: key/value cache, sampling, checks, work sharing, a compiled step."""
