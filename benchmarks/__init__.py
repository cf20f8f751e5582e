"""Speed and memory beside torch + PEFT and bitsandbytes: `python -m benchmarks` checks, then times."""
