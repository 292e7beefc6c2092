"""PEFT adapters: drift of the effective queries and keys, merges and adapters with queries and keys left out."""
