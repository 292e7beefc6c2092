"""qkguard: keep long-range recall through chain-of-thought SFT."""
